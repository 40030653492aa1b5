"""Fuse two graph networks of different depth, trained on Cora from different starts.

    CLAFUSION_DATA=... python -m benchmarks.experiments.graphs [--quick]

GCN, GIN and GAT of 2 and 3 layers, of which the middle one is residual, on the public split of
Planetoid (140 labelled nodes, 1,000 test nodes): the parents, both side by side, weights averaged
as they stand, by transport with each cost (arXiv 2503.21579 asks whether the graph's structure
helps), with REPAIR, with least squares, and finetuned beside a parent that is. It needs
torch_geometric.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, GINConv

from benchmarks.datasets import folder
from benchmarks.experiments.experiment import arguments, run
from clafusion import fuse, naive_average

COSTS = ("correlation", "euclidean", "energy", "fused_gromov_wasserstein")
KINDS = ("GCN", "GIN", "GAT")
QUICK: dict[str, Any] = {
    "width": 32,
    "heads": 4,
    "dropout": 0.5,
    "epochs": 60,
    "rate": 0.02,
    "finetuned": 20,
}
FULL: dict[str, Any] = {
    "width": 64,
    "heads": 8,
    "dropout": 0.5,
    "epochs": 200,
    "rate": 0.01,
    "finetuned": 50,
}
CHECKED = 5  # epochs from one look at the validation nodes to the next


class Network(nn.Module):
    """A layer along edges, residual ones, and one that puts out the classes."""

    def __init__(self, kind: str, layers: int, settings: dict[str, Any], sizes: tuple[int, int]):
        super().__init__()
        width, heads, self.dropout = settings["width"], settings["heads"], settings["dropout"]

        def conv(before: int, after: int, *, is_last: bool = False) -> nn.Module:
            if kind == "GCN":
                return GCNConv(before, after)
            if kind == "GIN":
                linear = nn.Linear(before, width), nn.Linear(width, after)
                return GINConv(nn.Sequential(linear[0], nn.ReLU(), linear[1]))
            count = 1 if is_last else heads
            return GATConv(before, after // count, heads=count, dropout=self.dropout)

        self.first = conv(sizes[0], width)
        self.blocks = nn.ModuleList(conv(width, width) for _ in range(layers - 2))
        self.last = conv(width, sizes[1], is_last=True)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        def dropped(value: Tensor) -> Tensor:
            return F.dropout(value, self.dropout, self.training)

        x = self.first(dropped(x), edge_index).relu()
        for block in self.blocks:
            x = x + block(dropped(x), edge_index).relu()
        return self.last(dropped(x), edge_index)


class Cora:
    """The graph, its labels and its split."""

    def __init__(self, device: str) -> None:
        with np.load(folder() / "cora.npz") as arrays:
            x = torch.zeros(tuple(arrays["shape"]))
            places = (arrays[f"feature_{axis}"].astype(np.int64) for axis in ("rows", "columns"))
            x[tuple(places)] = 1.0
            x /= x.sum(1, keepdim=True).clamp(min=1)
            others = [
                torch.from_numpy(arrays[name].astype(np.int64)).to(device)
                for name in ("edges", "labels", "train", "val", "test")
            ]
        self.graph = x.to(device), others[0]
        self.labels, self.train, self.val, self.test = others[1:]

    @torch.no_grad()
    def accuracy(self, outputs: Tensor, nodes: Tensor | None = None) -> float:
        nodes = self.test if nodes is None else nodes
        return float((outputs.argmax(1)[nodes] == self.labels[nodes]).double().mean())

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        return model.eval()(*self.graph)

    def trained(self, model: nn.Module, epochs: int, rate: float, seed: int) -> nn.Module:
        """Return a copy that is trained further, as it was where the validation nodes say so."""
        model = copy.deepcopy(model)
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=5e-4)
        best, kept = self.accuracy(self.outputs(model), self.val), model.state_dict()
        kept = copy.deepcopy(kept)
        for epoch in range(epochs):
            model.train()
            optimizer.zero_grad()
            found = model(*self.graph)[self.train]
            F.cross_entropy(found, self.labels[self.train]).backward()
            optimizer.step()
            if (epoch + 1) % CHECKED:
                continue
            accuracy = self.accuracy(self.outputs(model), self.val)
            if accuracy > best:
                best, kept = accuracy, copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        return model.eval()


def scores(kind: str, cora: Cora, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Return the test accuracy of two parents, of both together and of what they are fused to."""
    parents = []
    for i, layers in enumerate((2, 3)):
        torch.manual_seed(100 * seed + i)
        start = Network(kind, layers, settings, (1433, 7)).to(cora.labels.device)
        parents.append(cora.trained(start, settings["epochs"], settings["rate"], 100 * seed + i))
    alone = [cora.accuracy(cora.outputs(one)) for one in parents]
    together = torch.stack([cora.outputs(one).softmax(1) for one in parents]).sum(0)
    found = {"2 layers": alone[0], "3 layers": alone[1], "better parent": max(alone)}
    found["side by side"] = cora.accuracy(together)

    def fused(**options: Any) -> Any:
        return fuse(parents, cora.graph, seed=seed, **options)

    for cost in COSTS:
        result = fused(calibration="none", matching={"cost": cost})
        found[f"transport, {cost}"] = cora.accuracy(cora.outputs(result.model))
    found["naive average"] = cora.accuracy(cora.outputs(naive_average(result.problem)))
    found["REPAIR"] = cora.accuracy(cora.outputs(fused(calibration="repair").model))
    best = fused(calibration="least_squares").model
    found["least squares"] = cora.accuracy(cora.outputs(best))
    energy = fused(calibration="least_squares", matching={"cost": "energy"}).model
    found["least squares, energy"] = cora.accuracy(cora.outputs(energy))
    for name, model in (("3 layers", parents[1]), ("least squares", best)):
        tuned = cora.trained(model, settings["finetuned"], settings["rate"] / 5, seed)
        found[f"{name}, finetuned"] = cora.accuracy(cora.outputs(tuned))
    for name, value in found.items():
        print(f"{kind}: {name:30s} {100 * value:6.2f} %", flush=True)
    return {f"{kind}: {name}": value for name, value in found.items()}


def main() -> None:
    given = arguments(__doc__, seeds=5)
    settings = QUICK if given.quick else FULL
    cora = Cora(given.device)

    def one_seed(seed: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind in KINDS:
            found |= scores(kind, cora, settings, seed)
        return found

    run("graphs", given, settings, one_seed, title="Test accuracy on Cora")


if __name__ == "__main__":
    main()
