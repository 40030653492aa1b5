"""The weights of a proof: any rows of a redrawn tensor are those of the whole."""

import pytest
import torch

from clafusion.tracing.trial_weights import BaseWeights


@pytest.mark.parametrize("shape", [(9, 70), (9, 3, 5), (40,), (4, 1_500_000)])
@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 1, 1, 2, 0], []])
def test_rows_are_those_of_the_whole(shape, rows):
    own = {"weight": torch.zeros(shape, dtype=torch.float64)}
    base = BaseWeights(own, frozenset(own), 3)
    found = base.rows("weight", torch.tensor(rows, dtype=torch.int64))
    assert found.dtype == torch.float64
    assert torch.equal(found, base.whole("weight")[rows])
    assert base.whole("weight").unique().numel() > 30
