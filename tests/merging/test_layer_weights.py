"""Each layer's weights of the networks: known by construction, and where they have to arrive."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from clafusion import (
    Deeper,
    FusionConfig,
    InputError,
    LeastSquares,
    Like,
    Matching,
    MergeWeights,
    Merging,
    Shallower,
    average,
    fuse,
    profile,
    stages,
    trace,
)
from clafusion.calibration.least_squares import regress_anchored
from clafusion.correspondence.moving import move_values
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.merging.layer_weights import weigh_layers
from clafusion.profiling.importance import layer_sensitivities, sensitivities
from clafusion.profiling.moments import observed_moments
from clafusion.weights.build import with_state
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.data import CALIBRATIONS, IMAGES, MODELS, PAIRS, VECTORS
from tests.support.networks import Labels
from tests.support.results import identity_parent, moved_parent

OWN = {"merging": Merging(layer_weights="sensitivity")}


def shared(result):
    """Return the weights of the layers that all parents have."""
    return [one for one in result.layer_weights if None not in one]


def deep_weights(result):
    """Return the first parent's weight of each layer that all parents have."""
    return [one[0] for one in shared(result)]


def sensitivities_ref(model, inputs):
    """Return each layer's sum of |weight * gradient| of an MLP, in float64, by the chain rule."""
    layers = [one for one in model if isinstance(one, torch.nn.Linear)]
    weights = [one.weight.detach().double().numpy() for one in layers]
    biases = [one.bias.detach().double().numpy() for one in layers]
    values = [inputs.double().numpy()]
    for w, b in zip(weights, biases, strict=True):
        values.append(values[-1] @ w.T + b)
        if w is not weights[-1]:
            values[-1] = np.maximum(values[-1], 0)
    behind = 2 * values[-1]
    found = []
    for w, b, x in zip(weights[::-1], biases[::-1], values[-2::-1], strict=True):
        found.append(np.abs(w * (behind.T @ x)).sum() + np.abs(b * behind.sum(0)).sum())
        behind = (behind @ w) * (x > 0)
    return np.array(found[::-1])


def weights_ref(weight, deep, shallow):
    a, b = deep / deep.sum(), shallow / shallow.sum()
    return weight * a / ((1 - weight) * b + weight * a)


def reweighed(problem, *own):
    """Return a problem with weights of 0.5, and each parent's own ones for some parameters."""
    parents = [
        replace(one, weights=MergeWeights(0.5, of))
        for one, of in zip(problem.parents, own or ({}, {}), strict=True)
    ]
    return replace(problem, parents=tuple(parents))


def silenced(model, block):
    """Make a residual block write nothing: the outputs then depend on no parameter of it."""
    model = copy.deepcopy(model)
    last = dict(model.named_modules())[f"blocks.{block}.bn2"]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return model


def test_weights_are_those_of_the_formula():
    deep, shallow = networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1)
    result = fuse([deep, shallow], VECTORS, [0.7, 0.3], **OWN, assessment="none")
    partner = result.alignment.deep_to_shallow
    found = [sensitivities_ref(model, VECTORS) for model in (deep, shallow)]
    hidden = [i for i, k in enumerate(partner[:-1]) if k >= 0]
    # Of the hidden layers that both have; the deep network is the first, with the weight 0.7.
    expected = weights_ref(0.7, found[0][hidden], found[1][[partner[i] for i in hidden]])
    np.testing.assert_allclose(deep_weights(result), [*expected, 0.7], rtol=1e-5)
    for (one, other), k in zip(result.layer_weights, partner, strict=True):
        assert other == (None if k < 0 else pytest.approx(1 - one, abs=1e-15))
        assert k >= 0 or one == 0.7
    assert np.abs(expected - 0.7).max() > 1e-3
    swapped = fuse([shallow, deep], VECTORS, [0.3, 0.7], **OWN, assessment="none")
    assert [one[::-1] for one in swapped.layer_weights] == list(result.layer_weights)


def test_weights_of_three_are_those_of_the_formula():
    models = [networks.mlp(12, *widths, 5, seed=seed) for seed, widths in enumerate([(9, 8)] * 3)]
    given = np.array([0.5, 0.2, 0.3])
    result = fuse(models, VECTORS, given.tolist(), **OWN, assessment="none")
    found = np.array([sensitivities_ref(model, VECTORS)[:2] for model in models])
    wanted = given[:, None] * found / found.sum(1, keepdims=True)
    wanted /= wanted.sum(0)
    np.testing.assert_allclose(np.array(result.layer_weights[:2]).T, wanted, rtol=1e-5)
    assert result.layer_weights[2] == tuple(given)
    assert np.abs(wanted - given[:, None]).max() > 1e-3
    rolled = fuse([*models[1:], models[0]], VECTORS, [0.2, 0.3, 0.5], **OWN, assessment="none")
    for one, other in zip(rolled.layer_weights, result.layer_weights, strict=True):
        assert (one[2], *one[:2]) == pytest.approx(other, rel=1e-12)


