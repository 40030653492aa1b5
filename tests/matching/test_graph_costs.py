"""Channels as signals on a graph: the cost against what can be said of it by hand."""

from itertools import permutations

import torch

from clafusion.matching.graph_costs import fused_gromov_wasserstein
from clafusion.profiling.few_nodes import few_nodes

PATH = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])


def test_few_nodes_lie_together():
    star_and_path = torch.tensor([[0, 0, 0, 5, 6, 9], [1, 2, 3, 6, 7, 9]])
    nodes, distances = few_nodes(star_and_path, 10, most=4)
    assert nodes.tolist() == [0, 1, 2, 3]
    assert distances[0, 1] == 0.5
    assert distances[1, 2] == 1.0
    nodes, distances = few_nodes(star_and_path, 10, most=6)
    assert nodes.tolist() == [0, 1, 2, 3, 5, 6]
    assert distances[0, 4] == 1.0  # no way leads there
    assert torch.equal(distances, distances.T)
    nodes, distances = few_nodes(torch.empty(2, 0, dtype=torch.int64), 3)
    assert nodes.tolist() == [0, 1, 2]
    assert torch.equal(distances, 1.0 - torch.eye(3).double())


def test_channels_that_a_symmetry_of_the_graph_takes_to_one_another_cost_nothing():
    _, hops = few_nodes(PATH, 5)
    x = torch.tensor([[1.0, 3.0, 0.5, -2.0, 4.0], [1.0, 2.0, 3.0, 2.0, 1.0]]).T
    costs = fused_gromov_wasserstein(x, x, hops)
    assert torch.allclose(costs.diagonal(), torch.zeros(2).double(), atol=1e-9)
    turned = fused_gromov_wasserstein(x, x.flip(0), hops)
    assert torch.allclose(turned.diagonal(), torch.zeros(2).double(), atol=1e-6)
    elsewhere = fused_gromov_wasserstein(x, x.flip(0), None)  # where values belong to no nodes
    assert elsewhere[0, 0] > 0.1


def test_it_is_no_more_than_any_move_of_the_nodes_costs():
    _, hops = few_nodes(PATH, 5)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=draw), torch.randn(5, 2, generator=draw)
    scale = torch.cat([x, y], 1).square().mean(0).amax().sqrt()
    found = fused_gromov_wasserstein(x, y, hops)
    for i in range(3):
        for j in range(2):
            moves = [
                0.5 * float(((x[:, i] - y[list(order), j]) / scale).square().mean())
                + 0.5 * float((hops - hops[list(order)][:, list(order)]).square().mean())
                for order in permutations(range(5))
            ]
            stay = moves[0]
            assert 0 < found[i, j] <= stay + 1e-6
            assert found[i, j] > 0.3 * min(moves)
    assert found.dtype == torch.float64
