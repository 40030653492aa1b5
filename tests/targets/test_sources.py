"""How parents map to a target that is nobody's, and what its channels are said to do."""

from dataclasses import replace

import pytest
import torch

from clafusion import (
    Deeper,
    FusionConfig,
    Like,
    Matching,
    Profiling,
    Shallower,
    align,
    correspond,
    fuse,
    profile,
    trace,
)
from clafusion.correspondence.moving import move_state
from clafusion.matching.plans import match_sources
from clafusion.targets.sources import source_of, sources_of
from clafusion.targets.target import choose_target
from tests.support.attention import TOKENS, Encoder
from tests.support.data import CALIBRATIONS
from tests.support.networks import mlp, module_of, output, permuted_copy, randomise, resnet, vgg

VECTORS = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(*stages, widths=(8, 16), seed=0):
    return resnet(*stages, widths=widths, shortcut="conv", seed=seed)


def composed(models, inputs, template, **settings):
    config = FusionConfig(target=Like(template), assessment="none", **settings)
    aligned = align(models, inputs, config)
    chosen = choose_target(aligned, config, trace(template, inputs))
    return aligned, config, sources_of(chosen, aligned)


# --- a template that is a parent's architecture -------------------------------------------------

FAMILIES = {
    "mlp": (
        lambda seed=0: mlp(12, 9, 8, 7, 5, seed=seed),
        [mlp(12, 8, 6, 5, seed=1), mlp(12, 11, 10, 5, seed=2)],
        VECTORS,
    ),
    "vgg": (lambda seed=0: vgg(2, 2, seed=seed), [vgg(1, 2, seed=1), vgg(2, 1, seed=2)], IMAGES),
    "resnet": (
        lambda seed=0: residual(2, 2, seed=seed),
        [residual(1, 2, widths=(6, 12), seed=1), residual(1, 1, widths=(10, 20), seed=2)],
        IMAGES,
    ),
    "attention": (
        lambda seed=0: randomise(Encoder(3), seed).eval(),
        [randomise(Encoder(2), 1).eval(), randomise(Encoder(1), 2).eval()],
        TOKENS,
    ),
}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_like_a_parent_gives_that_parents_plans(name, count):
    build, others, inputs = FAMILIES[name]
    models = [*others[: count - 1], build()]
    aligned, config, sources = composed(models, inputs, build(seed=9))
    assert sources.reference == aligned.reference == count - 1
    (own,) = (one for i, one in enumerate(sources.sources) if i == sources.reference)
    # Its channels stay where they are, and the target's module has its weights.
    assert sorted(own.plans) == list(range(len(own.correspondence.groups)))
    for group, plan in own.plans.items():
        assert plan.is_identity, group
    assert all(not one.plans for i, one in enumerate(sources.sources) if i != sources.reference)
    weights = aligned.profiles[-1].traced.state()
    for entry, tensor in sources.profile.traced.state().items():
        assert torch.equal(tensor, weights[entry]), entry
    # What it does is what the parent does, and so all others have the plans into the parent.
    for key, rows in sources.profile.rows.items():
        torch.testing.assert_close(rows, aligned.profiles[-1].rows[key])
    assert sources.profile.rows.keys() == aligned.profiles[-1].rows.keys()
    plain = replace(config, target=Deeper())
    expected = match_sources(sources_of(choose_target(aligned, plain), aligned), plain)
    for one, other in zip(match_sources(sources, config), expected, strict=True):
        assert one.head_orders == other.head_orders
        for plan, wanted in zip(one.plans, other.plans, strict=True):
            assert plan == wanted


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_and_fuses_to_what_the_parents_architecture_does(name, calibration):
    build, others, inputs = FAMILIES[name]
    models = [*others, build()]
    found = fuse(models, inputs, target=Like(build(seed=9)), calibration=calibration)
    expected = fuse(models, inputs, calibration=calibration)
    wanted = output(expected.model, inputs)
    torch.testing.assert_close(
        output(found.model, inputs), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())
    )


# --- the profile that is composed ---------------------------------------------------------------

