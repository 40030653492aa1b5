"""The operations of a run: by hand for small networks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from clafusion.execution.flops import count_operations


class Attention(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x, x)


class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


CASES = {
    "linear": (nn.Linear(4, 5), (3, 4), 2 * 3 * 4 * 5),
    "linear without a bias, more axes": (nn.Linear(4, 5, bias=False), (3, 7, 4), 2 * 21 * 4 * 5),
    "convolution": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 2 * 2 * 36 * 8 * 27),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6), 2 * 2 * 16 * 8 * 18),
    "attention": (Attention(), (2, 3, 8, 16), 2 * 3 * 2 * (2 * 8 * 8 * 16)),
    "lstm": (nn.LSTM(4, 5, batch_first=True), (2, 3, 4), 2 * 6 * 20 * (4 + 5)),
    "norm and activation": (nn.Sequential(nn.LayerNorm(4), nn.ReLU()), (3, 4), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_the_products(case):
    module, shape, expected = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert count_operations(lambda: module(x)) == expected


def test_parts_of_a_graph_that_operators_call_count():
    x = torch.randn(3, 4)
    exported = torch.export.export(WithoutGradients().eval(), (x,), strict=False).module()
    assert any("set_grad" in str(node.target) for node in exported.graph.nodes)
    with torch.enable_grad():
        assert count_operations(lambda: exported(x)) == 2 * 3 * (4 * 5 + 5 * 6)
