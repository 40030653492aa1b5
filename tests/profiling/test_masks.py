"""Padding does not count: more of it changes nothing, in profiles, statistics and regressions."""

import pytest
import torch
from torch import nn

import clafusion
from clafusion.assessment.comparison import Comparison
from clafusion.profiling import masks
from clafusion.profiling.importance import channel_importance
from clafusion.profiling.masks import (
    counted_inputs,
    counting_values,
    joined_masks,
    masks_of_parts,
    without_masked,
    zeroed,
)
from clafusion.profiling.moments import batch_moments, moment_axes
from clafusion.tracing.padding import PaddedAxes
from tests.support.hugging_face import network, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning"),
    pytest.mark.filterwarnings("ignore::clafusion.FusionWarning"),
]


def padded(length, pad=0):
    """Return sentences of three to nine tokens, padded to a length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((80, length), pad)
    mask = torch.zeros(80, length, dtype=torch.int64)
    for i in range(80):
        size = 9 if i == 0 else int(torch.randint(3, 10, (), generator=generator))
        tokens[i, :size] = torch.randint(3, 23, (size,), generator=generator)
        mask[i, :size] = 1
    named = {"input_ids": tokens, "attention_mask": mask}
    return [{name: value[i : i + 40] for name, value in named.items()} for i in (0, 40)]


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_more_padding_changes_nothing(calibration, monkeypatch):
    pytest.importorskip("transformers")
    parents = [network("GPT-2", 3), network("GPT-2", 2, seed=1)]
    exact = {"calibration": calibration, "matching": {"cost": "correlation"}}

    def fused(length):
        result = clafusion.fuse(parents, padded(length), **exact)
        batch = padded(9)[0]
        kept = batch["attention_mask"] == 1
        return outputs(result.model, batch)[kept], result.assessment.result.distance

    short, long = fused(9), fused(15)
    torch.testing.assert_close(short[0], long[0], rtol=1e-3, atol=1e-3)
    assert short[1] == pytest.approx(long[1], rel=1e-3)
    monkeypatch.setattr(masks, "mask_place", lambda _: None)
    counting = fused(15)
    assert (counting[0] - short[0]).abs().max() > 0.05
    assert counting[1] != pytest.approx(short[1], rel=1e-2)


@pytest.mark.parametrize("kind", ["activation", "sensitivity"])
def test_more_padding_changes_no_importance(kind):
    pytest.importorskip("transformers")
    model = network("GPT-2", 2)
    found = []
    for length in (9, 15):
        data = padded(length)
        traced = clafusion.trace(model, data[0])
        found.append(torch.cat(channel_importance(traced, data, kind)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_what_is_no_mask_of_positions_is_none():
    class Model:
        keywords = ("attention_mask",)

    kept = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masks.kept_positions(Model, (kept,)).tolist() == kept.bool().tolist()
    assert masks.kept_positions(Model, (torch.ones(2, 3),)) is None
    assert masks.kept_positions(Model, (torch.zeros(2, 3),)) is None
    assert masks.kept_positions(Model, (kept * -1e9,)) is None
    assert masks.kept_positions(Model, (kept[None],)) is None
    Model.keywords = ("attention_mask", "decoder_input_ids")
    assert masks.kept_positions(Model, (kept, kept)) is None
    Model.keywords = ()
    assert masks.kept_positions(Model, (kept,)) is None


class LaidOut(nn.Module):
    """Layers whose values are laid out in every way, and an image's patches beside the text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(23, 5)
        self.usual, self.turned, self.rows = (nn.Linear(5, 5) for _ in range(3))
        self.other_rows, self.first, self.patches = (nn.Linear(5, 5) for _ in range(3))
        self.convolution, self.head = nn.Conv1d(5, 5, 1), nn.Linear(10, 3)

    def forward(self, input_ids, attention_mask, image):
        mask = attention_mask[..., None].float()
        x = self.usual(self.table(input_ids))
        x = self.turned(x.transpose(0, 1)).transpose(0, 1)
        x = self.rows(x.reshape(-1, 5)).reshape(x.shape)
        x = self.other_rows(x.transpose(0, 1).reshape(-1, 5)).reshape(x.transpose(0, 1).shape)
        x = self.convolution(x.permute(1, 2, 0)).transpose(1, 2)
        text = (self.first(x) * mask).sum(1) / mask.sum(1)
        return self.head(torch.cat([text, self.patches(image).mean(1)], 1))


