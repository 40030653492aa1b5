"""Copies that compute the same function with their hidden parts in another order come back."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import WidthWarning, fuse, trace
from tests.support.assertions import assert_same_function
from tests.support.data import CALIBRATIONS

TOKENS = torch.randn(60, 12, 8, generator=torch.Generator().manual_seed(0))

SHARED = ("tied", "fixed")


class Mixer(nn.Module):
    """An MLP-Mixer (arXiv 2105.01601): layers over the positions, then over the channels."""

    def __init__(self, units=10, hidden=20, width=16, depth=2, convolutions=False):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.into, self.out = (
            nn.ModuleList(
                nn.Conv1d(a, b, 1) if convolutions else nn.Linear(a, b) for _ in range(depth)
            )
            for a, b in ((12, units), (units, 12))
        )
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.convolutions = convolutions

    def forward(self, x):
        x = self.embed(x)
        for i, (into, out) in enumerate(zip(self.into, self.out, strict=True)):
            y = self.norms[2 * i](x)
            if self.convolutions:
                x = x + out(F.gelu(into(y)))
            else:
                x = x + out(F.gelu(into(y.transpose(1, 2)))).transpose(1, 2)
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))


class Probe(nn.Module):
    """Pools by a query that is learnt, and so the same for all inputs."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.embed, self.probe = nn.Linear(8, width), nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down, self.head = (
            nn.Linear(width, 32),
            nn.Linear(32, width),
            nn.Linear(width, 5),
        )

    def forward(self, x):
        x = F.gelu(self.embed(x))
        query = self.probe.repeat(x.shape[0], 1, 1)
        y = self.attention(query, x, x, need_weights=False)[0]
        return self.head((y + self.down(F.gelu(self.up(y))))[:, 0])


def drawn(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def with_other_units(model):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for into, out in zip(moved.into, moved.out, strict=True):
            order = torch.randperm(len(into.weight), generator=torch.Generator().manual_seed(3))
            into.weight.copy_(into.weight[order])
            into.bias.copy_(into.bias[order])
            out.weight.copy_(out.weight[:, order])
    return moved


def with_another_probe(model):
    """The channels of the query, and the columns that read them, in another order."""
    moved = copy.deepcopy(model)
    width = moved.probe.size(2)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        moved.probe.copy_(moved.probe[..., order])
        weight = moved.attention.in_proj_weight
        weight[:width] = weight[:width][:, order].clone()
    return moved


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(
    ("model", "change"),
    [
        (Mixer(), with_other_units),
        (Mixer(convolutions=True), with_other_units),
        (Probe(), with_another_probe),
    ],
    ids=["mixer", "mixer of convolutions", "probe"],
)
def test_a_copy_in_another_order_is_the_model_itself(model, change, calibration):
    model = drawn(model, 0)
    moved = change(model)
    assert_same_function(moved, model, TOKENS)
    assert_same_function(fuse([model, moved], TOKENS, calibration=calibration).model, model, TOKENS)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_units_over_positions_may_differ_in_number(calibration):
    wide, narrow = drawn(Mixer(units=20), 0), drawn(Mixer(units=10), 1)
    for weights, parent in (([1, 0], wide), ([0, 1], narrow)):
        fused = fuse([wide, narrow], TOKENS, weights, calibration=calibration).model
        assert_same_function(fused, parent, TOKENS)


class Crossed(nn.Module):
    """Mixes rows by a convolution, then columns by a linear layer, which does not read the rows."""

    def __init__(self, units):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.rows, self.columns = nn.Conv2d(3, units, 1), nn.Linear(4, 6)

    def forward(self, x):
        x = self.embed(x).unflatten(1, (3, 4)).transpose(2, 3)  # rows, channels, columns
        return self.head(self.columns(F.gelu(self.rows(x))).mean((1, 3)))


class Shared(nn.Module):
    """A layer over the positions whose bias is also that of the next layer, or no parameter."""

    def __init__(self, how):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.into, self.out = nn.Linear(12, 12), nn.Linear(12, 12)
        self.how = how
        self.register_buffer("fixed", torch.linspace(-1, 1, 12))
        if how == "tied":
            self.out.bias = self.into.bias

    def forward(self, x):
        y = self.embed(x).transpose(1, 2)
        bias = self.into.bias if self.how == "tied" else self.fixed
        y = self.out(F.gelu(F.linear(y, self.into.weight, bias)))
        return self.head(y.transpose(1, 2).mean(1))


@pytest.mark.parametrize(
    "make",
    [lambda: Crossed(7), lambda: Crossed(4), *(partial(Shared, how) for how in SHARED)],
    ids=["other axis", "other axis of one size", *SHARED],
)
def test_units_over_positions_that_cannot_move_keep_their_places(make):
    model = drawn(make(), 0)
    traced = trace(model, TOKENS)
    assert [group.size for group in traced.groups] == [16]
    fused = fuse([model, drawn(make(), 1)], TOKENS, [1, 0], calibration="none").model
    assert_same_function(fused, model, TOKENS)


def with_other_inner_channels(model):
    """Mamba's inner channels, each with its convolution, its time step and its states."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moved.backbone.layers:
            mixer = layer.mixer
            size = len(mixer.D)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
            mixer.in_proj.weight.copy_(
                mixer.in_proj.weight.view(2, size, -1)[:, order].flatten(0, 1)
            )
            for one in (
                mixer.conv1d.weight,
                mixer.conv1d.bias,
                mixer.dt_proj.weight,
                mixer.dt_proj.bias,
                mixer.A_log,
                mixer.D,
            ):
                one.copy_(one[order])
            for one in (mixer.x_proj.weight, mixer.out_proj.weight):
                one.copy_(one[:, order])
    return moved


def with_other_states(model):
    """Mamba's states: what writes them, what reads them, and how fast each fades."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moved.backbone.layers:
            mixer = layer.mixer
            count, rank = mixer.A_log.size(1), mixer.time_step_rank
            order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
            mixer.A_log.copy_(mixer.A_log[:, order])
            rows = [torch.arange(rank), rank + order, rank + count + order]
            mixer.x_proj.weight.copy_(mixer.x_proj.weight[torch.cat(rows)])
    return moved


def mamba(seed=0, states=4):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=states,
        time_step_rank=4,
        use_cache=False,
    )
    return drawn(transformers.MambaForCausalLM(config), seed)


