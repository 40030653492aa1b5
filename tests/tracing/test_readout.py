"""The last layer of a language model: it is found, and proved part by part."""

import pytest
import torch
from torch import nn

import clafusion
from clafusion.execution.walk import Walk
from clafusion.tracing import outputs, verify
from clafusion.tracing.outputs import difference
from clafusion.tracing.readout import find_readout

POSITIONS, CHANNELS = 5, 70


class Head(nn.Module):
    """A hidden layer, and a last one with outputs at several positions."""

    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, CHANNELS)
        self.shift = nn.Parameter(torch.randn(CHANNELS))
        self.after = after

    def forward(self, x):
        hidden = self.hidden(x).relu()
        found = self.head(hidden)
        if self.after == "capped":
            return hidden, 5 * torch.tanh(found / 5), found
        if self.after == "shifted":
            return found + self.shift
        return found.cumsum(1) if self.after == "cumulated" else found


def example():
    return torch.randn(3, POSITIONS, 4, generator=torch.Generator().manual_seed(0))


def traced(after):
    return clafusion.trace(Head(after), example(), verify=False)


def test_parts_say_what_the_whole_outputs_say(monkeypatch):
    model = traced("capped")
    readout = find_readout(model.module)
    assert (readout.positions, readout.channels, readout.is_alike) == (POSITIONS, CHANNELS, True)
    monkeypatch.setattr(outputs, "_PART", 20 * readout.width)
    gaps = []
    for most in (0, 1 << 22):
        monkeypatch.setattr(outputs, "_MANY", most)
        trial = verify._Trial(model, (example(),), 0)
        assert trial.gap({}, {}) == 0.0
        expected = trial._expected[True]
        assert expected.are_finite()
        sizes = [[one.size(-1) for one in part] for part in expected.parts()]
        moves = verify._moves(trial, model.groups, ())
        broken = tuple({k: v for k, v in one.items() if "head" not in k} for one in moves)
        gaps.append((sizes, trial.gap(*moves), trial.gap(*broken)))
    (in_parts, right, wrong), (at_once, whole_right, whole_wrong) = gaps
    assert in_parts == [[6], *[[20, 20]] * 3, [10, 10], [7, 7]]
    assert at_once == [[6, CHANNELS, CHANNELS]]
    # The hidden values are outputs, too, so that their channels keep their places.
    assert max(right, whole_right) < 1e-12
    assert wrong == pytest.approx(whole_wrong, rel=1e-9)


def test_a_mistake_shows_in_parts(monkeypatch):
    model = traced(None)
    clafusion.verify_graph(model, (example(),))
    monkeypatch.setattr(outputs, "_MANY", 0)
    monkeypatch.setattr(outputs, "_PART", 20 * POSITIONS)
    clafusion.verify_graph(model, (example(),))
    trial = verify._Trial(model, (example(),), 0)
    moves = verify._moves(trial, model.groups, ())
    assert trial.keeps_outputs(*moves)
    broken = tuple({k: v for k, v in one.items() if "head" not in k} for one in moves)
    assert broken[0]
    assert trial.gap(*broken) > 0.01


@pytest.mark.parametrize("position", range(POSITIONS))
def test_what_differs_at_one_position_shows_in_parts(position, monkeypatch):
    monkeypatch.setattr(outputs, "_MANY", 0)
    model = traced(None)
    changed = example()
    changed[1, position, 0] += 1
    walks = [Walk(model, (one,), model.state(), set()) for one in (example(), changed, example())]
    one, other, again = outputs.outputs_of(walks, find_readout(model.module), 3)
    assert difference(other, one) > 0.01
    assert difference(again, one) == 0.0


@pytest.mark.parametrize("rows", [(3, 5), (68, 69)])
def test_two_rows_that_change_places_show_in_parts(rows, monkeypatch):
    monkeypatch.setattr(outputs, "_MANY", 0)
    model = traced(None)
    state = {name: value.clone() for name, value in model.state().items()}
    for name in ("head.weight", "head.bias"):
        state[name][list(rows)] = model.state()[name][list(reversed(rows))]
    walks = [Walk(model, (example(),), one, set()) for one in (model.state(), state)]
    one, other = outputs.outputs_of(walks, find_readout(model.module), 3)
    assert difference(other, one) > 0.01


def test_other_networks_have_no_such_layer():
    assert not find_readout(traced("shifted").module).is_alike
    assert find_readout(traced("cumulated").module) is None
    classifier = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert find_readout(clafusion.trace(classifier, torch.randn(5, 4)).module) is None


def test_a_difference_is_relative_to_the_largest_finite_value():
    one = torch.tensor([1.0, 4.0, torch.inf, torch.nan])
    other = torch.tensor([1.0, 3.0, torch.inf, torch.nan])
    assert difference([one], [other]) == pytest.approx(1 / 3)
    assert difference([one[:2]], [other]) == torch.inf
    assert difference([torch.tensor([1.0, torch.nan])], [torch.ones(2)]) == torch.inf
    assert difference([], []) == 0.0
