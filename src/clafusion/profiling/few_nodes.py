"""A few nodes of a graph that lie together, and how far they are from one another."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["MOST_NODES", "few_nodes"]

MOST_NODES = 24
"""On how many nodes channels are compared: every two of them take a problem of that size."""


def few_nodes(edges: Tensor, count: int, most: int = MOST_NODES) -> tuple[Tensor, Tensor]:
    """Return some nodes of a graph, and their distances along the edges between them.

    From the node with the most edges on the nearest are taken, of equal ones those of the smaller
    numbers; where no edge leads further, from the node with the most edges of the others.

    Parameters
    ----------
    edges
        ``(2, num_edges)``; their direction does not count.
    count
        How many nodes the graph has.
    most
        How many are taken at the most.

    Returns
    -------
    nodes
        Their numbers, ascending.
    distances
        ``(num_nodes, num_nodes)``, float64: numbers of hops, relative to the largest; 1 where no
        way leads from one to the other.
    """
    beside: list[set[int]] = [set() for _ in range(count)]
    for a, b in edges.T.tolist():
        if a != b:
            beside[a].add(b)
            beside[b].add(a)
    by_degree = sorted(range(count), key=lambda one: (-len(beside[one]), one))
    chosen: dict[int, None] = {}
    for start in by_degree:
        waiting = deque([start])
        while waiting and len(chosen) < most:
            one = waiting.popleft()
            if one not in chosen:
                chosen[one] = None
                waiting.extend(sorted(beside[one] - chosen.keys()))
        if len(chosen) >= most:
            break
    nodes = sorted(chosen)
    places = {one: i for i, one in enumerate(nodes)}
    hops = torch.full((len(nodes), len(nodes)), torch.inf, dtype=torch.float64)
    for one, i in places.items():
        hops[i, i] = 0.0
        reached = deque([one])
        while reached:
            at = reached.popleft()
            for other in beside[at] & places.keys():
                if hops[i, places[other]] == torch.inf:
                    hops[i, places[other]] = hops[i, places[at]] + 1
                    reached.append(other)
    largest = float(hops[hops.isfinite()].max())
    distances = (hops / max(largest, 1.0)).clamp(max=1.0)
    return torch.tensor(nodes, device=edges.device), distances
