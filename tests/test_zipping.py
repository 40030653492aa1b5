"""Zipping two networks: groups against a plain algorithm, and fusions known by construction."""

import math

import numpy as np
import pytest
import torch

from clafusion import (
    FusionConfig,
    InputError,
    fuse,
    fuse_many,
    fuse_models,
    trace,
)
from clafusion.matching.zipping import zip_channels
from clafusion.profiling.profile import standardised
from clafusion.transport.solve import solve_transport
from tests import networks
from tests.test_fuse import (
    IMAGES,
    MODELS,
    PAIRS,
    VECTORS,
    assert_same_function,
    output,
    transformer,
)


def zip_ref(costs, num_source, budget):
    """Unite the two nearest groups that may be united, comparing all channels of all groups."""
    num_target = len(costs) - num_source
    groups = [[i] for i in range(len(costs))]
    left = [
        math.floor(budget * num_source) + max(num_source - num_target, 0),
        math.floor(budget * num_target),
    ]

    def merges(one, other):
        holds = [{i >= num_source for i in group} for group in (one, other)]
        return [int(network in holds[0] and network in holds[1]) for network in (False, True)]

    while len(groups) > num_target:
        options = [
            (max(costs[i, j] for i in one for j in other), p, q)
            for p, one in enumerate(groups)
            for q, other in enumerate(groups)
            if p < q
            and all(need <= have for need, have in zip(merges(one, other), left, strict=True))
        ]
        _, p, q = min(options)
        used = merges(groups[p], groups[q])
        left = [have - need for have, need in zip(left, used, strict=True)]
        groups[p] = groups[p] + groups.pop(q)
    return {frozenset(group) for group in groups}


def random_costs(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return torch.from_numpy(np.sqrt(np.square(points[:, None] - points).sum(-1)))


def grouped(source_plan, target_plan):
    both = torch.cat([source_plan, target_plan]).numpy()
    return [frozenset(np.flatnonzero(column).tolist()) for column in both.T]


@pytest.mark.parametrize("sizes", [(9, 9), (14, 8), (5, 12), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 1.0])
def test_groups_are_those_of_the_plain_algorithm(sizes, budget):
    num_source, num_target = sizes
    for seed in range(5):
        costs = random_costs(sum(sizes), seed)
        plans = zip_channels(costs, num_source, budget=budget)
        assert [tuple(plan.shape) for plan in plans] == [sizes, (num_target, num_target)]
        groups = grouped(*plans)
        assert set(groups) == zip_ref(costs.numpy(), num_source, budget)
        for plan in plans:
            torch.testing.assert_close(
                plan.sum(1), torch.full((len(plan),), 1 / len(plan)).double()
            )
        for position, group in enumerate(groups):  # by its first target channel
            of_target = [i - num_source for i in group if i >= num_source]
            assert min(of_target, default=position) == position


def test_without_a_budget_every_channel_has_one_partner():
    costs = random_costs(40)
    source_plan, target_plan = zip_channels(costs, 20, budget=0.0)
    assert torch.equal(target_plan, torch.eye(20, dtype=torch.float64) / 20)
    assert torch.equal((source_plan > 0).sum(0), torch.ones(20, dtype=torch.int64))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([20 + order, torch.arange(20, 40)])  # of the target's channels
    source_plan, _ = zip_channels(costs[copies][:, copies], 20, budget=0.0)
    assert torch.equal(source_plan.argmax(1), order)


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
    settings = {"weight": weight, "calibration": calibration}
    result = fuse(*models, inputs, solver="zip", zip_budget=0.5, **settings)
    found = output(result.model, inputs)
    if calibration == "repair":
        # Hidden channels are one network's alone and stay. The outputs are both networks', whose
        # mean deviation REPAIR gives them.
        found, wanted, scale = standardised(found), standardised(wanted), 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * scale)
    for solver, budget in (("auto", 0.0), ("zip", 0.0)):
        other = fuse(*models, inputs, solver=solver, zip_budget=budget, **settings).model
        found = output(other, inputs)
        found = standardised(found) if calibration == "repair" else found
        assert float((found - wanted).abs().max()) > 0.1 * scale


