"""Zipping networks: groups against a plain algorithm, and fusions known by construction."""

import math

import numpy as np
import pytest
import torch

import clafusion
from clafusion import (
    Deeper,
    FusionConfig,
    InputError,
    LeastSquares,
    Matching,
    Merging,
    Shallower,
    StructureError,
    Zip,
    align,
    fuse,
)
from clafusion.matching.zipping import zip_channels, zip_plans
from clafusion.profiling.statistics import standardised
from clafusion.transport.plan import TransportPlan
from clafusion.transport.solve import solve_transport
from tests.support import networks
from tests.support.assertions import assert_same_function, assert_same_logits
from tests.support.data import IMAGES, MODELS, PAIRS, VECTORS
from tests.support.networks import output
from tests.support.transformers import transformer


def zip_ref(costs, sizes, num_groups, budget, home):
    """Unite the two nearest groups that may be united, comparing all channels of all groups."""
    network = [i for i, size in enumerate(sizes) for _ in range(size)]
    groups = [[i] for i in range(len(costs))]
    left = [math.floor(budget * size + 1e-9) + max(size - num_groups, 0) for size in sizes]

    by_home = home is not None and not any(left)  # all others join one of the home's channels

    def merges(one, other):
        holds = [{network[i] for i in group} for group in (one, other)]
        return [int(i in holds[0] and i in holds[1]) for i in range(len(sizes))]

    while len(groups) > num_groups:
        options = [
            (max(costs[i, j] for i in one for j in other), p, q)
            for p, one in enumerate(groups)
            for q, other in enumerate(groups)
            if p < q
            and all(need <= have for need, have in zip(merges(one, other), left, strict=True))
            and (not by_home or any(network[i] == home for i in one + other))
        ]
        if not options:  # nothing else can be united: within networks, then
            left, by_home = [len(costs)] * len(sizes), False
            continue
        _, p, q = min(options)
        used = merges(groups[p], groups[q])
        left = [have - need for have, need in zip(left, used, strict=True)]
        groups[p] = groups[p] + groups.pop(q)
    return {frozenset(group) for group in groups}


def zipping(budget, **options):
    return Matching(solver=Zip(budget), **options)


