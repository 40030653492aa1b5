"""Each layer's share of the two networks: known by construction, and where it has to arrive."""

import copy

import numpy as np
import pytest
import torch

from clafusion import FusionConfig, InputError, fuse, fuse_models, trace
from clafusion import pipeline as stages
from clafusion.calibration.least_squares import Parent, frame_as_parent, regress
from clafusion.correspondence.correspondence import with_state
from clafusion.fusion import align_profiles, fuse_aligned, profile
from clafusion.merging.blending import aligned_state, blend, transport_vector
from clafusion.merging.layer_weights import MergeWeights, layer_shares
from clafusion.profiling.importance import layer_sensitivities, sensitivities
from clafusion.profiling.moments import observed_moments
from clafusion.reports.tables import fusion_summary
from tests import networks
from tests.test_fuse import CALIBRATIONS, IMAGES, MODELS, PAIRS, VECTORS, assert_same_function
from tests.test_importance import Labels

OWN = {"layer_weights": "sensitivity"}


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


def shares_ref(weight, deep, shallow):
    a, b = deep / deep.sum(), shallow / shallow.sum()
    return weight * a / ((1 - weight) * b + weight * a)


def silenced(model, block):
    """Make a residual block write nothing: the outputs then depend on no parameter of it."""
    model = copy.deepcopy(model)
    last = dict(model.named_modules())[f"blocks.{block}.bn2"]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return model


def test_shares_are_those_of_the_formula():
    deep, shallow = networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1)
    result = fuse(deep, shallow, VECTORS, weight=0.3, **OWN)
    partner = result.alignment.deep_to_shallow
    found = [sensitivities_ref(model, VECTORS) for model in (deep, shallow)]
    hidden = [i for i, k in enumerate(partner[:-1]) if k >= 0]
    # Of the hidden layers that both have; the deep network is the first, with the share 0.7.
    expected = shares_ref(0.7, found[0][hidden], found[1][[partner[i] for i in hidden]])
    assert list(result.shares) == list(result.alignment.pairs)
    np.testing.assert_allclose(list(result.shares.values()), [*expected, 0.7], rtol=1e-5)
    assert np.abs(expected - 0.7).max() > 1e-3
    swapped = fuse(shallow, deep, VECTORS, weight=0.7, **OWN)
    assert swapped.shares == result.shares


