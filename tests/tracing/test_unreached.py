"""Tables that are longer than the example inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import FusionWarning, fuse, trace
from clafusion.tracing.groups import find_channels
from tests.support.assertions import assert_same_function

SHORT = torch.randint(0, 20, (60, 8), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(0, 20, (60, 24), generator=torch.Generator().manual_seed(1))

TABLES = {
    "parameter": lambda: nn.Parameter(torch.randn(1, 24, 16)),
    "embedding's weight": lambda: nn.Embedding(24, 16),
    "embedding": lambda: nn.Embedding(24, 16),
    "transposed": lambda: nn.Parameter(torch.randn(16, 24)),
    "indexed": lambda: nn.Parameter(torch.randn(16, 24)),
    "indexed rows": lambda: nn.Embedding(24, 16),
    "index_select": lambda: nn.Parameter(torch.randn(1, 24, 16)),
    "gather": lambda: nn.Parameter(torch.randn(24, 16)),
    "sliced after a roll": lambda: nn.Parameter(torch.randn(24, 16)),
}
READ = {
    "parameter": lambda table, t: table[:, :t],
    "embedding's weight": lambda table, t: table.weight[:t],
    "embedding": lambda table, t: table(torch.arange(t)),
    "transposed": lambda table, t: table[:, :t].T,
    "indexed": lambda table, t: table[:, torch.arange(t)].T,
    "indexed rows": lambda table, t: table.weight[torch.arange(t)],
    "index_select": lambda table, t: table.index_select(1, torch.arange(t)),
    "gather": lambda table, t: table.gather(0, torch.arange(t)[:, None].expand(t, 16)),
    "sliced after a roll": lambda table, t: table.roll(3, 0)[:t],
}


class Net(nn.Module):
    def __init__(self, kind, depth, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        self.embed, self.table = nn.Embedding(20, 16), TABLES[kind]()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
            for _ in range(depth)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        h = self.embed(tokens) + READ[self.kind](self.table, tokens.shape[1])
        for one in self.blocks:
            h = h + one(h)
        return self.head(h.mean(1))


@pytest.mark.parametrize("depths", [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_no_example_reaches_move_with_those_that_some_do(kind, depths):
    models = [Net(kind, depth, seed).eval() for seed, depth in enumerate(depths)]
    for weights, parent in (([1, 0], models[0]), ([0, 1], models[1])):
        fused = fuse(models, SHORT, weights, calibration="none").model
        assert_same_function(fused, parent, SHORT)
        assert_same_function(fused, parent, LONG)


class Shuffled(nn.Module):
    """A table of which each row holds its channels in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(12, 8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        for i in range(x.shape[1]):
            hidden = hidden + self.table[i].roll(i)
        return self.last(F.relu(hidden))


def test_rows_of_which_no_order_is_certain_stay_and_that_is_told():
    inputs = torch.randn(4, 8)
    for _ in range(2):  # the second takes the trace of the first
        with pytest.warns(FusionWarning, match="reach all but 32 entries of 'table'"):
            trace(Shuffled().eval(), inputs)


def test_channels_with_some_alone_as_groups_tell_of_it_too():
    traced = trace_unreached()
    channels = find_channels(
        traced.module, traced.placeholders, traced.state(), frozenset(), traced.example_inputs
    )
    assert channels.with_singles(frozenset()).unreached == channels.unreached == {"table": 32}


def trace_unreached():
    with pytest.warns(FusionWarning, match="reach all but 32 entries of 'table'"):
        return trace(Shuffled().eval(), torch.randn(4, 8))


class RelativeBias(nn.Module):
    """Attention with a bias for every distance, read from a table by index."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.qkv, self.last = nn.Linear(6, 24), nn.Linear(8, 4)
        self.table = nn.Parameter(torch.randn(2, 63))

    def forward(self, x):
        count, n, _ = x.shape
        q, k, v = self.qkv(x).view(count, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        places = torch.arange(n)
        bias = self.table[:, places - places[:, None] + 31]
        scores = (q @ k.mT / 2 + bias).softmax(-1)
        return self.last((scores @ v).transpose(1, 2).reshape(count, n, 8).mean(1))


def test_entries_of_a_table_that_no_index_reaches_keep_their_places_and_that_is_told():
    models = [RelativeBias(seed).eval() for seed in range(2)]
    inputs = torch.randn(60, 9, 6, generator=torch.Generator().manual_seed(0))
    with pytest.warns(FusionWarning, match="reach all but 92 entries of 'table'"):
        traced = trace(models[1], inputs)
    unreached = torch.ones(2, 63, dtype=torch.bool)
    unreached[:, 31 - 8 : 31 + 9] = False
    for group in traced.groups:
        for axis in group.axes:
            if axis.use.parameter == "table":
                assert not unreached.flatten()[axis.positions].any()
    with pytest.warns(FusionWarning, match="reach all but 92 entries of 'table'"):
        fused = fuse(models, inputs, [0, 1]).model
    assert_same_function(fused, models[1], inputs)
    assert torch.equal(fused.table[unreached], models[1].table[unreached])