def random_costs(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return torch.from_numpy(np.sqrt(np.square(points[:, None] - points).sum(-1)))


def grouped(plans):
    both = torch.cat([plan.dense() for plan in plans]).numpy()
    return [frozenset(np.flatnonzero(column).tolist()) for column in both.T]


@pytest.mark.parametrize("sizes", [(9, 9), (14, 8), (5, 12), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 1.0])
def test_groups_are_those_of_the_plain_algorithm(sizes, budget):
    num_source, num_target = sizes
    for seed in range(5):
        costs = random_costs(sum(sizes), seed)
        plans = zip_channels(costs, sizes, num_target, budget=budget, home=1)
        assert [plan.shape for plan in plans] == [sizes, (num_target, num_target)]
        groups = grouped(plans)
        assert set(groups) == zip_ref(costs.numpy(), sizes, num_target, budget, 1)
        for plan in plans:
            size = plan.shape[0]
            torch.testing.assert_close(plan.row_sums, torch.full((size,), 1 / size).double())
        for position, group in enumerate(groups):  # by its first target channel
            of_target = [i - num_source for i in group if i >= num_source]
            assert min(of_target, default=position) == position


@pytest.mark.parametrize(
    ("sizes", "home"),
    [
        ((6, 6, 6), 0),
        ((4, 9, 7), 1),
        ((9, 3, 5), 2),
        ((3, 1, 2), 1),
        ((5, 5, 5, 5), 3),
        ((4, 8, 6), None),
        ((7, 7, 7), None),
    ],
)
@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_three_and_more_networks_are_zipped_as_by_the_plain_algorithm(sizes, home, budget):
    num_groups = 5 if home is None else sizes[home]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    for seed in range(4):
        costs = random_costs(sum(sizes), seed)
        plans = zip_channels(costs, sizes, num_groups, budget=budget, home=home)
        assert [plan.shape for plan in plans] == [(size, num_groups) for size in sizes]
        groups = grouped(plans)
        assert set(groups) == zip_ref(costs.numpy(), sizes, num_groups, budget, home)
        for plan in plans:
            size = plan.shape[0]
            assert plan.entries.rows.sort().values.tolist() == list(range(size))
            torch.testing.assert_close(plan.row_sums, torch.full((size,), 1 / size).double())
        if home is None:  # the groups come as their first channels do
            assert [min(group) for group in groups] == sorted(min(group) for group in groups)
        for position, group in enumerate(groups if home is not None else []):
            own = range(firsts[home], firsts[home] + sizes[home])
            of_home = [i - firsts[home] for i in group if i in own]
            assert min(of_home, default=position) == position


def test_more_networks_than_channels_leave_one_group():
    plans = zip_channels(random_costs(5), (1, 1, 1, 1, 1), 1, budget=0.0, home=2)
    assert all(plan == TransportPlan.identity(1) for plan in plans)


def test_without_a_budget_every_channel_has_one_partner():
    costs = random_costs(40)
    plans = zip_channels(costs, (20, 20), 20, budget=0.0, home=1)
    source_plan, target_plan = (plan.dense() for plan in plans)
    assert torch.equal(target_plan, torch.eye(20, dtype=torch.float64) / 20)
    assert torch.equal((source_plan > 0).sum(0), torch.ones(20, dtype=torch.int64))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([20 + order, torch.arange(20, 40)])  # of the target's channels
    costs = costs[copies][:, copies]
    source_plan, _ = zip_channels(costs, (20, 20), 20, budget=0.0, home=1)
    assert torch.equal(source_plan.dense().argmax(1), order)


def test_without_a_budget_every_channel_has_a_partner_in_each_of_three():
    orders = [torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    copies = torch.cat(orders)
    costs = random_costs(20)[copies][:, copies]
    plans = zip_channels(costs, (20, 20, 20), 20, budget=0.0, home=1)
    plans = [plan.dense() for plan in plans]
    assert torch.equal(plans[1], torch.eye(20, dtype=torch.float64) / 20)
    for plan, order in zip(plans, orders, strict=True):
        assert torch.equal((plan > 0).sum(0), torch.ones(20, dtype=torch.int64))
        assert torch.equal(orders[1][plan.argmax(1)], order)


def both_halves(name):
    """Return two networks, and each with every channel copied."""
    if name == "mlp":
        halves = networks.mlp(12, 10, 7, 5, seed=1), networks.mlp(12, 10, 7, 5, seed=2)
    elif name == "mlp, other depth":
        halves = networks.mlp(12, 6, 6, 6, 5, seed=1), networks.mlp(12, 6, 5, seed=2)
    else:
        norm = name == "vgg, BatchNorm"
        halves = tuple(networks.vgg(1, 1, widths=(6, 5), norm=norm, seed=seed) for seed in (1, 2))
    return halves, [networks.widened(one, 2) for one in halves]


@pytest.mark.parametrize("calibration", ["none", "repair"])
@pytest.mark.parametrize("weight", [0.5, 0.2])
@pytest.mark.parametrize("name", ["mlp", "mlp, other depth", "vgg", "vgg, BatchNorm"])
def test_networks_whose_channels_are_all_there_twice_zip_to_their_ensemble(
    name, weight, calibration
):
    halves, models = both_halves(name)
    inputs = VECTORS if "mlp" in name else IMAGES
    wanted = (1 - weight) * output(halves[0], inputs) + weight * output(halves[1], inputs)
    scale = float(wanted.abs().max())
    weights, settings = [1 - weight, weight], {"calibration": calibration}
    result = fuse(models, inputs, weights, matching=zipping(0.5), **settings)
    found = output(result.model, inputs)
    if calibration == "repair":
        # Hidden channels are one network's alone and stay. The outputs are both networks', whose
        # mean deviation REPAIR gives them.
        found, wanted, scale = standardised(found), standardised(wanted), 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * scale)
    for matching in (Matching(), zipping(0.0)):
        other = fuse(models, inputs, weights, matching=matching, **settings).model
        found = output(other, inputs)
        found = standardised(found) if calibration == "repair" else found
        assert float((found - wanted).abs().max()) > 0.1 * scale


@pytest.mark.parametrize("calibration", ["none", "repair"])
@pytest.mark.parametrize("kind", ["mlp", "vgg", "vgg, BatchNorm"])
def test_three_networks_whose_channels_are_all_there_three_times_zip_to_their_ensemble(
    kind, calibration
):
    """A third of each network's copies have room in the result, and so has all that they know."""
    if kind == "mlp":
        parts, inputs = [networks.mlp(12, 8, 7, 5, seed=seed) for seed in (1, 2, 3)], VECTORS
    else:
        parts = [
            networks.vgg(1, 1, widths=(6, 5), norm="Norm" in kind, seed=seed) for seed in (1, 2, 3)
        ]
        inputs = IMAGES
    models, weights = [networks.widened(one, 3) for one in parts], [0.5, 0.3, 0.2]
    wanted = sum(weight * output(one, inputs) for weight, one in zip(weights, parts, strict=True))
    scale = float(wanted.abs().max())
    settings = {"calibration": calibration}
    result = fuse(models, inputs, weights, matching=zipping(2 / 3), **settings)
    found = output(result.model, inputs)
    if calibration == "repair":
        found, wanted, scale = standardised(found), standardised(wanted), 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * scale)
    other = fuse(models, inputs, weights, matching=zipping(0.0), **settings).model
    found = output(other, inputs)
    found = standardised(found) if calibration == "repair" else found
    assert float((found - wanted).abs().max()) > 0.1 * scale