@pytest.mark.parametrize("name", MODELS)
def test_a_units_sensitivity_is_the_sum_over_its_parameters(name):
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
    result = fuse(model, model, inputs, weight=0.3, calibration=calibration, **OWN)
    assert set(result.shares.values()) == {0.7}
    uniform = fuse(model, model, inputs, weight=0.3, calibration=calibration)
    assert set(uniform.shares.values()) == {0.7}
    for key, tensor in uniform.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[key])


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_has_the_same_shares_and_fuses_to_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    graph = trace(model, inputs)
    permuted = networks.permuted(model, graph, networks.orders_of(graph))
    result = fuse(permuted, model, inputs, weight=0.3, calibration=calibration, **OWN)
    # Float32 gradients, summed in another order.
    assert list(result.shares.values()) == pytest.approx([0.7] * len(graph.layers), abs=1e-4)
    assert_same_function(result.model, permuted, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", ["mlp", "resnet, padded"])
def test_weights_0_and_1_do_not_change_a_byte(name, calibration):
    deep, shallow, inputs = PAIRS[name]
    for weight in (0.0, 1.0):
        settings = {"weight": weight, "calibration": calibration}
        result = fuse(deep, shallow, inputs, **settings, **OWN)
        assert set(result.shares.values()) == {1.0 - weight}
        wanted = fuse(deep, shallow, inputs, **settings).model.state_dict()
        for key, tensor in result.model.state_dict().items():
            assert torch.equal(tensor, wanted[key]), key


def test_a_unit_on_which_no_output_depends_is_the_other_networks_alone():
    first, second = networks.resnet(2, 1), networks.resnet(2, 1, seed=1)
    for models, share in (
        ((silenced(first, 1), second), 0.0),
        ((first, silenced(second, 1)), 1.0),
    ):
        result = fuse(*models, IMAGES, weight=0.4, calibration="none", **OWN)
        layers, plan = result.lifting.deep.layers, result.lifting
        names = [layer.name for layer in layers]
        silent = names.index("blocks.1")
        shares = list(result.shares.values())
        assert shares[silent] == share
        assert shares[-1] == 0.6  # of the outputs
        assert all(0.0 < one < 1.0 for i, one in enumerate(shares) if i != silent)
        wanted = plan.deep.state() if share else aligned_state(plan, result.plans)
        made = result.model.state_dict()
        for name in layers[silent].parameters:
            if made[name].is_floating_point():
                assert torch.equal(made[name], wanted[name].to(made[name])), name


def test_no_sensitivity_at_all_counts_as_equal_ones():
    model = networks.mlp(12, 9, 5)
    graph = trace(model, VECTORS)
    plan = fuse(model, model, VECTORS).lifting
    nothing = torch.zeros(len(graph.layers), dtype=torch.float64)
    found = layer_shares(plan, 0.3, nothing, nothing)
    assert found.of_units(plan) == (0.3, 0.3)
    found = layer_shares(plan, 0.3, nothing, nothing + 1)
    assert found.of_units(plan) == (0.3, 0.3)


def test_a_parameter_of_two_units_keeps_the_weight():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = networks.mlp(12, 9, 9, 9, 5)
            self.layers[4].weight = self.layers[2].weight

        def forward(self, x):
            return self.layers(x)

    first, second = Tied().eval(), Tied().eval()
    networks.randomise(second, seed=1)
    result = fuse(first, second, VECTORS, weight=0.4, calibration="none", **OWN)
    aligned, own = aligned_state(result.lifting, result.plans), result.lifting.deep.state()
    shared, bias = "layers.2.weight", "layers.2.bias"
    share = result.shares[1, 1]
    assert abs(share - 0.6) > 1e-3
    made = result.model.state_dict()
    for name, wanted in ((shared, 0.6), (bias, share)):
        expected = torch.lerp(aligned[name].double(), own[name].double(), wanted)
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_repair_meets_the_moments_of_each_units_own_share():
    data = IMAGES  # one batch, for whose statistics it is exact
    first, second = networks.resnet(2, 1), silenced(networks.resnet(2, 1, seed=1), 1)
    result = fuse(first, second, data, weight=0.4, **OWN)
    shares = list(result.shares.values())
    assert len({f"{one:.2f}" for one in shares}) > 2
    plan = result.lifting
    graphs = plan.deep, plan.shallow, trace(result.model, data)
    ((of_deep,), (of_shallow,), (of_fused,)) = (observed_moments(one, data) for one in graphs)
    for layer, made, share in zip(plan.deep.layers, graphs[2].layers, shares, strict=True):
        for point, found in zip(layer.calibration_points, made.calibration_points, strict=True):
            other = plan.calibration_points[point.node]
            places = [(one.groups, one.members) for one in (point, other)]
            moved = transport_vector(
                torch.stack(of_shallow[other.node]), result.plans, *places, plan.groups
            )
            wanted = share * torch.stack(of_deep[point.node]) + (1 - share) * moved
            bound = 1e-4 * float(wanted.abs().max())
            torch.testing.assert_close(
                torch.stack(of_fused[found.node]), wanted, rtol=1e-3, atol=bound
            )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_least_squares_aims_at_each_units_own_share(share):
    """A layer with all the share of one network puts out what that one does."""
    result = fuse(
        networks.mlp(12, 9, 8, 5), networks.mlp(12, 9, 8, 5, seed=1), VECTORS, calibration="none"
    )
    plan = result.lifting
    shares = MergeWeights(0.5, dict.fromkeys(plan.deep.layers[0].parameters, share))
    parents = [Parent(plan, result.plans, shares.rest()), frame_as_parent(plan.deep, shares)]
    state = regress(parents, blend(plan, result.plans, shares), VECTORS)
    wanted = plan.deep.state() if share else plan.shallow.state()
    made, other = state["0.weight"], wanted["0.weight"]
    # The channels of that network alone, in any order: each is one of its own.
    nearest = torch.cdist(made, other).min(1)
    assert float(nearest.values.max()) < 1e-4
    assert len(set(nearest.indices.tolist())) == len(other)
    equal = MergeWeights(0.5)
    parents = [Parent(plan, result.plans, equal), frame_as_parent(plan.deep, equal)]
    uniform = regress(parents, blend(plan, result.plans, equal), VECTORS)
    assert float(torch.cdist(uniform["0.weight"], other).min(1).values.max()) > 0.1


def test_least_squares_gives_a_residual_stream_the_weight():
    """The sums on a stream are the work of all layers: no layer's own share is theirs."""
    model = networks.resnet(2, 1)
    shifted, halfway = copy.deepcopy(model), copy.deepcopy(model)
    shift = torch.linspace(0.5, 2.0, 8)
    with torch.no_grad():
        shifted.heads[1].bn2.bias += shift
        halfway.heads[1].bn2.bias += shift / 2
    result = fuse(shifted, model, IMAGES, calibration="none")
    plan = result.lifting
    (block,) = (layer for layer in plan.deep.layers if layer.name == "blocks.1")
    shares = MergeWeights(0.5, dict.fromkeys(block.parameters, 1.0))
    parents = [Parent(plan, result.plans, shares.rest()), frame_as_parent(plan.deep, shares)]
    averaged = blend(plan, result.plans, shares)
    assert torch.equal(averaged["blocks.1.bn2.bias"], shifted.heads[1].bn2.bias)
    made = with_state(plan.deep.model, regress(parents, averaged, IMAGES), plan.deep)
    streams = [
        networks.output(torch.nn.Sequential(one.stem, one.heads[0], one.heads[1]), IMAGES)
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
    both = fuse(*models, VECTORS, importance="sensitivity", **OWN)
    assert len(computed) == 2
    assert both.shares == fuse(*models, VECTORS, **OWN).shares
    plans = fuse(*models, VECTORS, importance="sensitivity").plans
    assert all(torch.equal(one, two) for one, two in zip(both.plans, plans, strict=True))


def shown(result):
    """Return the shares that the summary's table has, by the deep network's layer."""
    lines = fusion_summary(result).split("\n\n")[0].splitlines()
    assert lines[0].endswith("deep share")
    cells = [line.split() for line in lines[2:-1]]
    return {line[0]: line[-1] for line in cells if len(line) == 4}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"width": "narrow"},
        {"width": "wide"},
        {"balance": "merge"},
        {"balance": "merge", "width": "narrow"},
        {"balance": "merge", "width": "wide"},
        {"into": networks.resnet(3, 3, shortcut="conv", seed=5)},
        {"calibration": "least_squares"},
    ],
)
@pytest.mark.parametrize("deep_is_first", [True, False])
def test_the_table_shows_the_deep_networks_share_whatever_is_made(settings, deep_is_first):
    deep = silenced(networks.resnet(2, 2, shortcut="conv"), 1)
    shallow = networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=1)
    models = (deep, shallow) if deep_is_first else (shallow, deep)
    weight = 0.4 if deep_is_first else 0.6
    result = fuse(*models, IMAGES, weight=weight, **OWN, **settings)
    assert torch.isfinite(networks.output(result.model, IMAGES)).all()
    found = shown(result)
    assert found[result.pair.deep.traced.layers[-1].name] == "0.60"
    matched = result.alignment.deep_to_shallow
    names = [layer.name for layer in result.pair.deep.traced.layers]
    assert set(found) == {names[i] for i, k in enumerate(matched) if k >= 0}
    # Made networks compute what their originals do, so that the silent block stays silent.
    assert found["blocks.1"] == "0.00"
    assert found["blocks.0"] not in ("0.00", "1.00")


