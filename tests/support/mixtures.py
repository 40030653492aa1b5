"""Mixtures of experts that are modules of a list, in the ways in which people add them up."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.networks import randomise

VECTORS = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))


def _one_after_another(experts: nn.ModuleList, x: Tensor, shares: Tensor) -> Tensor:
    found = x
    for i, expert in enumerate(experts):
        found = found + shares[..., i : i + 1] * expert(x)
    return found


def _in_place(experts: nn.ModuleList, x: Tensor, shares: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        found += shares[..., i].unsqueeze(-1) * expert(x)
    return x + found


def _stacked(experts: nn.ModuleList, x: Tensor, shares: Tensor) -> Tensor:
    written = torch.stack([expert(x) for expert in experts], -2)
    return x + (written * shares.unsqueeze(-1)).sum(-2)


def _by_einsum(experts: nn.ModuleList, x: Tensor, shares: Tensor) -> Tensor:
    written = torch.stack([expert(x) for expert in experts], 1)
    return x + torch.einsum("bed,be->bd", written, shares)


def _by_product(experts: nn.ModuleList, x: Tensor, shares: Tensor) -> Tensor:
    written = torch.stack([expert(x) for expert in experts], 1)
    return x + (shares.unsqueeze(1) @ written).squeeze(1)


SUMS: dict[str, Callable[[nn.ModuleList, Tensor, Tensor], Tensor]] = {
    "one after another": _one_after_another,
    "in place": _in_place,
    "stacked": _stacked,
    "einsum": _by_einsum,
    "product": _by_product,
}


class ListedExperts(nn.Module):
    """A residual mixture; ``chosen`` is how many experts take part, None for all."""

    def __init__(self, sums: str, count: int, hidden: int, chosen: int | None) -> None:
        super().__init__()
        self.sums, self.chosen = SUMS[sums], chosen
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 5)
        self.router = nn.Linear(16, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 16))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        scores = self.router(x)
        if self.chosen is None:
            shares = scores.softmax(-1)
        else:
            values, places = scores.topk(self.chosen, -1)
            shares = torch.zeros_like(scores).scatter(-1, places, values.softmax(-1))
        return self.leave(self.sums(self.experts, x, shares))


def listed(
    sums: str = "one after another",
    count: int = 3,
    hidden: int = 12,
    chosen: int | None = None,
    seed: int = 0,
) -> nn.Module:
    return randomise(ListedExperts(sums, count, hidden, chosen), seed).eval()
