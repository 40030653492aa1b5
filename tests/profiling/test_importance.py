"""Masses of channels against plain formulas, and what a fusion makes of them."""

import copy

import numpy as np
import pytest
import torch

from clafusion import Deeper, FusionConfig, InputError, Matching, Shallower, fuse, trace
from clafusion.fusion import align_profiles, fuse_aligned, profile
from clafusion.profiling.importance import channel_importance
from tests.support import networks
from tests.support.assertions import assert_same_function, assert_same_logits
from tests.support.data import IMAGES, MODELS, VECTORS
from tests.support.networks import Labels, output
from tests.support.transformers import transformer

KINDS = ["norm", "activation", "sensitivity"]


def masses_ref(scores):
    kept = np.maximum(scores, 1e-3 * scores.mean())
    return kept / kept.sum()


def scores_ref(model, inputs):
    """Return the scores of a network of two linear layers, in float64, by the chain rule."""
    first, _, second = model
    w, b = (one.detach().double().numpy() for one in (first.weight, first.bias))
    v, c = (one.detach().double().numpy() for one in (second.weight, second.bias))
    x = inputs.double().numpy()
    hidden = np.maximum(x @ w.T + b, 0)
    outputs = hidden @ v.T + c
    behind = (outputs @ v) * (hidden > 0)  # half the gradient at the pre-activations
    return {
        "norm": np.sqrt(np.square(w).sum(1) + np.square(b)),
        "activation": hidden.mean(0),
        "sensitivity": np.abs(w * (behind.T @ x)).sum(1)
        + np.abs(b * behind.sum(0))
        + np.abs(v * (outputs.T @ hidden)).sum(0),
    }


def with_useless_channels(model, count, how):
    """Add hidden channels that nothing reads: with no weights, never positive, or alive."""
    first, _, second = model
    own = first.out_features
    wide = networks.mlp(first.in_features, own + count, second.out_features, seed=5)
    with torch.no_grad():
        wide[0].weight[:own], wide[0].bias[:own] = first.weight, first.bias
        wide[2].weight[:, :own], wide[2].bias[:] = second.weight, second.bias
        wide[2].weight[:, own:] = 0.0
        if how == "empty":
            wide[0].weight[own:] = 0.0
        if how != "alive":
            wide[0].bias[own:] = 0.0 if how == "empty" else -10.0
    return wide


@pytest.mark.parametrize("kind", KINDS)
def test_masses_are_those_of_the_formula(kind):
    model = networks.mlp(12, 20, 5)
    (found,) = channel_importance(trace(model, VECTORS), VECTORS, kind)
    expected = masses_ref(scores_ref(model, VECTORS)[kind])
    # Float32 sums over 400 inputs.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float64
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_masses_move_with_the_channels(name, kind):
    build, inputs = MODELS[name]
    model = build()
    graph = trace(model, inputs)
    orders = networks.orders_of(graph)
    permuted = networks.permuted(model, graph, orders)
    before = channel_importance(graph, inputs, kind)
    after = channel_importance(trace(permuted, inputs), inputs, kind)
    for one, other, order in zip(before, after, orders, strict=True):
        torch.testing.assert_close(other, one[order], rtol=1e-3, atol=1e-6)
        assert float(one.std()) > 1e-3 / len(one)  # else any order would do


@pytest.mark.parametrize("kind", ["activation", "sensitivity"])
def test_batches_do_not_matter_but_for_how_many_inputs(kind):
    graph = trace(networks.vgg(1, 1), IMAGES)
    whole = channel_importance(graph, IMAGES[:70], kind)
    limited = channel_importance(graph, IMAGES.split(9), kind, max_inputs=70)
    for one, other in zip(whole, limited, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    every = channel_importance(graph, IMAGES, kind)
    assert not torch.allclose(whole[0], every[0], rtol=1e-4, atol=0)


def test_sensitivity_does_not_see_a_channels_scale():
    model = networks.mlp(12, 20, 5)
    scaled = copy.deepcopy(model)
    factors = 2.0 ** torch.arange(-10, 10)
    with torch.no_grad():
        scaled[0].weight *= factors[:, None]
        scaled[0].bias *= factors
        scaled[2].weight /= factors
    assert_same_function(scaled, model, VECTORS)
    graphs = [trace(one, VECTORS) for one in (model, scaled)]
    (one,), (other,) = (channel_importance(graph, VECTORS, "sensitivity") for graph in graphs)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    (one,), (other,) = (channel_importance(graph, VECTORS, "norm") for graph in graphs)
    assert not torch.allclose(one, other, rtol=0.5)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("norm", "empty"),
        ("activation", "empty"),
        ("activation", "dead"),
        ("sensitivity", "empty"),
        ("sensitivity", "dead"),
        ("sensitivity", "alive"),
    ],
)
def test_useless_channels_have_the_least_mass_and_fusion_ignores_them(kind, how):
    model = networks.mlp(12, 20, 5)
    wide = with_useless_channels(model, 10, how)
    assert_same_function(wide, model, VECTORS)
    (found,) = channel_importance(trace(wide, VECTORS), VECTORS, kind)
    assert float(found[20:].max()) < 1e-3 / 20 < float(found[:20].min())
    wanted = output(model, VECTORS)
    for width, models in ((0, [model, wide]), (1, [model, wide]), (1, [model, wide, model])):
        distances = []
        for importance in (kind, "uniform"):
            fused = fuse(
                models,
                VECTORS,
                calibration="none",
                target=Deeper(width=width),
                matching=Matching(importance=importance),
            ).model
            distances.append(float((output(fused, VECTORS) - wanted).norm() / wanted.norm()))
        # Ten channels of 1e-3 of the mean mass blur what the others carry by about 1e-2.
        assert distances[0] < 1e-2
        assert distances[1] > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_itself_is_itself(name, kind):
    build, inputs = MODELS[name]
    model = build()
    for cost in ("correlation", "both"):
        matching = Matching(importance=kind, cost=cost)
        fused = fuse([model, model], inputs, matching=matching).model
        assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["ViT", "GPT-2", "ConvNeXt"])