@pytest.mark.parametrize("merge", ["least_squares", "average"])
def test_the_table_shows_shares_where_layers_are_merged_away(merge):
    deep, shallow = networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1)
    for models in ((deep, shallow), (shallow, deep)):
        result = fuse(*models, VECTORS, weight=0.5, balance="merge", merge=merge, **OWN)
        found = shown(result)
        assert list(found.values()) == [f"{share:.2f}" for share in result.shares.values()]
        assert len(result.lifting.deep.layers) == 3  # the shallow network's, whose shares are known
        of_shallow = sensitivities_ref(shallow, VECTORS)[:2]
        products = sensitivities(result.lifting.shallow, VECTORS)
        of_made = layer_sensitivities(result.lifting.shallow, products).numpy()[:2]
        expected = shares_ref(0.5, of_made, of_shallow)
        np.testing.assert_allclose(list(result.shares.values()), [*expected, 0.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "settings"),
    [
        (networks.vgg(3, 1), networks.vgg(1, 3, seed=1), {}),
        (networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1), {"width": "second"}),
        (networks.resnet(3, 1), networks.resnet(1, 3, seed=1), {"into": networks.resnet(4, 3)}),
    ],
)
def test_what_only_one_network_has_keeps_the_weight(first, second, settings):
    inputs = VECTORS if "width" in settings else IMAGES
    result = fuse(first, second, inputs, weight=0.4, calibration="none", **settings, **OWN)
    plan, made = result.lifting, result.model.state_dict()
    assert plan.target_only_layers
    deep_share = 0.6 if result.pair.deep_is_first else 0.4
    weight = deep_share if plan.shallow is result.pair.shallow.traced else 1 - deep_share
    uniform = blend(plan, result.plans, MergeWeights(weight))
    for layer, k in zip(plan.deep.layers, plan.partner, strict=True):
        same = all(torch.equal(made[name], uniform[name]) for name in layer.parameters)
        alone = k < 0 or layer.index in plan.target_only_layers or layer is plan.deep.layers[-1]
        assert same == alone, layer.name


