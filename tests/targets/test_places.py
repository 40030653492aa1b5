"""Where the layers of several networks have their place."""

from itertools import pairwise

import pytest
import torch

from clafusion import Alignment, FusionConfig, Shallower, StructureError, align, profile, trace
from clafusion.targets.places import (
    layer_at,
    layer_maps,
    place_in_template,
    places_of,
    union_places,
)
from clafusion.targets.union import union_model
from tests.support.networks import mlp, resnet, vgg

DIGITS = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(*stages, widths=(8, 16), seed=0):
    return resnet(*stages, widths=widths, shortcut="conv", seed=seed)


def changes_ref(profiled):
    """Return for every layer but the first one minus the CKA of what goes in and comes out."""
    grams = []
    for gram in profiled.grams:
        centring = torch.eye(len(gram)) - 1 / len(gram)
        grams.append(centring.double() @ gram @ centring.double())
    return [1.0] + [
        1 - float((one * other).sum() / (one.norm() * other.norm()))
        for one, other in pairwise(grams)
    ]


def check_places(places, models):
    """Every layer has one place, in its own order, with others of its structure and stage."""
    for own, model in zip(layer_maps(places), models, strict=True):
        assert [k for k in own if k >= 0] == list(range(len(model.layers)))
    for place in places:
        layers = [model.layers[k] for model, k in zip(models, place, strict=True) if k >= 0]
        assert len({(one.structure, one.output_shape) for one in layers}) == 1
        assert layer_at(models, place) is layers[0]


def test_the_order_of_the_union():
    aligned = align([residual(3, 1), residual(1, 3, seed=1)], IMAGES)
    models = [one.traced for one in aligned.profiles]
    places = union_places(aligned, FusionConfig())
    check_places(places, models)
    assert {(one, other) for one, other in places if min(one, other) >= 0} == set(
        aligned.alignment.pairs
    )
    assert sum(min(place) < 0 for place in places) == 4
    union = union_model(aligned.names, models, aligned.reference, places)
    assert [one.structure for one in union.layers] == [
        layer_at(models, place).structure for place in places
    ]
    assert place_in_template(union, aligned.profiles, places) == places


def test_of_what_has_no_place_that_goes_which_does_the_least():
    aligned = align([residual(3, 1), residual(1, 3, seed=1)], IMAGES)
    places = union_places(aligned, FusionConfig())
    # One place less: of the blocks that only one network has, that goes which does the least.
    smaller = trace(residual(3, 2), IMAGES[:3])
    of_first, of_second = layer_maps(place_in_template(smaller, aligned.profiles, places))
    left = set(range(6)) - set(of_second)
    only = {other for one, other in places if one < 0}
    changes = changes_ref(aligned.profiles[1])
    assert left == {min(only, key=lambda other: changes[other])}
    assert set(of_first) - {-1} == set(range(6))
    smaller = trace(residual(2, 3), IMAGES[:3])
    of_first, of_second = layer_maps(place_in_template(smaller, aligned.profiles, places))
    left = set(range(6)) - set(of_first)
    only = {one for one, other in places if other < 0}
    changes = changes_ref(aligned.profiles[0])
    assert left == {min(only, key=lambda one: changes[one])}
    assert set(of_second) - {-1} == set(range(6))


def test_blocks_that_several_have_go_last():
    # In the second stage two of three have a block more, and in the first one of them.
    models = [residual(2, 2), residual(1, 2, seed=1), residual(1, 1, seed=2)]
    aligned = align(models, IMAGES)
    places = places_of(aligned)
    check_places(places, [one.traced for one in aligned.profiles])
    held = [sum(k >= 0 for k in place) for place in places]
    assert sorted(held) == [1, 2, 3, 3, 3, 3]
    template = trace(residual(1, 2, seed=3), IMAGES[:3])
    kept = place_in_template(template, aligned.profiles, places)
    assert kept == tuple(place for place, count in zip(places, held, strict=True) if count > 1)
    template = trace(residual(1, 1, seed=3), IMAGES[:3])
    kept = place_in_template(template, aligned.profiles, places)
    assert kept == tuple(place for place, count in zip(places, held, strict=True) if count > 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_union_of_three(order):
    every = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, widths=(6, 20), seed=2)]
    aligned = align([every[i] for i in order], IMAGES)
    models = [one.traced for one in aligned.profiles]
    places = union_places(aligned, FusionConfig())
    check_places(places, models)
    assert len(places) == 1 + 3 + 3 + 1
    shapes = [layer_at(models, place).output_shape for place in places]
    assert shapes == [(8, 8)] * 4 + [(4, 4)] * 3 + [()]
    # As many stand together as there can be: each of the third's blocks has a partner.
    third = layer_maps(places)[order.index(2)]
    assert all(
        sum(k >= 0 for k in place) >= 2 for place, k in zip(places, third, strict=True) if k >= 0
    )
    union = union_model(aligned.names, models, aligned.reference, places)
    assert len(union.layers) == 8
    assert place_in_template(union, aligned.profiles, places) == places


