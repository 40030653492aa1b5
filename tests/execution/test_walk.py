"""Walks of exported graphs: weights that are made when they are read, and inputs that stay."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clafusion import trace
from clafusion.errors import UnsupportedOpError
from clafusion.execution import walk as walk_module
from clafusion.execution.walk import Walk, in_lockstep


class Words(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.relu(self.inner(self.embedding(x))))


class ReadByRows(dict):
    """A state that notes which rows are read, and refuses to make the whole of a table."""

    def __init__(self, state, tables):
        super().__init__(state)
        self.tables, self.read = tables, {name: [] for name in tables}

    def __getitem__(self, name):
        assert name not in self.tables, f"the whole of {name} is read"
        return super().__getitem__(name)

    def shape(self, name):
        return tuple(super().__getitem__(name).shape)

    def rows(self, name, rows):
        self.read[name].append(rows)
        return super().__getitem__(name)[rows]


@pytest.mark.parametrize("tied", [True, False])
def test_large_tables_are_read_by_rows(monkeypatch, tied):
    monkeypatch.setattr(walk_module, "_LARGE", 100)  # 12 rows of 8
    torch.manual_seed(0)
    model = Words(tied).eval()
    words = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    traced = trace(model, words)
    tables = {"embedding.weight"} if tied else {"embedding.weight", "head.weight"}
    state = ReadByRows(traced.state(), tables)
    (found,) = Walk(traced, (words,), state, set()).finish()
    torch.testing.assert_close(found, model(words), rtol=0, atol=1e-6)
    of_embedding, *of_head = state.read["embedding.weight"]
    assert torch.equal(of_embedding, words.unique())
    parts = of_head if tied else state.read["head.weight"]
    assert [len(rows) for rows in parts] == [12, 12, 12, 12, 2]


def test_walks_side_by_side_stop_at_each_node():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    inputs = torch.randn(4, 5)
    traced = trace(model, inputs)
    doubled = {name: 2 * value for name, value in traced.state().items()}
    walks = [Walk(traced, (inputs,), state, set()) for state in (traced.state(), doubled)]
    seen = []
    for node in in_lockstep(walks):
        values = [walk.value(node) for walk in walks]
        assert all(one is not None for one in values)
        seen.append(node.name)
    assert len(seen) == 3
    assert torch.equal(walks[0].finish()[0], model(inputs))
    assert not torch.equal(walks[1].finish()[0], model(inputs))


def test_types_of_the_graph_are_replaced():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(4, 4)

        def forward(self, x):
            return self.plain(x).to(torch.float32) * torch.ones(4, dtype=torch.float32)

    traced = trace(Casts().eval(), torch.randn(5, 4))
    wide = {name: value.double() for name, value in traced.state().items()}
    inputs = (torch.randn(5, 4).double(),)
    (wider,) = Walk(traced, inputs, wide, set(), {torch.float32: torch.float64}).finish()
    assert wider.dtype == torch.float64
    with torch.no_grad():
        exact = traced.model.double().plain(inputs[0])
    torch.testing.assert_close(wider.detach(), exact, rtol=0, atol=1e-14)


class CountsAside(nn.Module):
    """Its forward changes a buffer that it does not read."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        self.calls[1:].add_(1)
        return self.plain(x)


def test_a_run_leaves_buffers_as_they_are():
    torch.manual_seed(0)
    model, inputs = CountsAside().eval(), torch.randn(5, 4)
    traced = trace(model, inputs)
    traced.run((inputs,))
    assert torch.equal(model.calls, torch.zeros(3))


class Renormalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4, max_norm=0.1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embedding(x))


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 4)

    def forward(self, x):
        self.plain.weight.data.clamp_(0, 1)
        return self.plain(x)


@pytest.mark.parametrize(
    ("model", "inputs", "name"),
    [
        (Renormalised(), torch.randint(0, 9, (5, 2)), "embedding.weight"),
        (Clamped(), torch.randn(5, 4), "plain.weight"),
    ],
)
def test_a_forward_that_changes_a_parameter_is_refused_before_it_does(model, inputs, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedOpError, match=f"forward changes its parameter '{name}'"):
        trace(model.eval(), inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_plain_state_is_no_row_state():
    assert not isinstance({}, walk_module.RowState)
    assert isinstance(SimpleNamespace(shape=len, rows=len), walk_module.RowState)


def test_a_supplied_value_stands_for_the_nodes_that_lead_to_it():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    traced = trace(model, x)
    linear, relu, last = (one.name for one in traced.module.graph.nodes if one.op[:4] == "call")
    ran = []
    walk = Walk(traced, (x,), traced.state(), {linear}, replace=lambda n, v: (ran.append(n), v)[1])
    value = walk.reach(linear)
    walk.supply(relu, value.clamp(-1.0, 1.0), [relu], like=linear)
    walk.release(linear)
    (found,) = walk.finish()
    assert [one.name for one in ran] == [linear, last]
    torch.testing.assert_close(found, model[2](model[0](x).clamp(-1.0, 1.0)))
