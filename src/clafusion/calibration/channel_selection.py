r"""Which hidden channels to keep of networks that stand side by side.

Channels that a single layer writes and a single layer reads need no partner: laid side by side,
all networks' channels ``h`` give the reading layer's weighted mean output exactly,

.. math:: \sum_p w_p W_p h_p,

only with too many channels. So channels are taken away one by one, each time the one that is
missed least once the rest have taken over its part by least squares: the optimal brain surgeon
(Hassibi and Stork, NeurIPS 1992) with a channel's columns in place of a single weight. Matching
and averaging (OTFusion) blurs channels that do not agree; this keeps those that say most.

Let ``S`` be the inverse of the Gram matrix of the features, ``W`` the readout and ``D`` the
outputs' importance. Taking away the columns ``g`` of a channel costs
:math:`\operatorname{tr}(D^2 W_g^T S_{gg}^{-1} W_g)` in the squared error. It leaves

.. math:: W - P^T W_g, \qquad S - S_{:g} P, \qquad M - P^T Q - Q^T P,

with :math:`P = S_{gg}^{-1} S_{g:}`, :math:`M = W D^2 W^T` and
:math:`Q = M_{g:} - \tfrac12 M_{gg} P`. Costs are read off the channels' own blocks of ``S`` and
``M``, so that a step takes no longer where there are thousands of outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_gram", "keep_channels"]

_RIDGE = 1e-6  # of the inputs' mean square: identical channels make the problem singular
_SHARED = 0.9999  # below 1, for the same reason
_DELAYED = 256  # features whose loss is taken off the matrices at once
_CANCELLED = 1e-4  # of a number is left when its last digits begin to matter


def inverse_gram(gram: Tensor, columns: Tensor, *, kinship: Tensor | None = None) -> Tensor:
    """Return the inverse of a Gram matrix, with a ridge that makes it one.

    Parameters
    ----------
    gram
        ``(num_features, num_features)``, float64: inner products of the reading layer's inputs.
    columns
        ``(num_channels, num_columns)``: the features of each channel.
    kinship
        ``(num_channels, num_channels)``, positive semidefinite: how alike channels are presumed to
        be where the data do not tell, 1 for the same; default: each like itself only.
    """
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30)
    penalised = gram.clone()
    penalised.diagonal().add_(ridge)
    if kinship is not None:
        shared = (ridge * _SHARED) * kinship.to(gram)
        shared.fill_diagonal_(0.0)
        for feature in columns.T:  # the same column of two channels
            penalised[feature[:, None], feature] += shared
    return torch.cholesky_inverse(torch.linalg.cholesky(penalised))


def keep_channels(
    inverse: Tensor,
    readout: Tensor,
    columns: Tensor,
    count: int,
    *,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Take channels away until ``count`` are left.

    Parameters
    ----------
    inverse
        ``(num_features, num_features)``: see :func:`inverse_gram`.
    readout
        ``(num_features, num_outputs)``, float64: the reading layer's weights.
    columns
        ``(num_channels, num_columns)``: the features of each channel. Features of no channel stay.
    count
        How many channels to keep.
    importance
        ``(num_outputs,)``: the weight of each output's error, not negative; default 1.

    Returns
    -------
    (kept, readout)
        The channels, in order, and the weights after the others have gone; theirs are 0.
    """
    is_channels = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    is_channels[columns.flatten()] = True
    order = torch.cat([columns.flatten(), torch.nonzero(~is_channels).squeeze(1)])
    scale = readout.new_ones(readout.size(1)) if importance is None else importance
    left = _Left(inverse[order[:, None], order], readout[order], scale, columns.shape)
    while left.count > count:
        left.lose()
    left.settle()
    found = torch.zeros_like(readout)
    found[order[left.features]] = left.weights
    return left.channels, found


