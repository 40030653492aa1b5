"""Graphs and graph networks of torch_geometric. Whoever imports this needs the library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import BatchNorm as NodeBatchNorm
from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GINEConv,
    GraphNorm,
    JumpingKnowledge,
    SAGEConv,
    TransformerConv,
    global_max_pool,
    global_mean_pool,
)

from tests.support.architectures import randomise

FEATURES, OF_EDGES, CLASSES = 6, 4, 3


def graph(nodes: int = 60, edges: int = 200, seed: int = 0, graphs: int = 1) -> dict[str, Tensor]:
    """Return a random graph, of several parts if asked for; some of its nodes are isolated."""
    draw = torch.Generator().manual_seed(seed)
    of_node = torch.arange(nodes) * graphs // nodes
    index = torch.randint(0, nodes, (2, 4 * edges * graphs), generator=draw)
    index = index[:, (of_node[index[0]] == of_node[index[1]]) & (index < nodes - 2).all(0)]
    index = index[:, :edges]
    return {
        "x": torch.randn(nodes, FEATURES, generator=draw),
        "edge_index": index,
        "edge_attr": torch.randn(index.size(1), OF_EDGES, generator=draw),
        "edge_weight": torch.rand(index.size(1), generator=draw) + 0.1,
        "batch": of_node,
    }


def graphs(count: int, seed: int = 0) -> list[Data]:
    """Return small graphs of unlike sizes."""
    found = []
    for i in range(count):
        one = graph(6 + i % 5, 14, seed=seed + i)
        one.pop("batch")
        found.append(Data(**one, y=torch.tensor([i % CLASSES])))
    return found


def of(network: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return of a graph what a network takes."""
    import inspect

    names = inspect.signature(network.forward).parameters
    return {name: one for name, one in given.items() if name in names}


class Nodes(nn.Module):
    """Layers along edges, with a norm or a sum with what they read, then a linear layer."""

    def __init__(
        self,
        conv: Callable[[int, int], nn.Module],
        width: int = 8,
        layers: int = 2,
        *,
        norm: Callable[[int], nn.Module] | None = None,
        heads: int = 1,
        residual: bool = False,
        jump: str | None = None,
    ) -> None:
        super().__init__()
        wide = width * heads
        self.convs = nn.ModuleList(conv(wide if i else FEATURES, width) for i in range(layers))
        self.norms = nn.ModuleList(norm(wide) for _ in range(layers)) if norm else None
        self.residual = residual
        self.jump = None if jump is None else JumpingKnowledge(jump, wide, layers)
        self.head = nn.Linear(wide * (layers if jump == "cat" else 1), CLASSES)

    def run(self, x: Tensor, edge_index: Tensor, *of_edges: Tensor) -> Tensor:
        found = []
        for i, conv in enumerate(self.convs):
            y = conv(x, edge_index, *of_edges)
            y = (y if self.norms is None else self.norms[i](y)).relu()
            x = x + y if self.residual and i else y
            found.append(x)
        return x if self.jump is None else self.jump(found)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.run(x, edge_index))


class Edges(Nodes):
    """The same for layers that read what edges have."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        return self.head(self.run(x, edge_index, edge_attr))


class Weights(Nodes):
    """The same for layers that need a weight for each edge."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        return self.head(self.run(x, edge_index, edge_weight))


class Graphs(Nodes):
    """The same with one output for each graph."""

    def __init__(self, *args: Any, pool: Any = global_mean_pool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pool = pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.run(x, edge_index), batch))


class NormedGraphs(Graphs):
    """Graphs with a norm over each graph."""

    def run(self, x: Tensor, edge_index: Tensor, *of_edges: Tensor) -> Tensor:
        (batch,) = of_edges
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edge_index), batch).relu()
        return x

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.run(x, edge_index, batch), batch))


def mlp(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, after), nn.ReLU(), nn.Linear(after, after))


def gat(before: int, after: int, **settings: Any) -> nn.Module:
    return GATConv(before, after, heads=2, **settings)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: Nodes(GCNConv),
    "GCN with weights of edges": lambda: Weights(GCNConv),
    "GraphSAGE": lambda: Nodes(SAGEConv),
    "GraphSAGE, largest neighbour": lambda: Nodes(lambda a, b: SAGEConv(a, b, aggr="max")),
    "GIN": lambda: Nodes(lambda a, b: GINConv(mlp(a, b), train_eps=True)),
    "GAT": lambda: Nodes(gat, heads=2),
    "GAT with features of edges": lambda: Edges(lambda a, b: gat(a, b, edge_dim=OF_EDGES), heads=2),
    "GATv2": lambda: Nodes(lambda a, b: GATv2Conv(a, b, heads=2), heads=2),
    "GINE": lambda: Edges(lambda a, b: GINEConv(mlp(a, b), edge_dim=OF_EDGES)),
    "TransformerConv": lambda: Nodes(lambda a, b: TransformerConv(a, b, heads=2), heads=2),
    "TransformerConv with features of edges": lambda: Edges(
        lambda a, b: TransformerConv(a, b, heads=2, edge_dim=OF_EDGES, beta=True), heads=2
    ),
    "BatchNorm": lambda: Nodes(GCNConv, norm=NodeBatchNorm),
    "GraphNorm, graphs": lambda: NormedGraphs(GCNConv, norm=GraphNorm),
    "graphs, mean of nodes": lambda: Graphs(GCNConv),
    "graphs, largest of nodes": lambda: Graphs(SAGEConv, pool=global_max_pool),
    "jumping knowledge, side by side": lambda: Nodes(GCNConv, jump="cat"),
    "jumping knowledge, largest": lambda: Nodes(GCNConv, jump="max"),
    "residual GCN": lambda: Nodes(GCNConv, layers=3, residual=True),
    "residual GAT": lambda: Nodes(gat, heads=2, layers=3, residual=True),
}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(LAYERS[name](), seed)


RESIDUAL: dict[str, Callable[[int, int], nn.Module]] = {
    "GCN": lambda layers, width: Nodes(GCNConv, width, layers, residual=True),
    "GraphSAGE": lambda layers, width: Nodes(SAGEConv, width, layers, residual=True),
    "GIN": lambda layers, width: Nodes(
        lambda a, b: GINConv(mlp(a, b)), width, layers, residual=True
    ),
    "GAT": lambda layers, width: Nodes(gat, width, layers, residual=True, heads=2),
    "GATv2": lambda layers, width: Nodes(
        lambda a, b: GATv2Conv(a, b, heads=2), width, layers, residual=True, heads=2
    ),
    "TransformerConv": lambda layers, width: Nodes(
        lambda a, b: TransformerConv(a, b, heads=2), width, layers, residual=True, heads=2
    ),
    "GCN, BatchNorm": lambda layers, width: Nodes(
        GCNConv, width, layers, residual=True, norm=NodeBatchNorm
    ),
    "GCN, GraphNorm": lambda layers, width: Nodes(
        GCNConv, width, layers, residual=True, norm=GraphNorm
    ),
}
