"""REPAIR: whatever statistics are asked for, the network gets them."""

import copy

import pytest
import torch
from torch import nn

from clafusion import InputError, fuse, trace
from clafusion.calibration.repair import MomentGoals, moment_goals, repair
from clafusion.calibration.scales import with_equal_scales
from clafusion.merging.mean import average
from clafusion.profiling.moments import Moments, channel_moments
from clafusion.weights.build import with_state
from tests.support.assertions import assert_same_function
from tests.support.networks import Matrices, mlp, output, randomise, resnet, vgg

VECTORS = torch.randn(250, 12, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(80, 5, 12, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))

NETWORKS = {
    "mlp": (lambda seed=0: mlp(12, 9, 8, 7, 5, seed=seed), VECTORS),
    "vgg": (lambda seed=0: vgg(2, 2, norm=False, seed=seed), IMAGES),
    "vgg, BatchNorm": (lambda seed=0: vgg(2, 1, seed=seed), IMAGES),
    "resnet": (lambda seed=0: resnet(2, 2, shortcut="conv", seed=seed), IMAGES),
    "matrices": (lambda seed=0: Matrices(2, 9, seed=seed, biased=True), SEQUENCES),
}


def points_of(graph):
    return {one.node: one for layer in graph.layers for one in layer.calibration_points}


def statistics(graph, state, inputs):
    """Return mean and deviation of every channel at every calibration point, in float64."""
    points, found = points_of(graph), {}

    def observe(node, value):
        if node.name in points:
            axis = points[node.name].axis
            flat = value.detach().double().movedim(axis, -1).flatten(0, -2)
            found[node.name] = flat.mean(0), flat.std(0, correction=0)
        return value

    with torch.no_grad():
        graph.run((inputs,), state=state, replace=observe)
    return found


def arbitrary(graph, seed=5):
    """Return any goals at all."""
    draw = torch.Generator().manual_seed(seed)
    return {
        node: (
            torch.randn(len(one.groups), generator=draw).double(),
            0.2 + 2 * torch.rand(len(one.groups), generator=draw).double(),
        )
        for node, one in points_of(graph).items()
    }


