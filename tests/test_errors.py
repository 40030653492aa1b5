"""Where warnings point."""

import warnings

import pytest
import torch

from clafusion import ConvergenceWarning, Merging, fuse, sinkhorn
from clafusion.config import Barycentre
from tests.support import networks
from tests.support.data import VECTORS


def kernel():
    costs = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    return sinkhorn([costs], epsilon=1e-4, max_iterations=1)


def barycentre():
    models = [networks.mlp(12, 10, 8, 5, seed=one) for one in range(3)]
    return fuse(models, VECTORS, merging=Merging(strategy=Barycentre(max_rounds=1)))


@pytest.mark.parametrize("call", [kernel, barycentre])
def test_a_warning_points_at_the_callers_line(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        call()
    assert [one.filename for one in caught if one.category is ConvergenceWarning] == [__file__]