@pytest.mark.parametrize("budget", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_permuted_copy_is_itself(name, budget):
    build, inputs = MODELS[name]
    model = build()
    copies = [networks.permuted_copy(model, inputs, seed) for seed in (3, 4)]
    for models in ([copies[0], model], [copies[0], model, copies[1]]):
        fused = fuse(models, inputs, matching=zipping(budget)).model
        assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.BatchNorm1d])
def test_channels_that_are_dead_behind_a_norm_find_each_other(norm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 10), torch.nn.ReLU(), norm(10), torch.nn.Linear(10, 5)
    )
    networks.randomise(model)
    with torch.no_grad():
        model[0].bias[[2, 5, 7]] = -100.0
    for seed in range(4):
        moved = networks.permuted_copy(model, VECTORS, seed)
        fused = fuse([moved, model], VECTORS, matching=zipping(0.0)).model
        assert_same_function(fused, model, VECTORS)


@pytest.mark.parametrize("architecture", ["ViT", "GPT-2", "ConvNeXt"])
def test_transformers_fused_with_themselves_are_themselves(architecture):
    model = transformer(architecture, 2, seed=0)
    inputs = torch.randint(0, 50, (60, 9)) if architecture == "GPT-2" else IMAGES[:60]
    fused = fuse([model, model], inputs, matching=zipping(0.2)).model
    assert_same_logits(fused, model, inputs)


@pytest.mark.parametrize(
    ("factors", "budget"), [((1, 2), 0.0), ((3, 1), 0.0), ((3, 2), 0.0), ((2, 3), 0.5)]
)
def test_copied_channels_zip_to_the_original_function(factors, budget):
    model = networks.mlp(12, 10, 7, 5)
    pair = [networks.widened(model, one) for one in factors]
    for calibration in ("none", "repair"):
        result = fuse(pair, VECTORS, matching=zipping(budget), calibration=calibration)
        assert_same_function(result.model, model, VECTORS)


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_budget_the_ends_of_the_weight_are_the_parents(name):
    deep, shallow, inputs = PAIRS[name]
    at_zero = fuse([deep, shallow], inputs, [1, 0], matching=zipping(0.0))
    at_one = fuse([deep, shallow], inputs, [0, 1], matching=zipping(0.0))
    assert_same_function(at_zero.model, deep, inputs)
    assert_same_function(at_one.model, shallow, inputs)


