"""Where warnings point, and errors that are told again."""

import warnings

import pytest
import torch

from clafusion import AlignmentError, ConvergenceWarning, Merging, fuse, sinkhorn
from clafusion.config import Barycentre
from clafusion.errors import retold
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


def test_an_error_that_is_told_again_keeps_what_it_knows():
    error = AlignmentError("no way", 3, 2)
    again = retold(error, "model 'a': no way")
    assert again is error
    assert str(again) == "model 'a': no way"
    assert (again.reached_deep, again.reached_shallow) == (3, 2)