def test_a_layer_of_two_among_three_weighs_what_both_do():
    """The third lacks it, and has the layer's weight in no one's place."""
    models = [networks.resnet(2, 2), networks.resnet(2, 2, seed=1), networks.resnet(2, 1, seed=2)]
    result = fuse(models, IMAGES, [0.5, 0.2, 0.3], **OWN)
    lacking = [one for one in result.layer_weights if one[2] is None]
    assert len(lacking) == 1
    assert sum(lacking[0][:2]) == pytest.approx(0.7, abs=1e-12)
    assert lacking[0][0] != 0.5
    for one in shared(result):
        assert sum(one) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_layers_sensitivity_is_the_sum_over_its_parameters(name):
    build, inputs = MODELS[name]
    graph = trace(build(), inputs)
    products = sensitivities(graph, inputs)
    found = layer_sensitivities(graph, products)
    assert found.shape == (len(graph.layers),)
    assert float(found.min()) > 0
    # In these networks every parameter is of one layer.
    total = sum(float(one.double().sum()) for one in products.values())
    assert float(found.sum()) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_equal_networks_have_the_weight_itself_everywhere(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    result = fuse([model, model], inputs, [0.7, 0.3], calibration=calibration, **OWN)
    assert set(result.layer_weights) == {(0.7, 0.3)}
    uniform = fuse([model, model], inputs, [0.7, 0.3], calibration=calibration)
    assert set(uniform.layer_weights) == {(0.7, 0.3)}
    assert len(uniform.layer_weights) == len(uniform.problem.target.layers)
    for key, tensor in uniform.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[key])


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_has_the_same_weights_and_fuses_to_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    graph = trace(model, inputs)
    permuted = networks.permuted(model, graph, networks.orders_of(graph))
    result = fuse([permuted, model], inputs, [0.7, 0.3], calibration=calibration, **OWN)
    # Float32 gradients, summed in another order.
    assert deep_weights(result) == pytest.approx([0.7] * len(graph.layers), abs=1e-4)
    assert_same_function(result.model, permuted, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", ["mlp", "resnet, padded"])
def test_weights_0_and_1_do_not_change_a_byte(name, calibration):
    deep, shallow, inputs = PAIRS[name]
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        result = fuse([deep, shallow], inputs, weights, calibration=calibration, **OWN)
        assert set(shared(result)) == {weights}
        wanted = fuse([deep, shallow], inputs, weights, calibration=calibration).model.state_dict()
        for key, tensor in result.model.state_dict().items():
            assert torch.equal(tensor, wanted[key]), key


def test_a_layer_on_which_no_output_depends_is_the_other_networks_alone():
    first, second = networks.resnet(2, 1), networks.resnet(2, 1, seed=1)
    for models, weights in (
        ((silenced(first, 1), second), (0.0, 1.0)),
        ((first, silenced(second, 1)), (1.0, 0.0)),
    ):
        result = fuse(models, IMAGES, [0.6, 0.4], calibration="none", **OWN)
        layers = result.problem.target.layers
        names = [layer.name for layer in layers]
        silent = names.index("blocks.1")
        assert result.layer_weights[silent] == weights
        assert result.layer_weights[-1] == (0.6, 0.4)  # of the outputs
        assert all(0.0 < one < 1.0 for i, one in enumerate(deep_weights(result)) if i != silent)
        wanted = (identity_parent(result) if weights[0] else moved_parent(result)).state()
        made = result.model.state_dict()
        for name in layers[silent].parameters:
            if made[name].is_floating_point():
                assert torch.equal(made[name], wanted[name].to(made[name])), name


def test_no_sensitivity_at_all_counts_as_equal_ones():
    model = networks.mlp(12, 9, 5)
    result = fuse([model, model], VECTORS, [0.3, 0.7])
    nothing = torch.zeros(2, dtype=torch.float64)
    for other in (nothing, nothing + 1):
        problem = weigh_layers(with_sensitivities(result.problem, nothing, other))
        assert replace(result, problem=problem).layer_weights == ((0.3, 0.7), (0.3, 0.7))


def with_sensitivities(problem, *given):
    parents = [
        replace(one, profile=replace(one.profile, sensitivity=of))
        for one, of in zip(problem.parents, given, strict=True)
    ]
    return replace(problem, parents=tuple(parents))


def test_a_parameter_of_two_layers_keeps_the_weight():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = networks.mlp(12, 9, 9, 9, 5)
            self.layers[4].weight = self.layers[2].weight

        def forward(self, x):
            return self.layers(x)

    first, second = Tied().eval(), Tied().eval()
    networks.randomise(second, seed=1)
    result = fuse([first, second], VECTORS, [0.6, 0.4], calibration="none", **OWN)
    moved, own = moved_parent(result).state(), identity_parent(result).state()
    weight = result.layer_weights[1][0]
    assert abs(weight - 0.6) > 1e-3
    made = result.model.state_dict()
    for name, wanted in (("layers.2.weight", 0.6), ("layers.2.bias", weight)):
        expected = torch.lerp(moved[name].double(), own[name].double(), wanted)
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_repair_meets_the_moments_of_each_layers_own_weights():
    data = IMAGES  # one batch, for whose statistics it is exact
    first, second = networks.resnet(2, 1), silenced(networks.resnet(2, 1, seed=1), 1)
    result = fuse([first, second], data, [0.6, 0.4], calibration="repair", **OWN)
    weights = deep_weights(result)
    assert len({f"{one:.2f}" for one in weights}) > 2
    own, other_parent = identity_parent(result), moved_parent(result)
    graphs = own.traced, other_parent.traced, trace(result.model, data)
    ((of_own,), (of_other,), (of_fused,)) = (observed_moments(one, data) for one in graphs)
    for layer, made, weight in zip(graphs[0].layers, graphs[2].layers, weights, strict=True):
        for point, found in zip(layer.calibration_points, made.calibration_points, strict=True):
            other = other_parent.correspondence.points[point.node]
            values = torch.stack(of_other[other.node])
            moved = move_values(
                values, other_parent.correspondence, other_parent.plans, point, other
            )
            wanted = weight * torch.stack(of_own[point.node]) + (1 - weight) * moved
            bound = 1e-4 * float(wanted.abs().max())
            torch.testing.assert_close(
                torch.stack(of_fused[found.node]), wanted, rtol=1e-3, atol=bound
            )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_least_squares_aims_at_each_layers_own_weights(weight):
    """A layer with all the weight of one network puts out what that one does."""
    models = [networks.mlp(12, 9, 8, 5), networks.mlp(12, 9, 8, 5, seed=1)]
    result = fuse(models, VECTORS, calibration="none")
    names = result.problem.target.layers[0].parameters
    problem = reweighed(
        result.problem, dict.fromkeys(names, weight), dict.fromkeys(names, 1.0 - weight)
    )
    state = regress_anchored(problem, VECTORS, LeastSquares(anchor=0.0)).state
    wanted = result.parents[0 if weight else 1].traced.state()
    made, other = state["0.weight"], wanted["0.weight"]
    # The channels of that network alone, in any order: each is one of its own.
    nearest = torch.cdist(made, other).min(1)
    assert float(nearest.values.max()) < 1e-4
    assert len(set(nearest.indices.tolist())) == len(other)
    equal = reweighed(result.problem)
    uniform = regress_anchored(equal, VECTORS, LeastSquares(anchor=0.0)).state
    assert float(torch.cdist(uniform["0.weight"], other).min(1).values.max()) > 0.1


def test_least_squares_gives_a_residual_stream_the_weight():
    """The sums on a stream are the work of all layers: no layer's own weights are theirs."""
    model = networks.resnet(2, 1)
    shifted, halfway = copy.deepcopy(model), copy.deepcopy(model)
    shift = torch.linspace(0.5, 2.0, 8)
    with torch.no_grad():
        shifted.blocks[1].bn2.bias += shift
        halfway.blocks[1].bn2.bias += shift / 2
    result = fuse([shifted, model], IMAGES, calibration="none")
    target = result.problem.target
    (block,) = (layer for layer in target.layers if layer.name == "blocks.1")
    problem = reweighed(
        result.problem, dict.fromkeys(block.parameters, 1.0), dict.fromkeys(block.parameters, 0.0)
    )
    assert torch.equal(average(problem)["blocks.1.bn2.bias"], shifted.blocks[1].bn2.bias)
    state = regress_anchored(problem, IMAGES, LeastSquares(anchor=0.0)).state
    made = with_state(target.model, state, target.aliases)
    streams = [
        networks.output(torch.nn.Sequential(one.stem, one.blocks[0], one.blocks[1]), IMAGES)
        for one in (made, halfway, shifted)
    ]
    found = [float((one - streams[0]).norm() / streams[1].norm()) for one in streams[1:]]
    # The ridge, a thousandth of the inputs' mean square, holds about as much of the change.
    assert found[0] < 3e-3
    assert found[1] > 0.05


def test_sensitivities_are_computed_once_for_masses_and_layers(monkeypatch):
    computed = []

    def counted(graph, *arguments, **options):
        computed.append(graph)
        return sensitivities(graph, *arguments, **options)

    monkeypatch.setattr(stages, "sensitivities", counted)
    monkeypatch.setattr("clafusion.profiling.importance.sensitivities", counted)
    models = networks.mlp(12, 9, 8, 5), networks.mlp(12, 9, 5, seed=1)
    masses = Matching(importance="sensitivity")
    both = fuse(models, VECTORS, matching=masses, **OWN)
    assert len(computed) == 2
    assert both.layer_weights == fuse(models, VECTORS, **OWN).layer_weights
    plans = moved_parent(fuse(models, VECTORS, matching=masses)).plans
    pairs = list(zip(moved_parent(both).plans, plans, strict=True))
    assert pairs
    assert all(one == two for one, two in pairs)


def by_deep_layer(result, deep):
    """Return the deep network's weight by the name of its layer, where both have the layer."""
    parent = result.parents[deep]
    names = [layer.name for layer in parent.traced.layers]
    return {
        names[k]: one[deep]
        for one, k in zip(result.layer_weights, parent.correspondence.layer_map, strict=True)
        if None not in one
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target": Deeper(width="narrow")},
        {"target": Deeper(width="wide")},
        {"target": Shallower()},
        {"target": Shallower(width="narrow")},
        {"target": Shallower(width="wide")},
        {"target": Like(networks.resnet(3, 3, shortcut="conv", seed=5))},
        {"calibration": "least_squares"},
    ],
    ids=str,
)
@pytest.mark.parametrize("deep_is_first", [True, False])
def test_the_weights_are_of_the_parents_layers_whatever_is_made(settings, deep_is_first):
    deep = silenced(networks.resnet(2, 2, shortcut="conv"), 1)
    shallow = networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=1)
    models, weights = [deep, shallow], [0.6, 0.4]
    if not deep_is_first:
        models, weights = models[::-1], weights[::-1]
    result = fuse(models, IMAGES, weights, **OWN, **settings)
    assert torch.isfinite(networks.output(result.model, IMAGES)).all()
    found = by_deep_layer(result, 0 if deep_is_first else 1)
    names = [layer.name for layer in result.parents[0 if deep_is_first else 1].traced.layers]
    assert found[names[-1]] == 0.6
    matched = result.alignment.deep_to_shallow
    assert set(found) == {names[i] for i, k in enumerate(matched) if k >= 0}
    assert found["blocks.1"] == 0.0  # it is silent
    assert 0.0 < found["blocks.0"] < 1.0
    for one in shared(result):
        assert sum(one) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("merge", ["least_squares", "average"])