@pytest.mark.nightly
def test_networks_of_which_each_is_the_deeper_one_somewhere_are_zipped():
    first = networks.resnet(3, 1, shortcut="conv", seed=1)
    second = networks.resnet(1, 2, shortcut="conv", seed=2)
    third = networks.resnet(2, 2, shortcut="conv", seed=3)
    for models in ([first, second], [first, second, third]):
        for i, parent in enumerate(models):
            weights = [float(i == j) for j in range(len(models))]
            result = fuse(models, IMAGES, weights, matching=zipping(0.0))
            assert_same_function(result.model, parent, IMAGES)
        result = fuse(models, IMAGES, matching=zipping(0.3))
        assert torch.isfinite(output(result.model, IMAGES)).all()


@pytest.mark.parametrize("name", ["mlp", "vgg, BatchNorm", "resnet, 1x1"])
def test_without_a_budget_all_the_weight_on_one_of_three_is_that_one(name):
    deep, shallow, inputs = PAIRS[name]
    build = {
        "mlp": lambda: networks.mlp(12, 9, 9, 9, 5, seed=4),
        "vgg, BatchNorm": lambda: networks.vgg(2, 2, seed=4),
        "resnet, 1x1": lambda: networks.resnet(2, 2, shortcut="conv", seed=4),
    }[name]
    models = [shallow, deep, build()]
    for i, parent in enumerate(models):
        weights = [float(i == j) for j in range(3)]
        result = fuse(models, inputs, weights, matching=zipping(0.0))
        assert_same_function(result.model, parent, inputs)


@pytest.mark.parametrize("widths", [(9, 8), (14, 5), (6, 12)])
def test_weights_are_those_of_the_papers_merge_and_unmerge_matrices(widths):
    own = networks.mlp(12, 9, 8, 5, seed=1)
    others = [networks.mlp(12, *widths, 5, seed=2), networks.mlp(12, 7, 10, 5, seed=3)]
    for models, weights in (
        ([own, others[0]], [0.7, 0.3]),
        ([own, *others], [0.5, 0.3, 0.2]),
    ):
        assert_papers_matrices(models, weights)


def assert_papers_matrices(models, shares):
    """The first network gives the structure: ``W = sum_p M_p W_p U_p``."""
    result = fuse(models, VECTORS, shares, matching=zipping(0.4), calibration="none")
    found = [one.detach().double().numpy() for one in result.model.parameters()]
    parents = [[one.detach().double().numpy() for one in model.parameters()] for model in models]
    by_name = {one.name: index for index, one in enumerate(result.problem.target.groups)}
    unmerge = [[np.eye(12)] * len(models)]
    merge = []
    for layer in ("0.weight", "2.weight"):
        index = by_name[layer]
        members = [(one.plans[index].dense().numpy() > 0).astype(float) for one in result.parents]
        unmerge.append(members)
        own = np.array(shares)[:, None] * np.array([one.any(0) for one in members])
        own /= own.sum(0)
        merge.append(
            [
                (share * one / np.maximum(one.sum(0), 1)).T
                for share, one in zip(own, members, strict=True)
            ]
        )
    merge.append([weight * np.eye(5) for weight in shares])
    assert any(not one.any(0).all() for group in unmerge[1:] for one in group)  # some stay alone
    for layer, (merges, unmerges) in enumerate(zip(merge, unmerge, strict=True)):
        weights = [state[2 * layer] for state in parents]
        biases = [state[2 * layer + 1] for state in parents]
        wanted = sum(m @ w @ u for m, w, u in zip(merges, weights, unmerges, strict=True))
        np.testing.assert_allclose(found[2 * layer], wanted, rtol=0, atol=1e-6)
        wanted = sum(m @ b for m, b in zip(merges, biases, strict=True))
        np.testing.assert_allclose(found[2 * layer + 1], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [Shallower(), Deeper(width="narrow"), Deeper()], ids=str)
