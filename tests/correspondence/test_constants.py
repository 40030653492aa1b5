"""Constants of two networks: what is the same for all channels may be of another width."""

import pytest
import torch
from torch import nn

from clafusion import StructureError, fuse
from tests.support.assertions import assert_same_function

X = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """The keys' bias is a buffer, as in timm's Swin V2 and EVA."""

    def __init__(self, width, seed, constant=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * width, 8) / 3)
        self.of_query, self.of_value = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.register_buffer("of_key", torch.full((width,), constant), persistent=False)
        self.out = nn.Linear(width, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        bias = torch.cat([self.of_query, self.of_key, self.of_value])
        query, key, value = nn.functional.linear(x, self.weight, bias).chunk(3, -1)
        mixed = (query @ key.transpose(1, 2) / 2).softmax(-1) @ value
        return self.head((x + self.out(mixed)).mean(1))


@pytest.mark.filterwarnings("ignore::clafusion.WidthWarning")
@pytest.mark.parametrize("width", [8, 12])
def test_a_uniform_constant_may_be_of_another_width(width):
    wide, narrow = Attention(16, 0), Attention(width, 1)
    fused = fuse([wide, narrow], X, [1, 0], calibration="none").model
    assert_same_function(fused, wide, X)
    assert not fused.of_key.any()
    assert fuse([wide, narrow], X).model(X).isfinite().all()


@pytest.mark.filterwarnings("ignore::clafusion.WidthWarning")
def test_constants_of_other_values_and_widths_are_refused():
    with pytest.raises(StructureError, match=r"of_key.*none of its axes carries channels"):
        fuse([Attention(16, 0), Attention(8, 1, constant=0.5)], X)