def test_pairs_that_the_result_has_no_place_for_have_no_share():
    first, second = networks.resnet(3, 2), networks.resnet(1, 3, seed=1)
    into = networks.resnet(1, 1)
    for kind in ("uniform", "sensitivity"):
        result = fuse(first, second, IMAGES, into=into, layer_weights=kind)
        pairs = result.alignment.pairs
        assert len(pairs) == 5
        assert len(result.shares) == 4
        assert set(result.shares) < set(pairs)
    assert len(shown(result)) == 4


def test_uniform_shares_are_not_in_the_table():
    text = fusion_summary(fuse(networks.mlp(12, 9, 5), networks.mlp(12, 8, 5), VECTORS))
    assert "deep share" not in text
    assert "by sensitivity" not in text


def test_one_after_another_each_step_has_its_own_shares():
    models = [
        networks.mlp(12, 9, 8, 7, 5),
        networks.mlp(12, 8, 8, 5, seed=1),
        networks.mlp(12, 7, 6, 5),
    ]
    own = fuse_models(models, VECTORS, **OWN).model
    uniform = fuse_models(models, VECTORS).model
    step = fuse(models[0], models[1], VECTORS, weight=0.5, **OWN).model
    wanted = fuse(step, models[2], VECTORS, weight=1 / 3, **OWN).model
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name])
    assert not torch.equal(own[0].weight, uniform[0].weight)


def test_what_has_no_layer_weights_is_refused():
    model = networks.mlp(12, 9, 5)
    with pytest.raises(InputError, match="layer_weights must be one of 'uniform', 'sensitivity'"):
        FusionConfig(layer_weights="fisher")
    with pytest.raises(InputError, match="solver 'zip' needs layer_weights='uniform'"):
        FusionConfig(solver="zip", **OWN)
    for method in ("many_to_one", "barycentre"):
        with pytest.raises(InputError, match="layer_weights='sensitivity' needs method='iterative"):
            fuse_models([model, model], VECTORS, method=method, **OWN)
    graph = trace(model, VECTORS)
    profiled = profile(graph, VECTORS)
    pair = align_profiles(profiled, profiled)
    with pytest.raises(InputError, match="has none: profile the model by the same settings"):
        fuse_aligned(pair, VECTORS, config=FusionConfig(**OWN))
    plan = fuse(model, model, VECTORS).lifting
    with pytest.raises(InputError, match="each of the 2 layers; the profile has 3"):
        layer_shares(plan, 0.5, torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="need an output with a gradient"):
        sensitivities(trace(Labels(), VECTORS), VECTORS)
    model[2].weight.data.mul_(1e30)
    graph = trace(model, VECTORS, verify=False)
    with pytest.raises(InputError, match="'sensitivity' is not finite for layer '0'"):
        layer_sensitivities(graph, sensitivities(graph, VECTORS))