@pytest.mark.parametrize("budget", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_permuted_copy_is_itself(name, budget):
    build, inputs = MODELS[name]
    model = build()
    graph = trace(model, inputs)
    permuted = networks.permuted(model, graph, networks.orders_of(graph))
    fused = fuse(permuted, model, inputs, solver="zip", zip_budget=budget).model
    assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("architecture", ["ViT", "GPT-2", "ConvNeXt"])
def test_transformers_fused_with_themselves_are_themselves(architecture):
    model = transformer(architecture, 2, seed=0)
    inputs = torch.randint(0, 50, (60, 9)) if architecture == "GPT-2" else IMAGES[:60]
    fused = fuse(model, model, inputs, solver="zip", zip_budget=0.2).model
    with torch.no_grad():
        found, wanted = fused(inputs).logits, model(inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("factors", "budget"), [((1, 2), 0.0), ((3, 1), 0.0), ((3, 2), 0.0), ((2, 3), 0.5)]
)
def test_copied_channels_zip_to_the_original_function(factors, budget):
    model = networks.mlp(12, 10, 7, 5)
    pair = [networks.widened(model, one) for one in factors]
    for calibration in ("none", "repair"):
        result = fuse(*pair, VECTORS, solver="zip", zip_budget=budget, calibration=calibration)
        assert_same_function(result.model, model, VECTORS)


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_budget_the_ends_of_the_weight_are_the_parents(name):
    deep, shallow, inputs = PAIRS[name]
    settings = {"solver": "zip", "zip_budget": 0.0}
    at_zero = fuse(deep, shallow, inputs, weight=0.0, **settings)
    at_one = fuse(deep, shallow, inputs, weight=1.0, **settings)
    assert_same_function(at_zero.model, deep, inputs)
    assert_same_function(at_one.model, shallow, inputs)


def test_networks_of_which_each_is_the_deeper_one_somewhere_are_zipped():
    first = networks.resnet(3, 1, shortcut="conv", seed=1)
    second = networks.resnet(1, 2, shortcut="conv", seed=2)
    for weight, parent in ((0.0, first), (1.0, second)):
        result = fuse(first, second, IMAGES, solver="zip", zip_budget=0.0, weight=weight)
        assert_same_function(result.model, parent, IMAGES)
    result = fuse(first, second, IMAGES, solver="zip", zip_budget=0.3)
    assert torch.isfinite(output(result.model, IMAGES)).all()


@pytest.mark.parametrize("widths", [(9, 8), (14, 5), (6, 12)])
def test_weights_are_those_of_the_papers_merge_and_unmerge_matrices(widths):
    deep, shallow = networks.mlp(12, 9, 8, 5, seed=1), networks.mlp(12, *widths, 5, seed=2)
    weight = 0.3  # the shallow network's
    result = fuse(
        deep, shallow, VECTORS, solver="zip", zip_budget=0.4, weight=weight, calibration="none"
    )
    found = [one.detach().double().numpy() for one in result.model.parameters()]
    parents = [
        [one.detach().double().numpy() for one in model.parameters()] for model in (shallow, deep)
    ]
    by_name = {one.name: index for index, one in enumerate(result.lifting.deep.groups)}
    unmerge = [[np.eye(12), np.eye(12)]]
    merge = []
    for layer in ("0.weight", "2.weight"):
        index = by_name[layer]
        members = [
            (plan.numpy() > 0).astype(float)
            for plan in (result.plans[index], result.target_plans[index])
        ]
        unmerge.append(members)
        shares = np.array([[weight], [1 - weight]]) * np.array([one.any(0) for one in members])
        shares /= shares.sum(0)
        merge.append(
            [
                (share * one / np.maximum(one.sum(0), 1)).T
                for share, one in zip(shares, members, strict=True)
            ]
        )
    merge.append([weight * np.eye(5), (1 - weight) * np.eye(5)])
    assert any(not one.any(0).all() for pair in unmerge[1:] for one in pair)  # some stay alone
    for layer, (merges, unmerges) in enumerate(zip(merge, unmerge, strict=True)):
        weights = [state[2 * layer] for state in parents]
        biases = [state[2 * layer + 1] for state in parents]
        wanted = sum(m @ w @ u for m, w, u in zip(merges, weights, unmerges, strict=True))
        np.testing.assert_allclose(found[2 * layer], wanted, rtol=0, atol=1e-6)
        wanted = sum(m @ b for m, b in zip(merges, biases, strict=True))
        np.testing.assert_allclose(found[2 * layer + 1], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"balance": "merge"}, {"width": "narrow"}, {}])
@pytest.mark.parametrize("calibration", ["repair", "batchnorm"])
def test_blocks_without_a_partner_and_made_networks_are_zipped_too(settings, calibration):
    deep = networks.resnet(3, 2, shortcut="conv", seed=1)
    shallow = networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=2)
    result = fuse(
        deep, shallow, IMAGES, solver="zip", zip_budget=0.3, calibration=calibration, **settings
    )
    assert torch.isfinite(output(result.model, IMAGES)).all()
    assert result.target_plans is not None
    (found,) = fuse_many(
        {"deep": deep, "shallow": shallow},
        IMAGES,
        solver="zip",
        zip_budget=0.3,
        calibration=calibration,
        **settings,
    )
    assert found.error is None
    for name, one in result.model.state_dict().items():
        assert torch.equal(found.state[name], one)


def test_what_does_not_go_with_zipping_is_refused():
    for budget in (-0.1, 1.1, "half", True, float("nan")):
        with pytest.raises(InputError, match=r"zip_budget must be in \[0, 1\]"):
            FusionConfig(zip_budget=budget)
    for name, value in (
        ("channel_cost", "weight"),
        ("importance", "norm"),
        ("normalisation", "single"),
        ("match_classifier", True),
        ("calibration", "least_squares"),
    ):
        named = value if name == "calibration" else name
        with pytest.raises(InputError, match=f"solver 'zip' .*{named}"):
            FusionConfig(solver="zip", **{name: value})
    costs = random_costs(8)
    with pytest.raises(InputError, match="'zip' also compares the channels within"):
        solve_transport([costs], solver="zip")
    models = [networks.mlp(12, 9, 5, seed=seed) for seed in range(3)]
    with pytest.raises(InputError, match="solver='zip' needs method='iterative'"):
        fuse_models(models, VECTORS, method="many_to_one", solver="zip")
    for wrong, count in ((costs[:, :5], 4), (costs, 8), (costs, 0)):
        with pytest.raises(InputError, match="costs must be"):
            zip_channels(wrong, count, budget=0.5)
    with pytest.raises(InputError, match="budget must be in"):
        zip_channels(costs, 4, budget=2.0)
    costs[1, 2] = torch.nan
    with pytest.raises(InputError, match="costs must be finite"):
        zip_channels(costs, 4, budget=0.5)
