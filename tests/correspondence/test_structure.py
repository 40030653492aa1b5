"""Shallow networks brought to a deep one's structure: what is built, and its widths."""

import pytest
import torch
from torch import nn

from clafusion import (
    StructureError,
    fuse,
    inserted_model,
)
from tests.support import networks
from tests.support.assertions import assert_same_function
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


def test_two_parameters_where_the_structure_shares_one_are_refused_by_name():
    class Words(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.relu(self.embedding(x)))

    data = torch.randint(0, 20, (60, 6), generator=torch.Generator().manual_seed(0))
    message = r"models\[1\]: it has two parameters, 'embedding.weight' and 'head.weight', where the"
    with pytest.raises(StructureError, match=message):
        fuse([Words(True).eval(), Words(False).eval()], data)


@pytest.mark.parametrize("turned", [False, True])
def test_products_with_a_matrix_can_be_inserted_as_linear_layers_can(turned):
    class Products(nn.Module):
        def __init__(self, depth, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            sizes = [(6, 9), *[(9, 9)] * depth, (9, 3)]
            drawn = (torch.randn(size, generator=generator) / size[0] ** 0.5 for size in sizes)
            self.matrices = nn.ParameterList(one.T.clone() if turned else one for one in drawn)
            self.biases = nn.ParameterList(
                torch.randn(size[1], generator=generator) for size in sizes
            )

        def forward(self, x):
            last = len(self.matrices) - 1
            for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
                x = torch.addmm(bias, x, matrix.t() if turned else matrix)
                x = torch.relu(x) if i < last else x
            return x

    data = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    deep, shallow = Products(3, 0).eval(), Products(1, 1).eval()
    for calibration in ("none", "repair", "least_squares"):
        for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
            model = fuse([deep, shallow], data, weights, calibration=calibration).model
            assert_same_function(model, parent, data, calibration)
