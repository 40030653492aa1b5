"""Matching residual streams by rotations."""

import copy
import warnings

import pytest
import torch
from torch import nn

from clafusion import (
    Barycentre,
    FusionConfig,
    InputError,
    Like,
    Matching,
    Merging,
    Orthogonal,
    WidthWarning,
    align,
    fuse,
    fuse_pairs,
    naive_average,
    profile,
    solve_transport,
    summary,
    trace,
)
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.matching.orthogonal import nearest_rotation
from tests.support.assertions import assert_same_function
from tests.support.attention import shuffled
from tests.support.networks import output, permuted_copy, randomise, resnet
from tests.support.pre_norm import GPT, IMAGES, MODELS, TEXTS, WIDTH, ViT, built, rotated_copy

ROTATED = Matching(solver=Orthogonal())


def turned(model, inputs):
    """Return a rotated copy with its heads and all other channels in another order."""
    rotated = rotated_copy(model, inputs)
    return shuffled(rotated, trace(rotated, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_copy_fuses_to_the_original(name):
    model, inputs = built(name)
    result = fuse([model, turned(model, inputs)], inputs, matching=ROTATED, calibration="none")
    want = output(model, inputs)
    assert (output(result.model, inputs) - want).abs().max() < 1e-5 * want.abs().max()
    (rotation,) = result.parents[1].rotations.values()
    assert rotation.shape == (WIDTH, WIDTH)
    assert not result.parents[0].rotations


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_calibrations_know_the_rotated_channels(calibration):
    model, inputs = built("GPT, RMSNorm")
    copies = [rotated_copy(model, inputs, seed) for seed in (1, 2)]
    result = fuse([model, *copies], inputs, matching=ROTATED, calibration=calibration)
    assert_same_function(result.model, model, inputs, calibration)


@pytest.mark.parametrize("cost", ["weights", "both", "euclidean"])
def test_any_cost_matches_the_other_channels(cost):
    model, inputs = built("GPT, RMSNorm")
    matching = Matching(cost=cost, solver=Orthogonal())
    copied = turned(model, inputs)
    result = fuse([model, copied], inputs, matching=matching, calibration="none")
    assert_same_function(result.model, model, inputs)


def test_permutations_alone_do_not_undo_a_rotation():
    model, inputs = built("GPT, RMSNorm")
    result = fuse([model, rotated_copy(model, inputs)], inputs, calibration="none")
    want = output(model, inputs)
    assert (output(result.model, inputs) - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("layers", [2, 1])
def test_all_weight_on_one_parent_gives_its_function(layers):
    model, inputs = built("ViT, LayerNorm")
    other = randomise(ViT(layers), 1)
    result = fuse([model, other], inputs, [0, 1], matching=ROTATED, calibration="none")
    assert result.parents[1].rotations
    assert_same_function(result.model, other, inputs)


def test_the_result_is_a_module_of_the_same_architecture():
    model, other = (randomise(GPT(), seed) for seed in (0, 1))
    result = fuse([model, other], TEXTS, matching=ROTATED, calibration="none").model
    fresh = GPT()
    fresh.load_state_dict(result.state_dict())
    assert torch.equal(output(fresh.eval(), TEXTS), output(result, TEXTS))
    torch.testing.assert_close(fresh.norm.weight, torch.ones(WIDTH))


def test_a_barycentre_of_rotated_copies_comes_to_rest():
    model, inputs = built("GPT, RMSNorm")
    models = [model, *(rotated_copy(model, inputs, seed) for seed in (1, 2))]
    result = fuse(
        models, inputs, matching=ROTATED, merging=Merging(Barycentre()), calibration="none"
    )
    assert result.converged
    assert all(one.rotations for one in result.parents)
    assert_same_function(result.model, model, inputs)


def test_a_template_takes_rotated_parents():
    model, inputs = built("GPT, RMSNorm")
    template = Like(GPT(3, nn.RMSNorm, has_bias=False))
    models = [model, turned(model, inputs)]
    result = fuse(models, inputs, matching=ROTATED, target=template, calibration="none")
    assert_same_function(result.model, model, inputs)


def test_many_pairs_rotate_as_one():
    model, inputs = built("GPT, RMSNorm")
    pair = {"a": model, "b": randomise(GPT(norm=nn.RMSNorm, has_bias=False), 1)}
    (found,) = fuse_pairs(pair, inputs, matching=ROTATED, calibration="repair")
    alone = fuse(pair, inputs, matching=ROTATED, calibration="repair")
    assert alone.parents[1].rotations
    assert torch.equal(output(found.model, inputs), output(alone.model, inputs))


def test_networks_without_such_streams_are_matched_as_ever():
    inputs = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [resnet(1, 1), resnet(2, 1, seed=1)]
    plain, rotated = (
        fuse(models, inputs, matching=one, calibration="repair").model.state_dict()
        for one in (Matching(), ROTATED)
    )
    assert all(torch.equal(one, rotated[name]) for name, one in plain.items())


def test_the_naive_average_knows_no_rotation():
    model, inputs = built("GPT, RMSNorm")
    pair = [model, rotated_copy(model, inputs)]
    problem = fuse(pair, inputs, matching=ROTATED, calibration="none").problem
    naive = naive_average(problem, [0, 1])
    weight = pair[1].layers[0].up.weight
    torch.testing.assert_close(naive.layers[0].up.weight, weight, rtol=0, atol=1e-5)
    assert_same_function(naive, model, inputs)


def test_reports_say_what_was_rotated():
    model, inputs = built("GPT, RMSNorm")
    result = fuse([model, rotated_copy(model, inputs)], inputs, matching=ROTATED)
    assert "rotated      characters.weight of models[1]" in summary(result)
    assert result.to_dict()["parents"][1]["rotated"] == ["characters.weight"]


def test_streams_of_other_widths_are_matched_by_plans_and_told():
    model, other = randomise(ViT()), randomise(ViT(width=8), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WidthWarning)
        result = fuse([model, other], IMAGES, matching=ROTATED, calibration="none")
    told = [str(one.message) for one in caught]
    assert any("has 8 channels in models[1] and 12 in the result" in one for one in told)
    assert not result.parents[1].rotations


def test_profiles_must_be_made_for_rotations():
    model, inputs = built("GPT, RMSNorm")
    pair = [model, rotated_copy(model, inputs)]
    config = FusionConfig(matching=ROTATED, calibration="none")
    profiles = [profile(one, inputs, config) for one in pair]
    result = fuse_aligned(align_profiles(["a", "b"], profiles, config), inputs, config=config)
    assert_same_function(result.model, model, inputs)
    with pytest.raises(InputError, match=r"models\[0\] was profiled for another solver"):
        fuse_aligned(align(pair, inputs), inputs, config=config)


def test_models_stay_as_they_are():
    model, inputs = built("GPT, RMSNorm")
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse([model, permuted_copy(model, inputs)], inputs, matching=ROTATED, calibration="none")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_nearest_rotation_is_the_one_that_was_applied():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=draw)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=draw))[0]
    found = nearest_rotation(x.T @ (x @ rotation), is_centred=False)
    torch.testing.assert_close(found, rotation)


def test_rotations_need_networks():
    with pytest.raises(InputError, match="rotates the streams of networks"):
        solve_transport([torch.rand(3, 3)], solver="orthogonal")
