"""Where warnings point, and errors that are told again."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import clafusion
from clafusion import (
    AlignmentError,
    ConvergenceWarning,
    InputError,
    Merging,
    fuse,
    sinkhorn,
)
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


RESULT = SimpleNamespace(model=networks.mlp(12, 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: clafusion.finetune(RESULT, (VECTORS, VECTORS), epochs=1),
        lambda: clafusion.distill(networks.mlp(12, 5), [RESULT], VECTORS, alpha=1, epochs=1),
        lambda: clafusion.distill(networks.mlp(12, 5), RESULT, VECTORS, alpha=1, epochs=1),
        lambda: clafusion.fuse([RESULT, RESULT], VECTORS),
        lambda: list(clafusion.fuse_pairs({"a": RESULT, "b": RESULT}, VECTORS)),
        lambda: clafusion.evaluate(RESULT, VECTORS, torch.zeros(len(VECTORS))),
        lambda: clafusion.trace(RESULT, VECTORS),
        lambda: clafusion.save_model(RESULT, "result.pt"),
        lambda: clafusion.load(RESULT),
    ],
)
def test_a_result_in_a_networks_place_is_told_where_its_network_is(call):
    with pytest.raises(InputError, match=r"got SimpleNamespace: give its \.model"):
        call()
