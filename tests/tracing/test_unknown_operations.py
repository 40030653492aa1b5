"""What an operation without a rule reads keeps its place, and is told; the rest moves."""

import copy

import pytest
import torch
from torch import nn

from clafusion import PinnedWarning, fuse, summary, trace
from clafusion.cli.facts import model_facts
from clafusion.tracing.pinned import movable_share
from tests.support.assertions import assert_same_function

ROWS = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(30, 5, 6, generator=torch.Generator().manual_seed(1))


class Unknown(nn.Module):
    """An operation that the analysis does not know, in a module of its own."""

    def forward(self, x):
        return torch.linalg.matrix_exp(x.unflatten(-1, (2, 2))).flatten(-2)


class Net(nn.Module):
    def __init__(self, width=10, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.into = nn.Linear(6, width), nn.Linear(width, 4)
        self.unknown, self.head = Unknown(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.unknown(self.into(self.enter(x).relu()) / 9))


def test_channels_that_reach_it_are_pinned_and_told():
    traced = trace(Net(), ROWS)
    assert [one.size for one in traced.groups] == [10]
    (pinned,) = traced.pinned
    told = "4 of 'into.weight' (linalg_matrix_exp in 'unknown': the channel analysis has no rule"
    assert str(pinned).startswith(told)
    assert told in summary(traced)
    assert model_facts(traced)["movable"] == movable_share(traced)


def test_the_share_of_weights_that_can_move_is_counted():
    traced = trace(Net(), ROWS)
    # Of enter all 60 + 10 elements and of into the 40 of its weight, of 10 channels.
    assert movable_share(traced) == pytest.approx(110 / (70 + 44 + 15))
    assert f"{110 / 129:.0%} of the weights can move" in summary(traced)


def test_a_warning_tells_when_less_than_half_of_the_weights_can_move():
    wide, narrow = Net(30), Net(30, seed=1)
    with pytest.warns(PinnedWarning) as told:
        fuse([wide, narrow], ROWS, calibration="none")
    assert "Of all weights only these can move" not in str(told[0].message)

    class Mostly(Net):
        def __init__(self, seed):
            super().__init__(3, seed)
            self.into = nn.Linear(3, 36)
            self.head = nn.Linear(36, 30)

        def forward(self, x):
            hidden = self.into(self.enter(x).relu()).unflatten(-1, (6, 6)) / 9
            return self.head(torch.linalg.matrix_exp(hidden).flatten(-2))

    models = [Mostly(0), Mostly(1)]
    share = movable_share(trace(models[0], ROWS))
    assert share < 0.5
    with pytest.warns(PinnedWarning) as told:
        fuse(models, ROWS, calibration="none")
    assert (
        f"Of all weights only these can move: {share:.0%} of models[0], {share:.0%} of models[1]"
        in str(told[0].message)
    )


@pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning")
def test_what_moves_beside_it_still_fuses_back():
    model = Net()
    other = copy.deepcopy(model)
    order = torch.randperm(10)
    other.enter.weight.data, other.enter.bias.data = (
        model.enter.weight[order],
        model.enter.bias[order],
    )
    other.into.weight.data = model.into.weight[:, order]
    fused = fuse([model, other], ROWS, calibration="none").model
    assert_same_function(fused, model, ROWS)


def test_a_parameter_that_it_reads_is_told():
    class Table(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4) / 9)

        def forward(self, x):
            return super().forward(x) + torch.linalg.matrix_exp(self.table)[0, :3]

    told = {one.parameter: one.size for one in trace(Table(), ROWS).pinned}
    assert told == {"into.weight": 4, "table": 16}


def test_views_that_overlap_are_pinned_and_told():
    class Twice(Net):
        def forward(self, x):
            hidden = self.into(self.enter(x).relu())
            return self.head(hidden.relu()) + self.into.weight.sin()[:3, 0]

    traced = trace(Twice(), ROWS)
    assert traced.groups == ()
    assert {one.parameter for one in traced.pinned} == {"enter.weight", "into.weight"}
    assert all("it reads 'into.weight' in another way, too" in one.why for one in traced.pinned)


def test_recurrence_with_projected_states_is_pinned():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(6, 10), nn.Linear(3, 2)
            self.states = nn.LSTM(7, 8, batch_first=True, proj_size=3)
            self.into = nn.Linear(10, 7)

        def forward(self, x):
            return self.head(self.states(self.into(self.enter(x).relu()))[0])

    traced = trace(Projected(), SEQUENCES)
    assert [one.size for one in traced.groups] == [10]
    assert {one.operation for one in traced.pinned} == {"lstm"}
    assert "its hidden states are projected (proj_size)" in str(traced.pinned[0])
