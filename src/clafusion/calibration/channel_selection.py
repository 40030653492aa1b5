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
_DELAYED = 128  # features whose loss is taken off the inverse at once
_CANCELLED = 1e-4  # of a number is left when its last digits begin to matter


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
    squared = readout.new_ones(readout.size(1)) if importance is None else importance.square()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge * presumed))
    left = _Left(inverse, readout.clone(), columns)
    while len(left.alive) > count:
        left.lose(int(left.costs(squared).argmin()))
    left.settle()
    found = torch.zeros_like(readout)
    found[left.features] = left.weights
    return left.alive, found


class _Left:
    """The channels that are left, and what the loss of the others has made of ``S`` and ``W``.

    To bring all of ``S`` up to date after each loss would read and write it for a few rows. So
    what the losses take off it, ``rows^T solved``, is kept apart and taken off for many at once.
    Only the channels' own blocks and the rows that are asked for are always up to date. Where a
    loss cancels most of what stood there, as that of a copy does, it is taken off at once, so that
    blocks and rows agree to the last digit.
    """

    def __init__(self, inverse: Tensor, weights: Tensor, columns: Tensor) -> None:
        self.alive = torch.arange(len(columns), device=columns.device)
        self.features = torch.arange(len(weights), device=columns.device)
        self.weights = weights  # of these features, as all that follows
        self._columns = columns
        self._inverse = inverse
        self._blocks = inverse[columns[:, :, None], columns[:, None, :]]
        self._settled = self._diagonals().clone()  # when S was up to date
        self._losses: list[Tensor] = []  # features
        self._rows, self._solved = weights.new_empty(2, _DELAYED + columns.size(1), len(weights))

    def costs(self, squared: Tensor) -> Tensor:
        """Return by how much the loss of each channel raises the squared error."""
        found: Tensor
        weights = self.weights[self._columns]
        if self._columns.size(1) == 1:
            found = weights.squeeze(1).square() @ squared / self._blocks.flatten()
        else:
            found = (weights * torch.linalg.solve(self._blocks, weights)).sum(1) @ squared
        return found

    def lose(self, channel: int) -> None:
        """Take a channel away; the others take over its part."""
        gone, block = self._columns[channel], self._blocks[channel]
        first = len(gone) * len(self._losses)
        rows = self._inverse[gone] - self._rows[:first, gone].T @ self._solved[:first]
        solved = torch.linalg.solve(block, rows)
        self.weights -= solved.T @ self.weights[gone]
        stay = self.alive != self.alive[channel]
        self.alive, self._columns = self.alive[stay], self._columns[stay]
        at = rows[:, self._columns].permute(1, 2, 0), solved[:, self._columns].permute(1, 0, 2)
        self._blocks, self._settled = self._blocks[stay] - at[0] @ at[1], self._settled[stay]
        self._losses.append(gone)
        last = first + len(gone)
        self._rows[first:last], self._solved[first:last] = rows, solved
        if last >= _DELAYED or bool((self._diagonals() < _CANCELLED * self._settled).any()):
            self.settle()

    def _diagonals(self) -> Tensor:
        found: Tensor = self._blocks.diagonal(dim1=1, dim2=2)
        return found

    def settle(self) -> None:
        """Bring ``S`` up to date, and drop the features of the channels that are lost."""
        if not self._losses:
            return
        count = self._columns.size(1) * len(self._losses)
        stay = torch.ones(len(self.features), dtype=torch.bool, device=self.features.device)
        stay[torch.cat(self._losses)] = False
        rows, solved = self._rows[:count, stay], self._solved[:count, stay]
        self._inverse = self._inverse[stay][:, stay].addmm_(rows.T, solved, alpha=-1)
        self._columns = (stay.cumsum(0) - 1)[self._columns]
        self.features, self.weights = self.features[stay], self.weights[stay]
        self._rows, self._solved = rows.new_empty(2, *self._rows.shape)[..., : len(self.features)]
        self._losses = []
        self._settled = self._diagonals().clone()
