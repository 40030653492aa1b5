r"""The fused Gromov-Wasserstein cost of two channels: how far apart they are as signals on a graph.

A channel is a graph whose nodes carry its values :math:`x_u`. With the structure :math:`S` of the
graph, the numbers of hops from node to node relative to the largest, two channels ``x`` and ``y``
on it cost

.. math:: \min_{T \in \Pi} \; (1 - \alpha) \sum_{u, v} (x_u - y_v)^2\, T_{uv}
          + \alpha \sum_{u, u', v, v'} (S_{uu'} - S_{vv'})^2\, T_{uv} T_{u'v'}, \qquad
          \alpha = \tfrac{1}{2},

over all plans of the nodes with equal masses (Vayer et al., arXiv 1805.09114), as Fusion of graph
neural networks via optimal transport (arXiv 2503.21579) compares it with costs of features alone.
Where every node stays where it is, it is half the mean of :math:`(x_u - y_u)^2`; nodes that move to
alike ones make it smaller and pay with the structure. POT finds a minimum by conditional gradients,
from there and from what is best for the values alone; the smaller one counts. Values are relative
to the largest root mean square of a channel of both networks, as the structure is to its largest
distance. It takes two problems for every two channels, so that the graph is a few nodes: see
:func:`clafusion.profiling.few_nodes.few_nodes`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clafusion.threads import one_thread

__all__ = ["fused_gromov_wasserstein"]

_ALPHA = 0.5
_ROUNDS = 20
_PRECISION = 1e-7


def fused_gromov_wasserstein(x: Tensor, y: Tensor, structure: Tensor | None) -> Tensor:
    """Return the costs of every two channels ``(num_source, num_target)``, in float64.

    Parameters
    ----------
    x, y
        The channels' values ``(num_nodes, num_channels)``.
    structure
        The distances of the nodes ``(num_nodes, num_nodes)``; None where values belong to graphs or
        edges. These cost half the mean of ``(x - y)^2``.
    """
    device = x.device
    x, y = (one.detach().double().cpu() for one in (x, y))
    scale = torch.cat([x, y], 1).square().mean(0).amax().sqrt().clamp(min=1e-30)
    x, y = x / scale, y / scale
    if structure is None:
        squares = x.square().mean(0)[:, None] + y.square().mean(0) - 2 * (x.T @ y) / len(x)
        return (1 - _ALPHA) * squares.clamp(min=0).to(device)
    import ot  # here, for with all that it imports it takes as long as torch

    nodes = len(x)
    hops = structure.double().cpu().numpy()
    stay = torch.eye(nodes, dtype=torch.float64).numpy() / nodes
    mass = torch.full((nodes,), 1 / nodes, dtype=torch.float64).numpy()
    found = torch.empty(x.size(1), y.size(1), dtype=torch.float64)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a minimum is not reached: it is an upper bound
        for i, one in enumerate(x.T):
            for j, other in enumerate(y.T):
                apart = (one[:, None] - other).square().numpy()
                found[i, j] = min(
                    float(
                        ot.gromov.fused_gromov_wasserstein2(
                            apart,
                            hops,
                            hops,
                            mass,
                            mass,
                            symmetric=True,
                            alpha=_ALPHA,
                            G0=start,
                            max_iter=_ROUNDS,
                            tol_rel=_PRECISION,
                            tol_abs=_PRECISION,
                        )
                    )
                    for start in (stay, ot.emd(mass, mass, apart))
                )
    return found.clamp_(min=0).to(device)
