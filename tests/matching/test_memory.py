"""Matching holds one matrix of costs at a time, and plans that are no matrices."""

import pickle

import pytest

from clafusion import FusionConfig, Matching, align
from clafusion.matching.plans import match_sources
from clafusion.targets.sources import sources_of
from clafusion.targets.target import choose_target
from tests.support import networks
from tests.support.data import VECTORS
from tests.support.memory import LiveTensors

WIDTH = 1024
MATRIX = 8 * WIDTH * WIDTH


# Of correlations the rows of both networks count as well, for they are read in parts.
@pytest.mark.parametrize(("cost", "matrices"), [("correlation", 2.75), ("euclidean", 3.0)])
def test_costs_of_one_group_are_held_and_plans_are_small(cost, matrices, monkeypatch):
    monkeypatch.setattr("clafusion.matching.plans._AT_ONCE", WIDTH * WIDTH)
    model = networks.mlp(12, WIDTH, WIDTH, WIDTH, 5)
    copy = networks.permuted_copy(model, VECTORS)
    config = FusionConfig(matching=Matching(cost=cost))
    aligned = align([model, copy], VECTORS, config)
    sources = sources_of(choose_target(aligned, config), aligned)
    with LiveTensors() as seen:
        matched = match_sources(sources, config)
    assert len(matched[0].plans) == 3
    assert seen.most < matrices * MATRIX
    for one in matched:
        assert len(pickle.dumps(one.plans)) < 3 * 20 * WIDTH
    assert [all(plan.is_identity for plan in one.plans) for one in matched].count(True) == 1
    for plan in matched[1 - sources.reference].plans:
        assert plan.copied_rows(leaves=True) is not None
        assert plan.copied_rows(leaves=True).unique().numel() == WIDTH