class _Left:
    """The channels that are left, and what the loss of the others has made of ``S``, ``M``, ``W``.

    Features lie channel by channel; those of no channel come last. To bring all of the matrices up
    to date after each loss would read and write them for a few rows. So what the losses take off
    them is kept apart and taken off for many at once. Only the channels' own blocks and the rows
    that are asked for are always up to date. Where a loss cancels most of what stood in a block of
    ``S``, as that of a copy does, the rows of this channel are brought up to date at once, so that
    its block and its rows agree to the last digit.
    """

    def __init__(
        self, inverse: Tensor, weights: Tensor, scale: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.count, self._width = shape
        self.channels = torch.arange(self.count, device=weights.device)
        self.features = torch.arange(len(weights), device=weights.device)
        self.weights = weights
        self._inverse = inverse
        scaled = weights * scale
        self._products = scaled @ scaled.T
        self._begin()

    def _begin(self) -> None:
        """Begin a run of losses: all matrices are up to date, and without what is lost."""
        self._lost: list[int] = []  # positions among the channels
        self._is_left = torch.ones_like(self.channels, dtype=torch.bool)
        self._mask = self.weights.new_ones(len(self.features))
        self._blocks, self._read = self._own(self._inverse), self._own(self._products)
        self._settled = self._diagonals().clone()
        # Of S rows^T solved is taken off, of W given^T times the weights that were lost, of M
        # given^T half and its transpose.
        logs = self.weights.new_empty(4, _DELAYED + self._width, len(self.features))
        self._rows, self._solved, self._given, self._half = logs

    def _own(self, matrix: Tensor) -> Tensor:
        """Return each channel's block of a matrix, ``(num_channels, num_columns, num_columns)``."""
        count, width = len(self.channels), self._width
        size = count * width
        blocks = matrix[:size, :size].reshape(count, width, count, width)
        found: Tensor = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        return found

    def _of_channels(self, rows: Tensor) -> Tensor:
        """Return rows as ``(num_channels, num_rows, num_columns)``."""
        count = len(self.channels)
        theirs = rows[:, : count * self._width]
        return theirs.view(len(rows), count, self._width).transpose(0, 1)

    def _diagonals(self) -> Tensor:
        found: Tensor = self._blocks.diagonal(dim1=1, dim2=2)
        return found

    def _costs(self) -> Tensor:
        """Return by how much the loss of each channel raises the squared error."""
        if self._width == 1:
            found = (self._read / self._blocks).flatten()
        else:
            solved = torch.linalg.solve(self._blocks, self._read)
            found = solved.diagonal(dim1=1, dim2=2).sum(1)
        costs: Tensor = found.clamp_(min=0.0).masked_fill_(~self._is_left, torch.inf)
        return costs

    def lose(self) -> None:
        """Take away the channel that is missed least; the others take over its part."""
        channel = int(self._costs().argmin())
        own = slice(channel * self._width, (channel + 1) * self._width)
        first = len(self._lost) * self._width
        last = first + self._width
        rows = self._inverse[own] - self._rows[:first, own].T @ self._solved[:first]
        read = self._products[own] - self._given[:first, own].T @ self._half[:first]
        read -= self._half[:first, own].T @ self._given[:first]
        solved = torch.linalg.solve(self._blocks[channel], rows)
        half = torch.addmm(read, self._read[channel], solved, alpha=-0.5)
        self._lost.append(channel)
        self._is_left[channel] = False
        self._mask[own] = 0.0  # what is lost changes no more
        logs = self._rows, self._solved, self._given, self._half
        for log, new in zip(logs, (rows, solved, solved, half), strict=True):
            torch.mul(new, self._mask, out=log[first:last])
        rows, solved, half = (
            self._of_channels(log[first:last]) for log in (self._rows, self._solved, self._half)
        )
        self._blocks -= rows.transpose(1, 2) @ solved
        shared = solved.transpose(1, 2) @ half
        self._read -= shared + shared.transpose(1, 2)
        self.count -= 1
        if last >= _DELAYED:
            self.settle()
        else:
            self._refresh(last)

    def _refresh(self, last: int) -> None:
        """Bring those rows of ``S`` up to date of whose own block most is cancelled."""
        is_cancelled = (self._diagonals() < _CANCELLED * self._settled).any(1) & self._is_left
        channels = torch.nonzero(is_cancelled).squeeze(1)
        if len(channels) == 0:
            return
        width = torch.arange(self._width, device=channels.device)
        own = (channels[:, None] * self._width + width).flatten()
        rows = self._inverse[own] - self._rows[:last, own].T @ self._solved[:last]
        self._inverse[own], self._inverse[:, own] = rows, rows.T
        self._rows[:last, own] = self._solved[:last, own] = 0.0
        blocks = self._of_channels(rows)[channels].unflatten(1, (len(channels), self._width))
        self._blocks[channels] = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        self._settled[channels] = self._diagonals()[channels]

    def settle(self) -> None:
        """Bring all matrices up to date, and drop what is lost."""
        if not self._lost:
            return
        stay = torch.nonzero(self._mask).squeeze(1)
        channels = torch.tensor(self._lost, device=stay.device)[:, None] * self._width
        lost = (channels + torch.arange(self._width, device=stay.device)).flatten()
        logs = self._rows, self._solved, self._given, self._half
        rows, solved, given, half = (log[: len(lost)] for log in logs)
        # Each lost channel had taken over a part of those that were lost before it.
        taken = torch.linalg.solve_triangular(
            given[:, lost].T, self.weights[lost], upper=False, unitriangular=True
        )
        rows, solved, given, half = (log[:, stay] for log in (rows, solved, given, half))
        self.weights = self.weights[stay].addmm_(given.T, taken, alpha=-1)
        square = stay[:, None], stay
        self._inverse = self._inverse[square].addmm_(rows.T, solved, alpha=-1)
        left, right = torch.cat([given, half]), torch.cat([half, given])
        self._products = self._products[square].addmm_(left.T, right, alpha=-1)
        self.channels, self.features = self.channels[self._is_left], self.features[stay]
        self._begin()
