"""Shallow networks brought to a deep one's structure: what is built, and its widths."""

import pytest
from torch import nn

from clafusion import (
    StructureError,
    fuse,
    inserted_model,
)
from tests.support import networks
from tests.support.data import IMAGES
from tests.support.results import moved_parent


def test_inserting_layers_where_widths_are_fixed_is_refused():
    deep, shallow = networks.resnet(3, 3), networks.resnet(2, 1, widths=(10, 20))
    result = fuse([deep, shallow], IMAGES)  # the fused model has the deep one's widths
    with pytest.raises(StructureError, match="a width is fixed in the target module's code"):
        inserted_model(deep, moved_parent(result).correspondence)


def test_a_model_with_inserted_layers_tells_its_true_widths():
    deep, shallow = networks.vgg(2, 2), networks.vgg(1, 1, widths=(5, 20), seed=1)
    result = fuse([deep, shallow], IMAGES)
    for module in inserted_model(deep, moved_parent(result).correspondence).modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
