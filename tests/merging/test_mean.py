"""The weighted mean where values are infinite, as in the masks of attention."""

import math

import pytest
import torch
from torch import Tensor, nn

from clafusion import fuse
from clafusion.merging.mean import weighted_mean

INF = math.inf
TOKENS = torch.randint(0, 20, (120, 6), generator=torch.Generator().manual_seed(0))


class Causal(nn.Module):
    """A language model whose mask is a buffer of zeros and minus infinity."""

    def __init__(self, depth: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(8, 20)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        return self.head(x)


def test_equal_infinite_values_give_that_value():
    values = torch.tensor([-INF, INF, 0.1])
    assert torch.equal(weighted_mean([values] * 3, [1.0, 2.0, 0.5]), values)
    assert torch.equal(weighted_mean([values] * 2, [torch.tensor(0.3), torch.tensor(0.7)]), values)


def test_a_weight_of_zero_beside_infinite_values_keeps_the_others():
    values, infinite = torch.tensor([1.0, 2.0]), torch.tensor([-INF, 5.0])
    assert torch.equal(weighted_mean([values, infinite], [1.0, 0.0]), values)
    assert torch.equal(weighted_mean([infinite, values], [0.0, 1.0]), values)
    weights = [torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])]
    assert torch.equal(weighted_mean([values, infinite], weights), torch.tensor([1.0, 3.5]))
    assert torch.equal(weighted_mean([infinite, values], [0.5, 0.5]), torch.tensor([-INF, 3.5]))


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_a_mask_of_minus_infinity_stays(calibration):
    models = [Causal(2, 0).eval(), Causal(1, 1).eval()]
    result = fuse(models, TOKENS, calibration=calibration, assessment="none")
    assert torch.equal(result.model.mask, models[0].mask)
    assert bool(result.model(TOKENS).isfinite().all())