WORDS = torch.randint(0, 40, (60, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("change", [with_other_inner_channels, with_other_states])
def test_the_inner_channels_and_the_states_of_mamba_are_matched(change, calibration):
    model = mamba()
    moved = change(model)
    wanted = model(WORDS).logits
    torch.testing.assert_close(moved(WORDS).logits, wanted)
    fused = fuse([model, moved], WORDS, calibration=calibration).model
    torch.testing.assert_close(fused(WORDS).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_numbers_of_states_may_differ():
    many, few = mamba(states=8), mamba(1)
    with pytest.warns(WidthWarning, match="4 in .* and 8 in the result"):
        fused = fuse([many, few], WORDS, [1, 0], calibration="none").model
    torch.testing.assert_close(fused(WORDS).logits, many(WORDS).logits)


class Scan(nn.Module):
    """A selective scan whose states fade as a parameter says, or each as a constant says."""

    def __init__(self, states=5, inner=6, constant=False):
        super().__init__()
        self.enter, self.pace, self.head = nn.Linear(8, 16), nn.Linear(16, inner), nn.Linear(6, 5)
        self.write, self.read = nn.Linear(16, states), nn.Linear(16, states, bias=False)
        self.value, self.leave = nn.Linear(16, inner), nn.Linear(inner, 6)
        self.gain = nn.Parameter(torch.ones(states))
        self.fading = nn.Parameter(torch.zeros(inner, states))
        self.register_buffer("constant", torch.linspace(0.1, 2, states) if constant else None)

    def forward(self, x):
        x = F.gelu(self.enter(x))
        pace = F.softplus(self.pace(x)).unsqueeze(3)
        fading = self.fading.exp() * pace
        kept = torch.exp(-fading if self.constant is None else -fading * self.constant)
        written = (pace * self.value(x).unsqueeze(3)) * (self.gain * self.write(x)).unsqueeze(2)
        state, read = torch.zeros_like(written[:, 0]), []
        for i in range(x.size(1)):
            state = kept[:, i] * state + written[:, i]
            read.append((state * self.read(x[:, i]).unsqueeze(1)).sum(2))
        return self.head(torch.relu(self.leave(torch.stack(read, 1)).mean(1)))


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_states_of_any_scan_are_matched(calibration):
    model = drawn(Scan(), 0)
    moved = copy.deepcopy(model)
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for one in (moved.write.weight, moved.write.bias, moved.gain, moved.read.weight):
            one.copy_(one[order])
        moved.fading.copy_(moved.fading[:, order])
    assert_same_function(moved, model, TOKENS)
    assert_same_function(fuse([model, moved], TOKENS, calibration=calibration).model, model, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_are_found_whatever_the_type_of_the_weights(dtype):
    traced = trace(drawn(Scan(), 0).to(dtype), TOKENS.to(dtype))
    assert [one.size for one in traced.groups] == [16, 6, 5, 6]


def test_states_that_cannot_change_places_keep_them():
    model = drawn(Scan(constant=True), 0)
    assert [one.size for one in trace(model, TOKENS).groups] == [16, 6, 6]
    assert [one.size for one in trace(drawn(Scan(), 0), TOKENS).groups] == [16, 6, 5, 6]
    fused = fuse([model, drawn(Scan(constant=True), 1)], TOKENS, [1, 0], calibration="none").model
    assert_same_function(fused, model, TOKENS)


def with_heads_in_another_order(model):
    """Swin's heads, each with its column of the table of relative positions."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for stage in moved.swin.encoder.layers:
            for block in stage.blocks:
                attention = block.attention
                table = attention.relative_position_bias.relative_position_bias_table
                heads = table.size(1)
                order = torch.arange(heads).roll(1)
                table.copy_(table[:, order])
                for one in (attention.q_proj, attention.k_proj, attention.v_proj):
                    for values in (one.weight, one.bias):
                        values.copy_(values.unflatten(0, (heads, -1))[order].flatten(0, 1))
                weight = attention.o_proj.weight
                weight.copy_(weight.unflatten(1, (heads, -1))[:, order].flatten(1))
    return moved


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_the_heads_of_swin_are_matched_with_their_tables(calibration):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=4
    )
    model = drawn(transformers.SwinForImageClassification(config), 0)
    moved = with_heads_in_another_order(model)
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images).logits
        torch.testing.assert_close(moved(images).logits, wanted)
        fused = fuse([model, moved], images, calibration=calibration).model
        torch.testing.assert_close(fused(images).logits, wanted, rtol=1e-3, atol=1e-4)