def test_stages_that_only_one_of_three_has_come_in_order():
    widths = (8, 8, 8)
    models = [
        vgg(1, 1, 3, widths=widths),
        vgg(1, 3, 1, widths=widths, seed=1),
        vgg(3, 1, 1, widths=widths, seed=2),
    ]
    aligned = align(models, IMAGES)
    traced = [one.traced for one in aligned.profiles]
    places = union_places(aligned, FusionConfig())
    check_places(places, traced)
    assert [layer_at(traced, place).output_shape for place in places] == (
        [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3 + [()]
    )
    for i, stage in enumerate(([6, 7, 8], [3, 4, 5], [0, 1, 2])):
        assert [j for j, place in enumerate(places) if place[i] >= 0 > place[i - 1]] == [
            j for j in stage if places[j][i - 1] < 0
        ]
        assert sum(max(place[:i] + place[i + 1 :]) < 0 <= place[i] for place in places) == 2


def test_places_of_three_with_one_that_is_the_deepest():
    models = [mlp(20, 16, 12, 5), mlp(20, 9, 8, 7, 6, 5, seed=1), mlp(20, 11, 5, seed=2)]
    aligned = align(models, DIGITS)
    assert aligned.reference == 1
    places = places_of(aligned)
    check_places(places, [one.traced for one in aligned.profiles])
    assert layer_maps(places)[1] == tuple(range(5))
    for i in (0, 2):
        pair = aligned.alignments[i]
        assert layer_maps(places)[i] == pair.alignment.deep_to_shallow
    assert union_places(aligned, FusionConfig()) == places


def test_places_of_three_with_one_that_is_the_shallowest():
    models = [mlp(20, 16, 12, 5), mlp(20, 9, 8, 7, 6, 5, seed=1), mlp(20, 11, 5, seed=2)]
    aligned = align(models, DIGITS, target=Shallower())
    assert aligned.reference == 2
    places = places_of(aligned)
    assert len(places) == 2
    assert layer_maps(places)[2] == (0, 1)
    for i in (0, 1):
        pairs = aligned.alignments[i].alignment.pairs
        assert layer_maps(places)[i] == tuple(deep for deep, _ in pairs)


def test_a_third_is_aligned_with_all_that_the_first_two_have():
    """Its layers match those of the second, which the first, the deepest, has no place for."""
    models = [residual(4, 1), residual(1, 3, seed=1), residual(1, 3, seed=1)]
    aligned = align(models, IMAGES)
    places = union_places(aligned, FusionConfig())
    assert len(places) == 1 + 4 + 3 + 1
    _, second, third = layer_maps(places)
    assert second == third


def test_what_finds_no_place_is_named():
    aligned = align([vgg(3, 1), vgg(1, 3, seed=1), vgg(2, 2, seed=2)], IMAGES)
    places = union_places(aligned, FusionConfig())
    template = trace(vgg(2, 2), IMAGES[:3])
    with pytest.raises(StructureError, match=r"the template has 5 layers, and layer '6' of"):
        place_in_template(template, aligned.profiles, places, name="the template")
    template = trace(mlp(20, 9, 5), DIGITS[:3])
    chains = align([mlp(20, 9, 8, 5), mlp(20, 9, 5, seed=1)], DIGITS)
    with pytest.raises(StructureError, match=r"finds no place in it.*only residual blocks may be"):
        place_in_template(template, chains.profiles, places_of(chains))


def test_ends_that_are_pinned_stay_together_in_the_union():
    models = [residual(3, 1), residual(1, 3, seed=1), residual(2, 2, seed=2)]
    config = FusionConfig(alignment=Alignment(pin_ends=True))
    aligned = align(models, IMAGES, config)
    places = union_places(aligned, config)
    check_places(places, [one.traced for one in aligned.profiles])
    assert places[0] == (0, 0, 0)
    assert places[-1] == (5, 5, 5)


def test_changes_are_of_what_goes_in_and_comes_out():
    from clafusion.targets.places import _changes

    profiled = profile(residual(2, 2), IMAGES)
    assert _changes(profiled) == pytest.approx(changes_ref(profiled), abs=1e-6)