@pytest.mark.parametrize("calibration", ["repair", "batchnorm"])
def test_blocks_without_a_partner_and_made_networks_are_zipped_too(target, calibration):
    deep = networks.resnet(3, 2, shortcut="conv", seed=1)
    shallow = networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=2)
    more = networks.resnet(2, 2, shortcut="conv", seed=3)
    settings = {"target": target, "matching": zipping(0.3), "calibration": calibration}
    for models in ([deep, shallow], [deep, shallow, more]):
        result = fuse(models, IMAGES, **settings)
        assert torch.isfinite(output(result.model, IMAGES)).all()
        for parent in result.parents:  # all move
            assert not parent.is_identity
            for plan, other in zip(parent.plans, parent.correspondence.groups, strict=True):
                assert (plan is None) == (other < 0)


@pytest.mark.parametrize("target", [Shallower(), Deeper(width="narrow"), Deeper()], ids=str)
def test_pairs_are_zipped_like_one(target):
    deep = networks.resnet(3, 2, shortcut="conv", seed=1)
    shallow = networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=2)
    models = {"deep": deep, "shallow": shallow}
    settings = {"target": target, "matching": zipping(0.3)}
    (found,) = clafusion.fuse_pairs(models, IMAGES, **settings)
    assert found.error is None
    for name, one in fuse(models, IMAGES, **settings).model.state_dict().items():
        assert torch.equal(found.state[name], one)


def test_covered_channels_are_those_into_which_something_moves():
    """And what counts there is the mean of the parents that move there: a plain computation."""
    models = [networks.mlp(12, width, 8, 5, seed=width) for width in (9, 6, 11)]
    weights = [0.5, 0.2, 0.3]
    result = fuse(models, VECTORS, weights, matching=zipping(0.4), calibration="none")
    found = result.model.state_dict()
    partly = 0
    for layer, index in (("0", 0), ("2", 1)):
        plans = [one.plans[index].dense() for one in result.parents]
        for channel in range(plans[0].size(1)):
            moving = [i for i, plan in enumerate(plans) if bool((plan[:, channel] > 0).any())]
            for i, parent in enumerate(result.parents):
                covered = parent.covered[index]
                assert (covered is None or bool(covered[channel])) == (i in moving)
            partly += len(moving) < 3
            total = sum(weights[i] for i in moving)
            bias = sum(
                weights[i] / total * float(models[i].state_dict()[f"{layer}.bias"][members].mean())
                for i in moving
                for members in [plans[i][:, channel] > 0]
            )
            assert float(found[f"{layer}.bias"][channel]) == pytest.approx(bias, abs=1e-6)
    assert partly
    for parent in result.parents:
        points = parent.correspondence.target_points
        for node, index in zip(list(points)[:2], (0, 1), strict=True):
            covered, expected = parent.covers(node), parent.covered[index]
            if all(one is None for one in parent.covered):
                assert covered is None
            else:
                every = torch.ones(len(points[node].groups), dtype=torch.bool)
                assert torch.equal(covered, every if expected is None else expected)


def test_a_result_wider_than_all_together_is_refused():
    models = [networks.mlp(12, 3, 5, seed=1), networks.mlp(12, 4, 5, seed=2)]
    message = r"cannot make 8 channels of '0.weight' from 3 \+ 4: use solver='auto'"
    target = clafusion.Like(networks.mlp(12, 8, 5))
    with pytest.raises(StructureError, match=message):
        fuse(models, VECTORS, target=target, matching=zipping(0.1))
    assert fuse(models * 2, VECTORS, target=target, matching=zipping(0.1)).model