def assert_meets(found, goals, can_shift=True):
    for node, (mean, deviation) in goals.items():
        torch.testing.assert_close(found[node][1], deviation, rtol=2e-4, atol=1e-6)
        if can_shift:
            torch.testing.assert_close(found[node][0], mean, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_arbitrary_goals_are_met(name):
    build, inputs = NETWORKS[name]
    graph = trace(build(), inputs)
    goals = arbitrary(graph)
    before = statistics(graph, graph.state(), inputs)
    assert all(not torch.allclose(before[node][1], goals[node][1], rtol=0.05) for node in goals)
    state = repair(graph, graph.state(), inputs, MomentGoals((goals,), goals))
    assert_meets(statistics(graph, state, inputs), goals)
    # As a module, too, whose weights are those of the state.
    model = with_state(graph.model, state, graph.aliases)
    assert_meets(statistics(trace(model, inputs), trace(model, inputs).state(), inputs), goals)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_own_statistics_change_nothing(name):
    build, inputs = NETWORKS[name]
    graph = trace(build(), inputs)
    own = statistics(graph, graph.state(), inputs)
    state = repair(graph, graph.state(), inputs, MomentGoals((own,), own))
    found = output(with_state(graph.model, state, graph.aliases), inputs)
    wanted = output(graph.model, inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def test_goals_of_some_layers_leave_the_others_alone():
    build, inputs = NETWORKS["mlp"]
    graph = trace(build(), inputs)
    every = arbitrary(graph)
    (_, second, *_), points = list(every), points_of(graph)
    goals = {second: every[second]}
    state = repair(graph, graph.state(), inputs, MomentGoals((goals,), goals))
    assert_meets(statistics(graph, state, inputs), goals)
    changed = {name for name, one in graph.state().items() if not torch.equal(one, state[name])}
    assert changed == {points[second].weight, points[second].bias}


def test_without_a_bias_only_deviations_can_be_met():
    model = mlp(12, 9, 8, 5)
    for layer in (0, 2, 4):
        model[layer].bias = None
    graph = trace(model, VECTORS)
    goals = arbitrary(graph)
    state = repair(graph, graph.state(), VECTORS, MomentGoals((goals,), goals))
    found = statistics(graph, state, VECTORS)
    assert_meets(found, goals, can_shift=False)
    assert not torch.allclose(found["linear"][0], goals["linear"][0], atol=0.1)


def test_a_constant_channel_is_shifted_and_not_blown_up():
    model = mlp(12, 9, 5)
    with torch.no_grad():
        model[0].weight[3] = 0.0
    graph = trace(model, VECTORS)
    goals = arbitrary(graph)
    state = repair(graph, graph.state(), VECTORS, MomentGoals((goals,), goals))
    mean, deviation = statistics(graph, state, VECTORS)["linear"]
    torch.testing.assert_close(mean, goals["linear"][0], rtol=2e-4, atol=2e-4)
    assert float(deviation[3]) < 1e-6
    others = [i for i in range(9) if i != 3]
    torch.testing.assert_close(deviation[others], goals["linear"][1][others], rtol=2e-4, atol=0)
    assert not state["0.weight"][3].any()


@pytest.mark.parametrize("name", NETWORKS)
def test_goals_of_several_batches_are_met_over_all_of_them(name):
    """Exactly by the first layer, whose inputs are the same however the layers are repaired."""
    build, inputs = NETWORKS[name]
    graph = trace(build(), inputs)
    data = list(inputs.split(50))
    of_batches = [arbitrary(graph, seed=i) for i in range(len(data))]
    overall = {}
    for node in of_batches[0]:
        total = Moments()
        for batch, goals in zip(data, of_batches, strict=True):
            total.add(len(batch), *goals[node])
        overall[node] = total.result()
    told = []
    state = repair(
        graph,
        graph.state(),
        data,
        MomentGoals(tuple(of_batches), overall),
        progress=lambda *one: told.append(one),
    )
    first = next(iter(overall))
    assert_meets(statistics(graph, state, inputs), {first: overall[first]})
    done = [sum(len(one) for one in data[: i + 1]) for i in range(len(data))]
    assert told == [("calibrate", count) for count in done]


def test_goals_of_other_batches_are_refused():
    graph = trace(mlp(12, 9, 5), VECTORS)
    goals = arbitrary(graph)
    for count, has in ((1, "more"), (2, "more"), (4, "fewer")):
        with pytest.raises(InputError, match=f"goals are of {count} batches, data has {has}"):
            repair(graph, graph.state(), VECTORS.split(100), MomentGoals((goals,) * count, goals))


# --- the goals of a fusion ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_the_goals_of_a_fusion_are_the_parents_weighted_mean(count):
    models = [mlp(12, 9, 8, 5), mlp(12, 11, 6, 5, seed=1), mlp(12, 7, 10, 5, seed=2)][:count]
    weights = [0.5, 0.2, 0.3] if count == 3 else [0.6, 0.4]
    data = [VECTORS[:150], VECTORS[150:]]
    problem = fuse(models, data, weights, calibration="repair", assessment="none").problem
    goals = moment_goals(problem)
    assert len(goals.batches) == 2
    for inputs, found in ((data[0], goals.batches[0]), (data[1], goals.batches[1])):
        check_goals(problem, inputs, found, weights)
    check_goals(problem, VECTORS, goals.overall, weights)


def check_goals(problem, inputs, found, weights):
    own = [statistics(one.traced, one.traced.state(), inputs) for one in problem.parents]
    assert list(found) == ["linear", "linear_1", "linear_2"]
    for index, node in enumerate(found):
        for kind in (0, 1):
            expected = 0
            for parent, weight, of in zip(problem.parents, weights, own, strict=True):
                value = of[node][kind]
                if index < 2:  # the outputs are never moved
                    plan = parent.plans[index].dense()
                    value = value @ (plan / plan.sum(0))
                expected = expected + weight * value
            torch.testing.assert_close(found[node][kind], expected, rtol=1e-5, atol=1e-6)


def test_a_parent_writes_nothing_in_a_block_that_it_lacks():
    models = [
        resnet(2, 1, shortcut="conv"),
        resnet(1, 1, shortcut="conv", seed=1),
        resnet(2, 1, shortcut="conv", seed=2),
    ]
    result = fuse(models, IMAGES, [0.5, 0.2, 0.3], calibration="repair", assessment="none")
    goals = moment_goals(result.problem).overall
    lacking = result.parents[1].correspondence
    (layer,) = (one for one in lacking.target.layers if lacking.layer_map[one.index] < 0)
    inner, last = (one.node for one in layer.calibration_points)
    own = [statistics(one.traced, one.traced.state(), IMAGES) for one in result.parents]
    inside, written = [], []
    for i in (0, 2):
        parent = result.parents[i]
        correspondence = parent.correspondence
        for node, into in ((inner, inside), (last, written)):
            source = correspondence.points[node]
            value = torch.stack(own[i][source.node])
            plan = parent.plans[int(correspondence.target_points[node].groups[0])].dense()
            into.append(value @ (plan / plan.sum(0)))
    expected = (0.5 * inside[0] + 0.3 * inside[1]) / 0.8  # of those that have it
    torch.testing.assert_close(torch.stack(goals[inner]), expected, rtol=1e-4, atol=1e-5)
    expected = 0.5 * written[0] + 0.3 * written[1]
    torch.testing.assert_close(torch.stack(goals[last]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_has_its_parents_mean_statistics(name):
    build, inputs = NETWORKS[name]
    models = [build(seed) for seed in (0, 1, 2)]
    result = fuse(models, inputs, [0.5, 0.3, 0.2], calibration="repair", assessment="none")
    problem = result.problem
    goals = moment_goals(problem)
    state = trace(result.model, inputs).state()
    assert_meets(statistics(problem.target, state, inputs), goals.overall)
    before = statistics(problem.target, average(problem), inputs)
    ratios = [before[node][1] / goals.overall[node][1] for node in goals.overall]
    assert float(torch.cat(ratios).median()) < 0.9  # which averaging had shrunk


# --- a norm behind the activation ---------------------------------------------------------------


def norm_behind(width, seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv1d(2, width, 8, padding=4),
        activation(),
        nn.BatchNorm1d(width),
        nn.MaxPool1d(2),
        nn.Conv1d(width, 2 * width, 3, padding=1),
        nn.MaxPool1d(2),
        activation(),
        nn.Dropout(),
        nn.BatchNorm1d(2 * width),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 6),
        activation(),
        nn.BatchNorm1d(6),
        nn.Linear(6, 5),
    )
    return randomise(model, seed).eval()


def with_other_scales(model, seed=0):
    """Multiply what each layer before an activation and a norm puts out; the norm undoes it."""
    changed, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    layers = [one for one in changed if isinstance(one, (nn.Conv1d, nn.Linear))][:-1]
    norms = [one for one in changed if isinstance(one, nn.BatchNorm1d)]
    with torch.no_grad():
        for layer, norm in zip(layers, norms, strict=True):
            factor = 10 ** (2 * torch.rand(len(layer.bias), generator=draw) - 0.5)
            layer.weight *= factor.view(-1, *[1] * (layer.weight.dim() - 1))
            layer.bias *= factor
            norm.running_mean *= factor
            norm.running_var.copy_((norm.running_var + norm.eps) * factor**2 - norm.eps)
    return changed


SIGNALS = torch.randn(200, 2, 40, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.PReLU])
@pytest.mark.parametrize("widths", [(5, 5), (6, 3), (3, 6), (5, 3)], ids=str)
def test_scales_that_a_norm_behind_the_activation_undoes_count_for_nothing(widths, activation):
    first, second = (norm_behind(width, i, activation) for i, width in enumerate(widths))
    scaled = with_other_scales(second)
    wanted = output(second, SIGNALS)
    bound = 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(output(scaled, SIGNALS), wanted, rtol=0, atol=bound)
    found = [
        output(fuse([first, one], SIGNALS, [0.6, 0.4], calibration="repair").model, SIGNALS)
        for one in (second, scaled)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-3 * float(found[0].abs().max()))
    for weights, parent in (([1, 0], first), ([0, 1], second)):
        if widths[0] % widths[1] == 0 or weights[0] == 1:
            fused = fuse([first, scaled], SIGNALS, weights, calibration="repair").model
            assert_same_function(fused, parent, SIGNALS, "repair")


def test_a_copy_with_other_scales_is_the_network_itself():
    model = norm_behind(5)
    for models in ([model, with_other_scales(model)], [with_other_scales(model), model]):
        fused = fuse(models, SIGNALS, calibration="repair").model
        assert_same_function(fused, model, SIGNALS, "repair")


@pytest.mark.parametrize("tokens", [6, 16])
def test_a_norm_over_tokens_undoes_no_scale_of_channels(tokens):
    class OverTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(tokens)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.norm(torch.relu(self.enter(x))).mean(1))

    data = torch.randn(60, tokens, 8, generator=torch.Generator().manual_seed(0))
    models = [randomise(OverTokens(), seed).eval() for seed in (0, 1)]
    problem = fuse(models, data, calibration="none").problem
    assert with_equal_scales(problem) is problem
    fused = fuse(models, data, [0, 1], calibration="repair").model
    assert_same_function(fused, models[1], data, "repair")


def test_scales_of_other_networks_stay():
    for name in NETWORKS:
        build, inputs = NETWORKS[name]
        problem = fuse([build(), build(1)], inputs, calibration="none").problem
        assert with_equal_scales(problem) is problem


def test_moments_of_a_batch_are_of_all_its_positions():
    value = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    mean, deviation = channel_moments(value, 2)
    flat = value.double().reshape(12, 5)
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(deviation, flat.std(0, correction=0))
    conv = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    graph = trace(conv, IMAGES)
    goals = arbitrary(graph)
    state = repair(graph, graph.state(), IMAGES, MomentGoals((goals,), goals))
    assert_meets(statistics(graph, state, IMAGES), goals)