def test_weights_where_layers_are_merged_away_are_of_those_that_stay(merge):
    deep, shallow = networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1)
    for models in ((deep, shallow), (shallow, deep)):
        place = models.index(deep)
        result = fuse(models, VECTORS, target=Shallower(merge=merge), **OWN)
        assert len(result.layer_weights) == 3  # the shallow network's layers
        kept = list(result.parents[place].correspondence.layer_map)
        assert len(kept) == 3
        of_deep = sensitivities_ref(deep, VECTORS)[kept[:2]]
        of_shallow = sensitivities_ref(shallow, VECTORS)[:2]
        expected = weights_ref(0.5, of_deep, of_shallow)
        found = [one[place] for one in result.layer_weights]
        np.testing.assert_allclose(found, [*expected, 0.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "inputs", "settings"),
    [
        (networks.vgg(3, 1), networks.vgg(1, 3, seed=1), IMAGES, {}),
        (
            networks.mlp(12, 9, 8, 7, 5),
            networks.mlp(12, 8, 6, 5, seed=1),
            VECTORS,
            {"target": Deeper(width=1)},
        ),
        (
            networks.resnet(3, 1),
            networks.resnet(1, 3, seed=1),
            IMAGES,
            {"target": Like(networks.resnet(4, 3))},
        ),
    ],
    ids=["union", "widths", "template"],
)
def test_what_only_one_network_has_keeps_the_weight(first, second, inputs, settings):
    result = fuse([first, second], inputs, [0.6, 0.4], calibration="none", **settings, **OWN)
    problem, made = result.problem, result.model.state_dict()
    uniform = average(problem, [MergeWeights(0.6), MergeWeights(0.4)])
    maps = [one.correspondence.layer_map for one in result.parents]
    lacking = 0
    for layer, *of in zip(problem.target.layers, *maps, strict=True):
        same = all(torch.equal(made[name], uniform[name]) for name in layer.parameters)
        alone = min(of) < 0
        lacking += alone
        assert same == (alone or layer is problem.target.layers[-1]), layer.name
    assert lacking