def test_transformers_fused_with_themselves_are_themselves(architecture, kind):
    model = transformer(architecture, 2, seed=0)
    inputs = torch.randint(0, 50, (60, 9)) if architecture == "GPT-2" else IMAGES[:60]
    fused = fuse([model, model], inputs, matching=Matching(importance=kind)).model
    assert_same_logits(fused, model, inputs)


def test_equal_scores_are_uniform_masses_byte_by_byte():
    draw = torch.Generator().manual_seed(0)
    models = [networks.mlp(12, 20, 5, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            signs = torch.randint(0, 2, model[0].weight.shape, generator=draw)
            model[0].weight.copy_(2 * signs - 1)
            model[0].bias.fill_(0.5)
    states = [
        fuse(
            models, VECTORS, matching=Matching(importance=kind), calibration="repair"
        ).model.state_dict()
        for kind in ("uniform", "norm", "activation")
    ]
    for name, one in states[0].items():
        assert torch.equal(one, states[1][name])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_sensitivities_are_the_same_on_any_thread_count():
    graph = trace(networks.resnet(2, 2), IMAGES)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(channel_importance(graph, IMAGES, "sensitivity"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("target", [Shallower(), Deeper(width="narrow"), Deeper()], ids=str)
def test_networks_that_are_made_on_the_way_have_masses_too(target):
    models = [
        networks.mlp(12, 9, 8, 7, 5),
        networks.mlp(12, 8, 6, 5, seed=1),
        networks.mlp(12, 7, 9, 5, seed=2),
    ]
    for kind in KINDS:
        for count in (2, 3):
            matching = Matching(importance=kind)
            result = fuse(models[:count], VECTORS, target=target, matching=matching)
            assert torch.isfinite(output(result.model, VECTORS)).all()
            moved = 0
            for parent in result.parents:
                plans = [plan for plan in parent.plans if plan is not None]
                if all(bool((plan.entries.masses == 1).all()) for plan in plans):
                    continue  # its channels are the result's
                masses = [plan.row_sums for plan in plans]
                assert any(float(one.max() - one.min()) > 1e-3 for one in masses)
                moved += 1
            assert moved == count - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_made_networks_masses_are_those_of_the_channels_that_it_has(kind):
    """Of channels that are kept, relative to each other; and of a template that is a parent's."""
    from clafusion import Like, align
    from clafusion.targets.sources import sources_of
    from clafusion.targets.target import choose_target

    models = [networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 8, 6, 5, seed=1)]
    for template, tolerance in ((networks.mlp(12, 9, 8, 7, 5, seed=3), 1e-12), (None, 1e-9)):
        target = Deeper(width="narrow") if template is None else Like(template)
        config = FusionConfig(target=target, matching=Matching(importance=kind))
        aligned = align(models, VECTORS, config)
        given = None if template is None else trace(template, VECTORS)
        sources = sources_of(choose_target(aligned, config, given), aligned)
        masses = sources.profile.importance
        assert len(masses) == len(sources.profile.traced.groups)
        found = 0
        for index, mass in enumerate(masses):
            assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
            givers = [i for i, one in enumerate(sources.sources) if index in one.plans]
            (giver,) = givers
            source = sources.sources[giver]
            group = source.correspondence.groups[index]
            kept = source.plans[index].copied_rows(leaves=True)
            expected = aligned.profiles[giver].importance[group][kept]
            torch.testing.assert_close(mass, expected / expected.sum(), rtol=tolerance, atol=0)
            found += giver == 0
        if template is not None:
            assert found == len(masses)


@pytest.mark.parametrize("strategy", ["many_to_one", "iterative", "barycentre"])
def test_several_models_share_their_channels_by_importance(strategy):
    model = networks.mlp(12, 20, 17, 5)
    matching = Matching(importance="sensitivity")
    result = fuse([model, model, model], VECTORS, matching=matching, merging=strategy)
    assert_same_function(result.model, model, VECTORS)


def test_what_has_no_masses_is_refused():
    model = networks.mlp(12, 9, 5)
    graph = trace(model, VECTORS)
    with pytest.raises(InputError, match="importance must be one of"):
        channel_importance(graph, VECTORS, "size")
    with pytest.raises(InputError, match="importance must be one of"):
        Matching(importance="size")
    with pytest.raises(InputError, match=r"matching\.importance must be one of"):
        FusionConfig(matching={"importance": "size"})
    with pytest.raises(InputError, match="importance must be 'uniform' with solver 'assignment'"):
        Matching(importance="norm", solver="assignment")
    profiled = profile(graph, VECTORS)
    for count in (2, 3):
        aligned = align_profiles([f"models[{i}]" for i in range(count)], [profiled] * count)
        config = FusionConfig(matching=Matching(importance="norm"), calibration="none")
        with pytest.raises(InputError, match="profile the model by the same "):
            fuse_aligned(aligned, VECTORS, config=config)
    with pytest.raises(InputError, match="need an output with a gradient"):
        channel_importance(trace(Labels(), VECTORS), VECTORS, "sensitivity")
    model[2].weight.data.mul_(1e30)
    with pytest.raises(InputError, match="'sensitivity' is not finite for the channels of '0"):
        channel_importance(trace(model, VECTORS, verify=False), VECTORS, "sensitivity")
