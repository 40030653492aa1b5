r"""Which hidden channels to keep of networks that stand side by side.

Channels that a single layer writes and a single layer reads need no partner: laid side by side,
all networks' channels ``h`` give the reading layer's weighted mean output exactly,

.. math:: \sum_p w_p W_p h_p,

only with too many channels. So channels are taken away one by one, each time the one that is
missed least once the rest have taken over its part by least squares: the optimal brain surgeon
(Hassibi and Stork, NeurIPS 1992) with a channel's columns in place of a single weight. Matching
and averaging (OTFusion) blurs channels that do not agree; this keeps those that say most.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_channels"]

_RIDGE = 1e-6  # of the inputs' mean square: identical channels make the problem singular
_SHARED = 0.9999  # below 1, for the same reason


def keep_channels(
    gram: Tensor,
    readout: Tensor,
    columns: Tensor,
    count: int,
    *,
    importance: Tensor | None = None,
    kinship: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Take channels away until ``count`` are left.

    With ``S`` the inverse of the Gram matrix, ``W`` the readout and ``D`` the outputs' importance,
    taking away the columns ``g`` of a channel costs
    :math:`\operatorname{tr}(D^2 W_g^T S_{gg}^{-1} W_g)` in the squared error. It leaves
    :math:`W - S_{:g} S_{gg}^{-1} W_g` and :math:`S - S_{:g} S_{gg}^{-1} S_{g:}`.

    Parameters
    ----------
    gram
        ``(num_features, num_features)``, float64: inner products of the reading layer's inputs.
    readout
        ``(num_features, num_outputs)``, float64: its weights.
    columns
        ``(num_channels, num_columns)``: the features of each channel. Features of no channel stay.
    count
        How many channels to keep.
    importance
        ``(num_outputs,)``: the weight of each output's error, not negative; default 1.
    kinship
        ``(num_channels, num_channels)``, positive semidefinite: how alike channels are presumed to
        be where the data do not tell, 1 for the same; default: each like itself only.

    Returns
    -------
    (kept, readout)
        The channels, in order, and the weights after the others have gone; theirs are 0.
    """
    size = len(gram)
    presumed = torch.eye(size, dtype=gram.dtype, device=gram.device)
    if kinship is not None:
        shared = _SHARED * kinship.to(presumed)
        shared.fill_diagonal_(1.0)
        for feature in columns.T:  # the same column of two channels
            presumed[feature[:, None], feature] = shared
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30)
    inverse = torch.linalg.inv(gram + ridge * presumed)
    both = torch.cat([inverse, readout], 1)  # what is done to one is done to the other
    squared = readout.new_ones(readout.size(1)) if importance is None else importance.square()
    alive = torch.arange(len(columns), device=columns.device)
    while len(alive) > count:
        features = columns[alive]
        blocks = both[features[:, :, None], features[:, None, :]]
        weights = both[features][..., size:]
        costs = (weights * torch.linalg.solve(blocks, weights)).sum(1) @ squared
        worst = int(costs.argmin())
        gone = features[worst]
        both -= both[:, gone] @ torch.linalg.solve(both[gone][:, gone], both[gone])
        both[gone] = 0.0
        both[:, gone] = 0.0
        alive = torch.cat([alive[:worst], alive[worst + 1 :]])
    return alive, both[:, size:]