def test_layers_that_the_result_has_no_place_for_have_no_weights():
    models = [networks.resnet(3, 2), networks.resnet(1, 3, seed=1)]
    template = Like(networks.resnet(1, 1))
    for kind in ("uniform", "sensitivity"):
        result = fuse(models, IMAGES, target=template, merging=Merging(layer_weights=kind))
        assert len(result.alignment.pairs) == 5
        assert len(result.layer_weights) == len(shared(result)) == 4
        maps = [one.correspondence.layer_map for one in result.parents]
        assert set(zip(*maps, strict=True)) < set(result.alignment.pairs)


def test_one_after_another_each_step_has_its_own_weights():
    models = [
        networks.mlp(12, 9, 8, 7, 5),
        networks.mlp(12, 8, 8, 5, seed=1),
        networks.mlp(12, 7, 6, 5),
    ]
    one_by_one = Merging(strategy="iterative", layer_weights="sensitivity")
    own = fuse(models, VECTORS, merging=one_by_one)
    uniform = fuse(models, VECTORS, merging="iterative").model
    step = fuse(models[:2], VECTORS, **OWN)
    wanted = fuse([step.model, models[2]], VECTORS, [1 - 1 / 3, 1 / 3], **OWN)
    for name, tensor in own.model.state_dict().items():
        assert torch.equal(tensor, wanted.model.state_dict()[name])
    assert [one.layer_weights for one in own.steps] == [step.layer_weights, wanted.layer_weights]
    assert own.layer_weights == wanted.layer_weights
    assert not torch.equal(own.model[0].weight, uniform[0].weight)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("strategy", ["many_to_one", "barycentre"])
