"""Networks with many outputs at many positions compute them at some positions only."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import clafusion
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.profiling.thinning import alike, as_thinned, thinned, whole_numbers
from tests.support.memory import LiveTensors

POSITIONS, WORDS, INPUTS = 512, 4096, 24
COUNT = 64  # of the positions: 2**18 outputs of an input


class Words(nn.Module):
    """A language model: residual blocks, of which each position sees the mean of all."""

    def __init__(self, depth, seed=0, words=WORDS, after="linear"):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
            for _ in range(depth)
        )
        self.head = nn.Linear(8, words)
        self.after = after

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        counting = attention_mask.unsqueeze(-1).to(x.dtype)
        x = x + (x * counting).sum(1, keepdim=True) / counting.sum(1, keepdim=True)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        if self.after == "capped":
            return 30 * torch.tanh(logits / 30)
        return logits.softmax(1) if self.after == "mixed" else logits


def tokens(count=INPUTS, positions=POSITIONS):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(count, positions, dtype=torch.long)
    for i in range(0, count, 3):
        mask[i, 1 + int(torch.randint(positions - 1, (), generator=generator)) :] = 0
    mask[0, 3:] = 0
    ids = torch.randint(50, (count, positions), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def few(batch, count=4):
    return {name: value[:count] for name, value in batch.items()}


def test_no_position_of_padding_is_taken_and_all_of_them_count():
    batch = tokens()
    model = thinned(clafusion.trace(Words(1), few(batch)))
    assert (model.thinning.positions, model.thinning.count) == (POSITIONS, COUNT)
    assert thinned(model) is model
    inputs = tuple(batch.values())
    index = model.thinning.index(inputs)
    assert index.shape == (INPUTS, COUNT)
    assert bool((index.diff(dim=1) >= 0).all())
    assert bool(batch["attention_mask"].gather(1, index).bool().all())
    assert set(index[0].tolist()) == {0, 1, 2}
    full = batch["attention_mask"].all(1).nonzero().squeeze(1)
    assert len(set(index[full[0]].tolist())) == COUNT
    assert all(torch.equal(index[i], index[full[0]]) for i in full)
    of_full = model.thinning.index(tuple(one[full] for one in inputs))
    assert torch.equal(of_full, index[full])  # it does not matter what else is in the batch


@pytest.mark.parametrize("after", ["linear", "capped"])
def test_outputs_are_the_whole_ones_at_these_positions(after):
    batch = tokens(6)
    net = Words(2, after=after)
    whole = clafusion.trace(net, few(batch))
    inputs = tuple(batch.values())
    model = thinned(whole)
    (found,), (wanted,) = model.run(inputs), whole.run(inputs)
    assert found.shape == (6, COUNT, WORDS)
    torch.testing.assert_close(found, as_thinned(model, inputs, wanted))
    assert whole_numbers(model, 0) == whole_numbers(whole, 0) == POSITIONS * WORDS


def test_other_networks_stay_as_they_are():
    batch = few(tokens())
    for net in (Words(1, words=100), Words(1, after="mixed")):
        assert thinned(clafusion.trace(net, batch)).thinning is None
    classifier = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert thinned(clafusion.trace(classifier, torch.randn(5, 4))).thinning is None


def test_networks_are_thinned_together_or_not_at_all():
    one = thinned(clafusion.trace(Words(1), few(tokens())))
    other = replace(one, thinning=None)
    assert alike([one, one]) == [one, one]
    assert [found.thinning for found in alike([one, other])] == [None, None]


@pytest.mark.parametrize("calibration", ["least_squares", "repair"])
def test_outputs_of_all_inputs_are_never_held(calibration):
    batch = tokens()
    data = [{k: v[i : i + 8] for k, v in batch.items()} for i in range(0, INPUTS, 8)]
    config = clafusion.FusionConfig(calibration=calibration)
    traced = [
        thinned(clafusion.trace(Words(depth, seed), few(batch))) for depth, seed in ((2, 0), (1, 1))
    ]
    with LiveTensors() as live:
        profiles = [clafusion.profile(one, data, config) for one in traced]
        aligned = align_profiles(["a", "b"], profiles, config)
        result = fuse_aligned(aligned, data, config=config)
    whole = 4 * INPUTS * POSITIONS * WORDS
    assert live.largest <= whole / 3
    assert live.most < whole
    assert result.problem.target.thinning is not None
    assert result.assessment.kind == "classes"
    assert result.assessment.num_inputs == INPUTS
    if calibration == "least_squares":
        assert not result.assessment.nearer


def test_a_permuted_copy_gives_the_network_itself():
    batch = tokens()
    net, copy = Words(2), Words(2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in copy.blocks:
            block[1].weight.copy_(block[1].weight[order])
            block[1].bias.copy_(block[1].bias[order])
            block[3].weight.copy_(block[3].weight[:, order])
    result = clafusion.fuse([net, copy], [batch])
    torch.testing.assert_close(result.model(**few(batch)), net(**few(batch)))
    assert result.assessment.result.agreement == 1.0
