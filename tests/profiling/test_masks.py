"""Padding does not count: more of it changes nothing, in profiles, statistics and regressions."""

import pytest
import torch

import clafusion
from clafusion.assessment.comparison import Comparison
from clafusion.profiling import masks
from clafusion.profiling.importance import channel_importance
from clafusion.profiling.masks import (
    counted_inputs,
    joined_masks,
    kept_rows,
    without_masked,
    zeroed,
)
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
    monkeypatch.setattr(masks, "MASK", "no input is called so")
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


def test_values_lose_their_padding():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    value = torch.arange(24.0).view(2, 3, 4)
    kept, axis = without_masked(value, -1, mask)
    assert axis == 1
    assert torch.equal(kept, torch.stack([value[0, 0], value[0, 1], value[1, 0]]))
    assert torch.equal(without_masked(value.transpose(1, 2), 1, mask)[0], kept)
    assert torch.equal(without_masked(value.view(6, 4), 1, mask)[0], kept)
    assert without_masked(value[:, 0], 1, mask)[0].shape == (2, 4)
    assert without_masked(value, 2, None) == (value, 2)
    assert zeroed(value, mask).sum() == kept.sum() == zeroed(value.view(6, 4), mask).sum()
    assert zeroed(value[:, 0], mask) is not None
    assert kept_rows(mask, 3, torch.tensor([0, 1])).tolist() == [0, 1, 2]
    assert kept_rows(mask, 4, torch.tensor([0, 1])) is None
    assert kept_rows(mask, 3, torch.tensor([0])) is None
    assert counted_inputs([mask, None], [2, 2], 3) == 3
    assert counted_inputs([mask], [2], 7) == 2
    joined = joined_masks([None, mask], [1, 2])
    assert joined.tolist() == [[True] * 3, *mask.tolist()]
    assert joined_masks([None, None], [1, 2]) is None


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