def test_plans_of_sources_are_those_of_their_channels_side_by_side():
    from clafusion.targets.sources import sources_of
    from clafusion.targets.target import choose_target

    models = [networks.mlp(12, width, 5, seed=width) for width in (9, 6, 11)]
    config = FusionConfig(matching=zipping(0.3))
    aligned = align(models, VECTORS, config)
    sources = sources_of(choose_target(aligned, config), aligned)
    found = [plans[0] for plans in zip_plans(sources.sources, 0.3)]
    values = torch.cat([standardised(output(one[0], VECTORS)) for one in models], 1)
    costs = 1 - (values.T @ values / len(values)).double()
    assert set(grouped(found)) == zip_ref(costs.numpy(), (9, 6, 11), 9, 0.3, 0)


def test_what_does_not_go_with_zipping_is_refused():
    for budget in (-0.1, 1.1, "half", True, float("nan")):
        with pytest.raises(InputError, match=r"budget must be in \[0, 1\]"):
            Zip(budget=budget)
        given = {"solver": {"name": "zip", "budget": budget}}
        with pytest.raises(InputError, match=r"matching\.solver\.budget must be in \[0, 1\]"):
            FusionConfig(matching=given)
    for name, value in (("cost", "weights"), ("importance", "norm"), ("outputs", True)):
        with pytest.raises(InputError, match=f"solver 'zip' needs {name}="):
            Matching(solver="zip", **{name: value})
    zipped = Matching(solver="zip")
    for name, value in (("layer_weights", "sensitivity"), ("normalisation", "single")):
        with pytest.raises(InputError, match=rf"solver='zip' needs merging\.{name}="):
            FusionConfig(matching=zipped, merging=Merging(**{name: value}))
    for calibration in ("least_squares", LeastSquares(anchor=0.5)):
        with pytest.raises(InputError, match=r"does not go with .*'least_squares'.* chooses"):
            FusionConfig(matching=zipped, calibration=calibration)
    costs = random_costs(8)
    for solver in ("zip", Zip(0.5)):
        with pytest.raises(InputError, match="'zip' also compares the channels within"):
            solve_transport([costs], solver=solver)
    for wrong, sizes in (
        (costs[:, :5], (4, 4)),
        (costs, (8, 0)),
        (costs, (0, 8)),
        (costs, (4, 5)),
        (costs, (4, 3, 2)),
        (costs[0], (4, 4)),
    ):
        with pytest.raises(InputError, match="costs must be"):
            zip_channels(wrong, sizes, 4, budget=0.5)
    for wrong, home in ((0, None), (9, None), (5, 1)):
        with pytest.raises(InputError, match=f"num_groups must be .*; got {wrong}"):
            zip_channels(costs, (4, 4), wrong, budget=0.5, home=home)
    with pytest.raises(InputError, match="budget must be in"):
        zip_channels(costs, (4, 4), 4, budget=2.0)
    costs[1, 2] = torch.nan
    with pytest.raises(InputError, match="costs must be finite"):
        zip_channels(costs, (4, 4), 4, budget=0.5)


@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", "barycentre"])
def test_several_are_zipped_in_any_order(strategy):
    models = [networks.mlp(12, 9, 5, seed=seed) for seed in range(3)]
    settings = {"merging": strategy, "matching": zipping(0.2)}
    if strategy == "barycentre":
        settings["merging"] = {"strategy": {"name": "barycentre", "max_rounds": 2}}
        with pytest.warns(clafusion.ConvergenceWarning, match="after 2 round"):
            result = fuse(models, VECTORS, **settings)
        assert (result.rounds, result.converged) == (2, False)
    else:
        result = fuse(models, VECTORS, **settings)
    assert torch.isfinite(output(result.model, VECTORS)).all()