TEMPLATES = {
    "wider chain": ([mlp(12, 9, 8, 5), mlp(12, 7, 5, seed=1)], mlp(12, 13, 20, 5), VECTORS),
    "deeper chain": ([mlp(12, 9, 8, 5), mlp(12, 7, 5, seed=1)], mlp(12, 9, 8, 8, 5), VECTORS),
    "wider vgg": ([vgg(2, 1), vgg(1, 1, seed=1)], vgg(2, 1, widths=(11, 30)), IMAGES),
    "wider resnet": (
        [residual(2, 1), residual(1, 1, seed=1)],
        residual(2, 1, widths=(12, 40)),
        IMAGES,
    ),
    "deeper resnet": (
        [residual(2, 1), residual(1, 1, seed=1)],
        residual(3, 2, widths=(12, 16)),
        IMAGES,
    ),
    "three": (
        [residual(2, 1), residual(1, 2, seed=1), residual(1, 1, seed=2)],
        residual(3, 3, widths=(12, 16)),
        IMAGES,
    ),
    "more heads": (
        [randomise(Encoder(2, heads=2, size=3)).eval(), randomise(Encoder(1), 1).eval()],
        randomise(Encoder(3, heads=4, size=3), 2).eval(),
        TOKENS,
    ),
}


@pytest.mark.parametrize("layer_values", ["output", "preactivation"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_what_the_template_with_the_parents_moved_weights_does(name, layer_values):
    models, template, inputs = TEMPLATES[name]
    profiling = Profiling(layer_values=layer_values)
    aligned, _, sources = composed(models, inputs, template, profiling=profiling)
    made = sources.profile
    assert (made.num_inputs, made.data_key) == (len(inputs), aligned.profiles[0].data_key)
    first = sources.sources[sources.reference].correspondence
    # The target's module computes what the parent does that gives it its channels.
    wanted = output(models[sources.reference], inputs)
    torch.testing.assert_close(
        output(module_of(made.traced), inputs),
        wanted,
        rtol=0,
        atol=1e-4 * float(wanted.abs().max()),
    )
    again = profile(module_of(made.traced), inputs, assessment="none")
    shown, nodes = set(), set()
    for layer in made.traced.layers:
        lacking = first.layer_map[layer.index] < 0
        for index, hook in enumerate(layer.hook_points):
            inside = lacking and hook.post != layer.output  # of a block that the parent lacks
            if inside or hook.post in nodes:
                continue
            nodes.add(hook.post)
            found, really = made.rows[layer.index, index], again.rows[layer.index, index]
            assert found.shape == (len(really), len(hook.groups))
            if lacking and layer_values == "output" and name != "more heads":
                found = found.relu()  # the value before it is all that was recorded
            scale = float(really.abs().max())
            torch.testing.assert_close(found, really, rtol=0, atol=1e-4 * scale)
            shown.add(layer.index)
    assert shown >= {one.index for one in made.traced.layers[:-1]}


def test_rows_of_a_smaller_template_are_those_of_the_channels_that_are_kept():
    models = [mlp(12, 9, 8, 5), mlp(12, 10, 5, seed=1)]
    aligned, _, sources = composed(models, VECTORS, mlp(12, 4, 6, 5))
    own = sources.sources[0]
    assert sources.reference == 0
    for layer in (0, 1):
        group = int(own.correspondence.target.layers[layer].hook_points[-1].groups[0])
        plan = own.plans[group]
        assert plan.shape == ((9, 4), (8, 6))[layer]
        kept = plan.copied_rows(leaves=True)
        assert len(kept.unique()) == len(kept)  # none twice
        assert bool((plan.column_sums == 1).all())
        index = len(sources.profile.traced.layers[layer].hook_points) - 1
        rows = aligned.profiles[0].rows[layer, index]
        torch.testing.assert_close(sources.profile.rows[layer, index], rows[:, kept])


def test_channels_that_several_parents_give_are_each_of_one():
    """In the union a block's inner channels are its parent's, and the stream is the first's."""
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, widths=(6, 12), seed=2)]
    aligned = align(models, IMAGES)
    config = FusionConfig()
    chosen = choose_target(aligned, config)
    assert chosen.owner is None
    sources = sources_of(chosen, aligned)
    assert sources.reference == 0
    for group in sources.profile.traced.groups:
        having = [
            i
            for i, one in enumerate(sources.sources)
            if one.correspondence.groups[group.index] >= 0
        ]
        givers = [i for i, one in enumerate(sources.sources) if group.index in one.plans]
        assert len(givers) == 1
        assert givers[0] == having[0]  # all have the target's widths but the last, which is last
        plan = sources.sources[givers[0]].plans[group.index]
        assert plan.shape[1] == group.size
        assert bool((plan.column_sums == 1).all())
    assert [bool(one.plans) for one in sources.sources] == [True, True, False]
    for i, one in enumerate(sources.sources):
        assert one.profile.rows is aligned.profiles[i].rows
        assert one.target.rows is sources.profile.rows
        assert one.correspondence.target is sources.profile.traced