def test_all_strategies_have_layer_weights(strategy, calibration):
    merging = Merging(strategy=strategy, layer_weights="sensitivity")
    model = networks.mlp(12, 9, 8, 5)
    copies = [networks.permuted_copy(model, VECTORS, seed) for seed in (1, 2)]
    result = fuse([model, *copies], VECTORS, calibration=calibration, merging=merging)
    assert_same_function(result.model, model, VECTORS, calibration)
    for one in result.layer_weights:
        assert one == pytest.approx((1 / 3,) * 3, abs=1e-4)
    others = [model, networks.mlp(12, 8, 5, seed=1), networks.mlp(12, 7, 6, 5, seed=2)]
    mixed = fuse(others, VECTORS, calibration=calibration, merging=merging)
    uniform = fuse(others, VECTORS, calibration=calibration, merging=strategy)
    assert not torch.equal(mixed.model[0].weight, uniform.model[0].weight)
    assert mixed.layer_weights[0] != uniform.layer_weights[0] == (1 / 3,) * 3


def test_what_has_no_layer_weights_is_refused():
    model = networks.mlp(12, 9, 5)
    with pytest.raises(InputError, match=r"merging\.layer_weights must be one of 'uniform', 'sens"):
        FusionConfig(merging={"layer_weights": "fisher"})
    with pytest.raises(InputError, match=r"solver='zip' needs merging\.layer_weights='uniform'"):
        FusionConfig(matching={"solver": "zip"}, **OWN)
    profiled = profile(trace(model, VECTORS), VECTORS)
    aligned = align_profiles(["one", "other"], [profiled, profiled])
    with pytest.raises(InputError, match="of 'one'; the profile has none: profile the model by"):
        fuse_aligned(aligned, VECTORS, config=FusionConfig(**OWN))
    problem = fuse([model, model], VECTORS).problem
    with pytest.raises(InputError, match=r"each of the 2 layers of .*the profile has 3"):
        weigh_layers(with_sensitivities(problem, torch.ones(2), torch.ones(3)))
    with pytest.raises(InputError, match="need an output with a gradient"):
        sensitivities(trace(Labels(), VECTORS), VECTORS)
    model[2].weight.data.mul_(1e30)
    graph = trace(model, VECTORS, verify=False)
    with pytest.raises(InputError, match="'sensitivity' is not finite for layer '0'"):
        layer_sensitivities(graph, sensitivities(graph, VECTORS))
