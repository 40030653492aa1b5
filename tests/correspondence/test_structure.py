"""Shallow networks brought to a deep one's structure: what is built, and its widths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import Shallower, StructureError, fuse, inserted_model
from clafusion.config import MERGES
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.data import IMAGES
from tests.support.networks import output
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


class Products(nn.Module):
    """A chain of products with matrices and biases, written in some way."""

    def __init__(self, depth, seed, write, turned=False, width=9, batch_norm=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [(6, width), *[(width, width)] * depth, (width, 3)]
        drawn = (torch.randn(size, generator=generator) / size[0] ** 0.5 for size in sizes)
        self.write, self.turned = write, turned
        self.matrices = nn.ParameterList(one.T.clone() if turned else one for one in drawn)
        self.biases = nn.ParameterList(torch.randn(size[1], generator=generator) for size in sizes)
        norms = (nn.BatchNorm1d(width) if batch_norm else nn.Identity() for _ in sizes[1:])
        self.norms = nn.ModuleList(norms)
        self.eval()

    def forward(self, x):
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            x = self.write(x, matrix.t() if self.turned else matrix, bias)
            x = torch.relu(self.norms[i](x)) if i < len(self.norms) else x
        return x


def added_in_place(x, matrix, bias):
    x = x @ matrix
    x += bias
    return x


WRITTEN = {
    "addmm": lambda x, matrix, bias: torch.addmm(bias, x, matrix),
    "x @ W + b": lambda x, matrix, bias: x @ matrix + bias,
    "b + x @ W": lambda x, matrix, bias: bias + x @ matrix,
    "x @ W; += b": added_in_place,
    "linear": lambda x, matrix, bias: F.linear(x, matrix.t(), bias),
}
ROWS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("written", [one for one in WRITTEN if one != "linear"])
def test_products_with_a_matrix_can_be_inserted_as_linear_layers_can(written, turned, batch_norm):
    deep, shallow = (
        Products(depth, seed, WRITTEN[written], turned, batch_norm=batch_norm)
        for seed, depth in enumerate((3, 1))
    )
    for calibration in ("none", "repair", "least_squares"):
        for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
            model = fuse([deep, shallow], ROWS, weights, calibration=calibration).model
            assert_same_function(model, parent, ROWS, calibration)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("written", ["addmm", "x @ W + b"])
def test_products_with_a_matrix_are_merged_as_linear_layers_are(written, merge):
    outputs = []
    for write, turned in ((WRITTEN["linear"], True), (WRITTEN[written], False)):
        deep, shallow = (Products(depth, i, write, turned) for i, depth in enumerate((3, 1)))
        target = Shallower(merge=merge)
        fused = fuse([deep, shallow], ROWS, [1, 0], target=target, calibration="none").model
        outputs.append(output(fused, ROWS))
    torch.testing.assert_close(*outputs)


def test_what_is_in_the_way_of_an_insertion_is_said():
    def scaled(x, matrix, bias):
        return x @ matrix * 2 + bias

    message = (
        r"layer 'matmul#3' of models\[0\] has no partner, and cannot be inserted into models\[1\] "
        r"without changing it: its matmul is followed by mul, add, relu, where only a bias, a "
        r"BatchNorm and one activation may stand"
    )
    with pytest.raises(StructureError, match=message):
        fuse([Products(3, 0, scaled), Products(1, 1, scaled)], ROWS)
