"""Attention heads and convolution groups: matched and put in order."""

from dataclasses import replace

import pytest
import torch

import clafusion
from clafusion import Deeper, Like, Matching, Zip, correspond, fuse, naive_average, profile, trace
from clafusion.matching.head_order import order_heads
from clafusion.profiling.importance import channel_importance
from clafusion.profiling.moments import observed_moments
from clafusion.profiling.profile import profile_models
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.attention import MODELS, TOKENS, Encoder, built, shuffled
from tests.support.data import CALIBRATIONS, PROFILED
from tests.support.networks import module_of


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_shuffled_copy_is_itself(name, calibration):
    model, inputs = built(name)
    other = shuffled(model, trace(model, inputs))
    for order in ((model, other), (other, model)):
        result = fuse(order, inputs, calibration=calibration)
        assert_same_function(result.model, model, inputs, calibration)
        assert [bool(one.head_orders) for one in result.parents] == [False, True]


WAYS = [
    Matching(cost="euclidean"),
    Matching(cost="both"),
    Matching(solver=Zip(budget=0.0)),
    Matching(importance="activation", solver="exact"),
]


@pytest.mark.parametrize("matching", WAYS, ids=str)
def test_every_way_to_match_goes_with_heads(matching):
    model, inputs = built("attention")
    graph = trace(model, inputs)
    models = [model, shuffled(model, graph), shuffled(model, graph, 4)]
    for count in (2, 3):
        fused = fuse(models[:count], inputs, calibration="none", matching=matching).model
        assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("strategy", ["iterative", "many_to_one", "barycentre"])
def test_three_shuffled_copies_fuse_to_the_model(strategy):
    model, inputs = built("attention")
    graph = trace(model, inputs)
    models = [model, shuffled(model, graph, 3), shuffled(model, graph, 4)]
    fused = fuse(models, inputs, merging=strategy).model
    assert_same_function(fused, model, inputs, "repair")


def test_depths_may_differ():
    torch.manual_seed(0)
    deep, shallow = (networks.randomise(Encoder(n), seed=n).eval() for n in (3, 1))
    graph = trace(shallow, TOKENS)
    moved = shuffled(shallow, graph)
    expected = fuse([deep, shallow], TOKENS).model
    # Whatever order the heads come in, they go to the same places.
    assert_same_function(fuse([deep, moved], TOKENS).model, expected, TOKENS, "repair")


@pytest.mark.parametrize("target", ["template", "shallower", "width"])
def test_targets_that_are_nobodys_put_heads_in_order_too(target):
    torch.manual_seed(0)
    deep, shallow = (networks.randomise(Encoder(n), seed=n).eval() for n in (3, 1))
    template = networks.randomise(Encoder(4), seed=5).eval()
    wanted = {"template": Like(template), "shallower": "shallower", "width": Deeper(width="wide")}
    moved = shuffled(deep, trace(deep, TOKENS)), shuffled(shallow, trace(shallow, TOKENS))
    # Least squares makes something of the template's own random block, which reads other channels.
    options = {"target": wanted[target], "calibration": "repair"}
    expected = fuse([deep, shallow], TOKENS, **options).model
    for models in ((deep, moved[1]), (moved[0], shallow), moved):
        found = fuse(models, TOKENS, **options).model
        assert_same_function(found, expected, TOKENS, "repair")


def test_layer_weights_are_told_where_heads_change_places():
    deep, shallow = (networks.randomise(Encoder(n), seed=n).eval() for n in (3, 1))
    moved = shuffled(shallow, trace(shallow, TOKENS))
    for order in ([deep, moved], [moved, deep]):
        result = fuse(order, TOKENS, [0.7, 0.3], calibration="none")
        assert [bool(one.head_orders) for one in result.parents] == [one is moved for one in order]
        rows = [None] * 5
        for of_deep, _ in result.alignment.pairs:
            rows[of_deep] = (0.7, 0.3)
        lacking = (0.7, None) if order[0] is deep else (None, 0.3)
        assert result.layer_weights == tuple(row or lacking for row in rows)


def test_a_moved_profile_is_that_of_the_moved_model():
    model, inputs = built("grouped")
    graph = trace(model, inputs)
    other = shuffled(model, graph)
    one, two = profile(model, inputs), profile(other, inputs)
    two = replace(two, importance=channel_importance(two.traced, inputs, "activation"))
    layers = tuple(range(len(graph.layers)))
    _, moved, orders = order_heads(correspond(one.traced, two.traced, layers), one, two)
    assert orders
    again = profile(module_of(moved.traced), inputs)
    for key, rows in again.rows.items():
        torch.testing.assert_close(moved.rows[key], rows)
    for ours, theirs in zip(
        moved.importance, channel_importance(again.traced, inputs, "activation"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["attention", "attention, shared keys and values", "grouped"])
def test_moved_moments_are_those_of_the_moved_model(name):
    """As measured anew, though no batch was run again; also of a point with several heads."""
    model, inputs = built(name)
    graph = trace(model, inputs)
    other = trace(shuffled(model, graph), inputs)
    data = list(inputs.split(50))
    one, two = profile_models([graph, other], data, **PROFILED, moments=True)
    layers = tuple(range(len(graph.layers)))
    _, moved, orders = order_heads(correspond(one.traced, two.traced, layers), one, two)
    assert orders
    assert moved.batch_sizes == two.batch_sizes == tuple(len(batch) for batch in data)
    changed = 0
    for batch, before, again in zip(
        moved.moments, two.moments, observed_moments(moved.traced, data), strict=True
    ):
        assert batch.keys() == again.keys()
        for node, pair in batch.items():
            for ours, theirs, old in zip(pair, again[node], before[node], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
                changed += not torch.allclose(old, theirs, rtol=1e-3, atol=1e-3)
    assert changed


def test_the_naive_average_leaves_heads_where_they_are():
    model, inputs = built("attention")
    graph = trace(model, inputs)
    models = [model, shuffled(model, graph), shuffled(model, graph, 4)]
    for count in (2, 3):
        result = fuse(models[:count], inputs, calibration="none")
        assert result.parents[1].head_orders
        averaged = naive_average(result.problem).state_dict()
        for name, found in averaged.items():
            every = torch.stack([one.state_dict()[name] for one in models[:count]])
            torch.testing.assert_close(found, every.mean(0))


def test_pairs_are_matched_like_one():
    model, inputs = built("attention")
    other = shuffled(model, trace(model, inputs))
    (result,) = clafusion.fuse_pairs({"one": model, "other": other}, inputs)
    expected = fuse([model, other], inputs).model.state_dict()
    for name, one in result.state.items():
        assert torch.equal(one, expected[name]), name


def test_reports_name_the_layers_whose_heads_move():
    from clafusion.reports.tables import model_summary

    model, inputs = built("attention")
    graph = trace(model, inputs)
    assert "heads        exchangeable as wholes: 4 in layers.0, 4 in layers.1" in model_summary(
        graph
    )
    shown = clafusion.summary(fuse([model, shuffled(model, graph)], inputs))
    assert "reordered in layers.0, layers.1" in shown
    assert "heads" not in clafusion.summary(fuse([model, model], inputs))