@pytest.mark.parametrize("count", [3, 5])  # with 5 inputs as many inputs as positions and channels
def test_values_lose_their_padding_however_they_are_laid_out(count):
    generator = torch.Generator().manual_seed(0)
    tokens, others = torch.randint(0, 23, (2, count, 5), generator=generator)
    mask = torch.ones(count, 5, dtype=torch.int64)
    mask[0, 3:] = mask[1, 1:] = 0
    image = torch.randn(count, 5, 5, generator=generator)
    traced = clafusion.trace(
        LaidOut().eval(), {"input_ids": tokens, "attention_mask": mask, "image": image}
    )
    axes = {
        node.name: traced.padded_axes.get(node.name)
        for node in traced.module.graph.nodes
        if node.op == "call_function" and node.target.__name__.split(".")[0] in ("linear", "conv1d")
    }
    assert list(axes.values()) == [
        PaddedAxes(0, 1),
        PaddedAxes(1, 0),
        PaddedAxes(0, 0),
        PaddedAxes(0, 0, positions_first=True),
        PaddedAxes(0, 2),
        PaddedAxes(0, 1),
        None,
        None,
    ]
    kept = mask == 1
    changed = torch.where(kept, tokens, others)
    moments = [
        batch_moments(traced, (one, mask, image), moment_axes(traced)) for one in (tokens, changed)
    ]
    for node, (mean, deviation) in moments[0].items():
        torch.testing.assert_close(moments[1][node][0], mean)
        torch.testing.assert_close(moments[1][node][1], deviation)
    last = list(axes)[4]
    found: list[torch.Tensor] = []
    traced.run(
        (tokens, mask, image),
        state=traced.state(),
        replace=lambda node, value: found.append(value) or value if node.name == last else value,
    )
    (value,) = found
    counting = counting_values(traced, last, value, kept)
    assert torch.equal(counting, kept[:, None])
    rows, axis = without_masked(value, 1, counting)
    assert axis == 1
    assert torch.equal(rows, value.transpose(1, 2)[kept])
    spoilt = torch.where(counting, value, torch.nan)
    assert torch.equal(zeroed(spoilt, counting), torch.where(counting, value, 0.0))
    assert counting_values(traced, last, value, None) is None
    assert counting_values(traced, list(axes)[-1], value[:, 0], kept) is None


def test_masks_are_cut_and_joined():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert counted_inputs([mask, None], [2, 2]) == 3
    joined = joined_masks([None, mask], [1, 2])
    assert joined.tolist() == [[True] * 3, *mask.tolist()]
    assert joined_masks([None, None], [1, 2]) is None
    # Inputs that are padding as a whole lose no other part its mask, and have one themselves.
    whole = torch.zeros(4, 3, dtype=torch.bool)
    whole[3] = True
    parts = masks_of_parts(whole, [(torch.zeros(2),), (torch.zeros(2),)])
    assert [one.any().item() for one in parts] == [False, True]
    assert masks_of_parts(None, [(torch.zeros(2),)]) == [None]


def test_a_comparison_leaves_out_padding():
    generator = torch.Generator().manual_seed(0)
    parents = [torch.randn(6, 5, 7, generator=generator) for _ in range(2)]
    result = torch.randn(6, 5, 7, generator=generator)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3:] = False
    found = []
    for values, kept in (
        ([*parents, result], mask),
        ([one[:, :3] for one in (*parents, result)], None),
    ):
        for kind in ("classes", "values"):
            sums = Comparison(kind, -1, (0.5, 0.5))
            sums.add(values[:2], values[2], kept)
            found.append(sums.assessment(("a", "b"), True).to_dict())
    for one, other in zip(found[:2], found[2:], strict=True):
        assert one["result"] == pytest.approx(other["result"])
        assert one["between_parents"] == pytest.approx(other["between_parents"])
        assert one["nearer"] == other["nearer"]


class Shortening(nn.Module):
    """Makes one frame of every two samples, as networks for sound do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frames, self.head = nn.Conv1d(1, 6, 2, stride=2), nn.Linear(6, 3)

    def forward(self, input_values, attention_mask):
        kept = attention_mask[:, ::2, None].float()
        x = self.frames(input_values[:, None] * attention_mask[:, None]).relu().transpose(1, 2)
        return self.head((x * kept).sum(1) / kept.sum(1))


@pytest.mark.filterwarnings("default::clafusion.FusionWarning")
def test_padding_that_cannot_be_followed_is_told():
    mask = torch.ones(120, 8, dtype=torch.int64)
    mask[::2, 4:] = 0
    batch = {"input_values": torch.randn(120, 8), "attention_mask": mask}
    models = [Shortening().eval(), Shortening().eval()]
    with pytest.warns(clafusion.FusionWarning, match=r"padding counts in models\[0\]"):
        clafusion.fuse(models, [batch], calibration="repair")


def test_positions_that_are_the_classes_lose_their_padding():
    generator = torch.Generator().manual_seed(0)
    parents, result = torch.randn(2, 6, 5, generator=generator), torch.randn(6, 5)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 5:] = False
    longer = [torch.cat([one, torch.full((6, 3), 9.0)], 1) for one in (*parents, result)]
    found = []
    for values, kept in (([*parents, result], None), (longer, mask)):
        sums = Comparison("classes", -1, (0.5, 0.5))
        sums.add(values[:2], values[2], kept)
        found.append(sums.assessment(("a", "b"), True).to_dict())
    assert found[1]["result"] == pytest.approx(found[0]["result"])
    assert found[1]["parents"] == found[0]["parents"]