def test_the_outputs_of_a_classifier_are_composed_too():
    models = [mlp(12, 9, 8, 5), mlp(12, 7, 5, seed=1)]
    settings = {
        "profiling": Profiling(layer_values="preactivation"),
        "matching": Matching(outputs=True),
    }
    aligned, _, sources = composed(models, VECTORS, mlp(12, 13, 14, 5), **settings)
    key = 2, len(sources.profile.traced.layers[2].hook_points)
    assert torch.equal(sources.profile.rows[key], aligned.profiles[0].rows[key])
    # Whoever shuffles the classes of a copy gets them back.
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = permuted_copy(models[0], VECTORS)
    with torch.no_grad():
        shuffled[-1].weight.copy_(shuffled[-1].weight[order])
        shuffled[-1].bias.copy_(shuffled[-1].bias[order])
    target = Like(mlp(12, 18, 16, 5))  # every channel twice: transport can do so exactly
    result = fuse([models[0], shuffled], VECTORS, target=target, calibration="none", **settings)
    wanted = output(models[0], VECTORS)
    torch.testing.assert_close(
        output(result.model, VECTORS), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())
    )


# --- a target that is a parent's own model ------------------------------------------------------


@pytest.mark.parametrize("target", [Deeper(), Shallower()], ids=str)
def test_a_target_of_an_owner_is_its_model(target):
    models = [mlp(12, 9, 8, 5), mlp(12, 7, 5, seed=1), mlp(12, 6, 9, 7, 5, seed=2)]
    config = FusionConfig(target=target)
    aligned = align(models, VECTORS, config)
    chosen = choose_target(aligned, config)
    sources = sources_of(chosen, aligned)
    owner = 2 if isinstance(target, Deeper) else 1
    assert (chosen.owner, sources.reference) == (owner, owner)
    assert sources.profile is aligned.profiles[owner]
    assert chosen.model is sources.profile.traced
    for i, one in enumerate(sources.sources):
        assert one.profile.rows is aligned.profiles[i].rows
        assert one.correspondence.source is aligned.profiles[i].traced
        assert one.correspondence.layer_map == chosen.layer_maps[i]
        assert dict(one.correspondence.products) == dict(chosen.products[i])
        assert bool(one.plans) == (i == owner)
    again = source_of(sources.profile, aligned.profiles[0], chosen.layer_maps[0])
    assert again.correspondence.groups == sources.sources[0].correspondence.groups


def test_the_moved_weights_are_those_of_the_given_plans():
    models, template, inputs = TEMPLATES["wider resnet"]
    _, _, sources = composed(models, inputs, template)
    one = sources.sources[sources.reference]
    correspondence = correspond(
        sources.profile.traced, one.profile.traced, one.correspondence.layer_map
    )
    plans = [one.plans.get(i) for i in range(len(correspondence.groups))]
    state = sources.profile.traced.state()
    for name, tensor in move_state(correspondence, plans).items():
        assert torch.equal(tensor, state[name]), name
