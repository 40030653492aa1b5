"""Streams that admit any orthogonal map: which are found, what folding does, what is refused."""

import pytest
import torch
from torch import nn

from clafusion import fuse, summary, trace
from clafusion.cli.facts import model_facts
from clafusion.tracing.rotatable import folded_state, random_rotation
from clafusion.tracing.rotations import find_rotatable
from clafusion.weights.build import with_state
from tests.support.networks import output, randomise, resnet
from tests.support.pre_norm import GPT, MODELS, TEXTS, WIDTH, built, rotated_copy


class Reading(nn.Module):
    """A stream that another layer reads without the norm, before a nonlinearity or behind one."""

    def __init__(self, *, is_direct):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8), nn.RMSNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 5)
        self.is_direct = is_direct

    def forward(self, x):
        x = self.enter(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(x if self.is_direct else x.relu())


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.enter(x))
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_behind_norms_is_found(name):
    model, inputs = built(name)
    found = find_rotatable(trace(model, inputs))
    (group,) = found.groups
    assert not found.refused
    assert group.size == WIDTH
    assert group.is_centred == ("LayerNorm" in name)
    copy = rotated_copy(model, inputs)
    want = output(model, inputs)
    gap = (output(copy, inputs) - want).abs().max() / want.abs().max()
    assert gap < 1e-5
    moved = copy.layers[0].up.weight - model.layers[0].up.weight
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_folding_leaves_the_function(name):
    model, inputs = built(name)
    with torch.no_grad():
        for key, one in model.named_parameters():
            if key.endswith(("scale", "token", "positions")):
                one.uniform_(0.5, 1.5)
    traced = trace(model, inputs)
    groups = find_rotatable(traced).groups
    state = folded_state(traced.state(), groups)
    folded = with_state(model, {key: state[key] for key in state}, traced.aliases)
    want = output(model, inputs)
    assert (output(folded, inputs) - want).abs().max() < 1e-5 * want.abs().max()
    for key, one in folded.named_parameters():
        if "norm" in key:
            neutral = 0.0 if key.endswith("bias") or "1 + gain" in name else 1.0
            assert torch.equal(one, torch.full_like(one, neutral))
        if key.endswith("scale"):
            assert torch.equal(one, torch.ones_like(one))
    if "LayerNorm" in name:
        assert folded.layers[0].down.weight.mean(0).abs().max() < 1e-6
        assert model.layers[0].down.weight.mean(0).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("build", "inputs", "message"),
    [
        (lambda: GPT(is_tied=True), TEXTS, "'characters.weight' is tied: it writes the channels"),
        (lambda: GPT(has_bias=False), TEXTS, "has no bias that could take"),
        (PostNorm, torch.randn(8, 6), "add reads what 'norm.weight' scales"),
        (lambda: Reading(is_direct=False), torch.randn(8, 6), "rotating it changes the outputs"),
    ],
    ids=["tied", "no bias", "post-norm", "nonlinearity on the stream"],
)
def test_what_tells_channels_apart_is_refused(build, inputs, message):
    found = find_rotatable(trace(randomise(build()), inputs))
    assert not found.groups
    (reason,) = found.refused.values()
    assert message in reason


def test_a_linear_layer_may_read_the_stream_itself():
    found = find_rotatable(trace(randomise(Reading(is_direct=True)), torch.randn(8, 6)))
    assert [one.size for one in found.groups] == [8]


def test_summaries_name_streams_and_reasons():
    traced = trace(*built("GPT, RMSNorm"))
    assert "rotatable    characters.weight (12)" in summary(traced)
    assert model_facts(traced)["rotatable"] == [{"name": "characters.weight", "channels": WIDTH}]
    tied = trace(randomise(GPT(is_tied=True)), TEXTS)
    assert "unrotatable  characters.weight: 'characters.weight' is tied" in summary(tied)
    assert model_facts(tied)["unrotatable"].keys() == {"characters.weight"}


def test_convolutional_networks_have_none():
    found = find_rotatable(trace(resnet(1, 1), torch.randn(4, 3, 8, 8)))
    assert not found.groups
    assert not found.refused


def test_rotations_are_orthogonal_and_keep_the_mean():
    (group,) = find_rotatable(trace(*built("GPT, LayerNorm"))).groups
    rotation = random_rotation(group, torch.Generator().manual_seed(0))
    eye, ones = torch.eye(WIDTH).double(), torch.ones(WIDTH).double()
    torch.testing.assert_close(rotation @ rotation.T, eye)
    torch.testing.assert_close(rotation @ ones, ones)
    assert (rotation - eye).abs().max() > 0.1


class NormInside(nn.Module):
    """A block that reads a stream of its own through a norm; its outputs are scaled."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 9)
        self.inner, self.down = nn.LayerNorm(9), nn.Linear(9, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return x + self.scale * self.down(self.inner(self.up(self.norm(x))))


def test_streams_whose_norms_and_scales_share_a_layer_are_folded_together():
    torch.manual_seed(0)
    blocks = [nn.Linear(6, 8), NormInside(), NormInside(), nn.LayerNorm(8), nn.Linear(8, 5)]
    model = randomise(nn.Sequential(*blocks)).eval()
    inputs = torch.randn(200, 6)
    traced = trace(model, inputs)
    groups = find_rotatable(traced).groups
    assert len(groups) == 3
    want = output(model, inputs[:6])
    for order in (groups, groups[::-1]):
        (found,) = traced.run((inputs[:6],), state=folded_state(traced.state(), order))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    fused = fuse(
        [model, model], inputs, [1.0, 0.0], matching={"solver": "orthogonal"}, calibration="none"
    )
    torch.testing.assert_close(output(fused.model, inputs[:6]), want, rtol=1e-4, atol=1e-5)


class WithBlocks(nn.Module):
    """Two stages of blocks, of which each network may have more in another stage."""

    def __init__(self, first, second, width=8):
        super().__init__()
        self.enter, self.head = nn.Linear(6, width), nn.Linear(10, 5)
        self.first = nn.Sequential(*[Residual(width) for _ in range(first)])
        self.norm, self.change = nn.LayerNorm(width), nn.Linear(width, 10)
        self.second = nn.Sequential(*[Residual(10) for _ in range(second)])
        self.last = nn.LayerNorm(10)

    def forward(self, x):
        x = self.change(self.norm(self.first(self.enter(x))))
        return self.head(self.last(self.second(x)))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 9),
            nn.Linear(9, width),
        )

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.filterwarnings("ignore::clafusion.WidthWarning")
@pytest.mark.parametrize("target", ["union", "wide"])
def test_structures_made_for_the_result_are_rotated_too(target):
    torch.manual_seed(0)
    inputs = torch.randn(200, 6)
    if target == "union":
        models, options = [WithBlocks(3, 1), WithBlocks(1, 2)], {}
    else:
        models, options = [WithBlocks(2, 2), WithBlocks(2, 1, width=12)], {"width": "wide"}
    models = [randomise(one).eval() for one in models]
    result = fuse(
        models,
        inputs,
        matching={"solver": "orthogonal"},
        calibration="none",
        target={"name": "deeper", **options},
    )
    assert result.problem.target.rotatable
    assert torch.isfinite(output(result.model, inputs)).all()


def test_a_gain_added_to_itself_is_no_number():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.gain = nn.Linear(6, 8), nn.Parameter(torch.rand(8) + 0.5)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.enter(x)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return self.head(x * (self.gain + self.gain))

    find_rotatable(trace(Doubled().eval(), torch.randn(4, 6)))
