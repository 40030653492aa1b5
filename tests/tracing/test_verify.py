"""The proof: what it lets pass, what it names, and the weights that it draws."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clafusion import permute_channels, trace, verify_graph
from clafusion.errors import GraphVerificationError
from clafusion.tracing import verify
from clafusion.tracing.moves import moved, moved_rows, permutation_moves
from clafusion.tracing.trial_weights import BaseWeights, TrialWeights
from tests.support.simulated_gpu import FarTensor, simulated_gpu


class Branches(nn.Module):
    """Two branches that are joined: their channels belong together."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)) + torch.tanh(self.second(x)))


@pytest.fixture
def branches():
    torch.manual_seed(0)
    return trace(Branches().eval(), torch.randn(6, 5))


def without(traced, module):
    """Return a wrong analysis: a group forgets that it has channels in a module's parameters."""
    (group,) = traced.groups
    axes = tuple(one for one in group.axes if not one.use.parameter.startswith(module))
    return replace(traced, groups=(replace(group, axes=axes),))


@pytest.mark.parametrize(
    ("forgotten", "parting"),
    [("second", "add of 'forward'"), ("first.bias", "linear of 'first'"), ("head", "'head'")],
)
def test_the_operation_is_named_at_which_the_values_part_company(branches, forgotten, parting):
    with pytest.raises(GraphVerificationError) as raised:
        verify_graph(without(branches, forgotten), branches.example_inputs)
    assert "groups that break it: 'first." in str(raised.value)
    assert f"{parting} (node " in str(raised.value)
    assert "first in " in str(raised.value)


def test_a_wrong_analysis_is_found_behind_a_gate_at_zero():
    class Gated(Branches):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.head(torch.relu(self.first(x)) + self.gate * torch.tanh(self.second(x)))

    torch.manual_seed(0)
    traced = trace(Gated().eval(), torch.randn(6, 5))
    with pytest.raises(GraphVerificationError, match="changed the output"):
        verify_graph(without(traced, "second"), traced.example_inputs)


def test_a_model_that_casts_inside_is_proved_in_float64():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
            self.side = nn.Linear(16, 3)

        def forward(self, x):
            hidden = self.first(x).to(torch.float32)
            hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.second(hidden) + 1e-6 * self.side(hidden)

    torch.manual_seed(0)
    traced = trace(Casts().eval(), torch.randn(6, 6))
    # Less than float32 rounds, which the model casts to.
    with pytest.raises(GraphVerificationError, match="first in linear of 'side'"):
        verify_graph(without(traced, "side"), traced.example_inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_whole(branches, dtype):
    (group,) = branches.groups
    permutation = torch.randperm(group.size, generator=torch.Generator().manual_seed(1))
    moves = permutation_moves([group], [permutation])
    state = {name: value.to(dtype) for name, value in branches.state().items()}
    wanted = permute_channels(state, [group], [permutation])
    for redrawn in (frozenset(), frozenset(state)):
        weights = TrialWeights(BaseWeights(state, redrawn, 0), torch.float64, moves)
        for name, value in weights.items():
            assert value.dtype == torch.float64
            rows = torch.tensor([len(value) - 1, 0])
            assert torch.equal(weights.rows(name, rows), value[rows])
            assert torch.equal(weights.rows(name, torch.arange(2)), value[:2])
            assert redrawn or torch.equal(value, wanted[name].double())


def test_redrawn_weights_differ_from_row_to_row_and_name_to_name():
    state = {"a": torch.zeros(300, 40), "b": torch.zeros(300, 40), "c": torch.zeros(50)}
    weights = BaseWeights(state, frozenset(state), 0)
    rows = torch.cat([weights.whole("a"), weights.whole("b")])
    assert len(rows.unique(dim=0)) == 600
    assert float(rows.abs().max()) <= (6 / 40) ** 0.5
    assert 0.5 <= float(weights.whole("c").min()) <= float(weights.whole("c").max()) <= 1.5
    assert torch.equal(BaseWeights(state, frozenset(state), 0).whole("a"), weights.whole("a"))
    assert not torch.equal(BaseWeights(state, frozenset(state), 1).whole("a"), weights.whole("a"))


def test_rows_on_another_device_are_moved_there(branches):
    (group,) = branches.groups
    permutation = torch.randperm(group.size, generator=torch.Generator().manual_seed(1))
    moves = permutation_moves([group], [permutation])
    near = TrialWeights(BaseWeights(branches.state(), frozenset(), 0), torch.float64, moves)
    rows = torch.tensor([4, 1, 0])
    expected = near.rows("first.weight", rows)
    with simulated_gpu(), torch.no_grad():
        state = {name: FarTensor(value) for name, value in branches.state().items()}
        far = TrialWeights(BaseWeights(state, frozenset(), 0), torch.float64, moves)
        found = far.rows("first.weight", FarTensor(rows))
    assert isinstance(found, FarTensor)
    assert torch.equal(found.near, expected)


def test_parts_of_a_tensor_cannot_be_moved_row_by_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2)).eval()
    traced = trace(model, torch.randn(5, 4, 9))
    permutations = [torch.arange(one.size).flip(0) for one in traced.groups]
    moves = permutation_moves(traced.groups, permutations)
    state = traced.state()
    steps = moves["2.weight"]
    weight = state["2.weight"]
    assert not torch.equal(moved(weight, steps), weight)
    rows = torch.arange(2)
    assert moved_rows(weight.__getitem__, tuple(weight.shape), rows, steps) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_that_round_otherwise_are_no_other_function(dtype):
    # In eval mode PyTorch runs this layer by a fused kernel, which torch.export does not see.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 5)).eval().to(dtype)
    with torch.no_grad():
        assert trace(model, torch.randn(8, 6, 16, dtype=dtype)).groups


def test_a_wrong_analysis_is_found_where_random_weights_shut_a_gate():
    class Shut(Branches):
        def __init__(self):
            super().__init__()
            self.low = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            both = torch.relu(self.first(x)) + torch.tanh(self.second(x))
            return self.head(torch.relu(both - 100 * self.low))

    torch.manual_seed(0)
    traced = trace(Shut().eval(), torch.randn(6, 5))
    verify_graph(traced, traced.example_inputs)
    with pytest.raises(GraphVerificationError, match="permuting the channel groups"):
        verify_graph(without(traced, "second"), traced.example_inputs)


def test_own_weights_are_proved_by_one_walk_in_their_own_type(branches, monkeypatch):
    types = []
    walk = verify.Walk

    def counted(traced, inputs, state, keep, kinds=None):
        types.append("wide" if kinds is verify.WIDER else "own")
        return walk(traced, inputs, state, keep, kinds)

    monkeypatch.setattr(verify, "Walk", counted)
    verify_graph(branches, branches.example_inputs)
    assert sorted(types) == ["own", "own", "wide", "wide", "wide"]
    # Rounding that float32 cannot tell from a mistake is left to float64.
    types.clear()
    monkeypatch.setattr(verify, "_OWN_TOLERANCE", -1.0)
    verify_graph(branches, branches.example_inputs)
    assert sorted(types) == ["own", "own", *["wide"] * 5]
