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

from clafusion import _native

__all__ = ["inverse_gram", "invert", "keep_channels"]

_RIDGE = 1e-6  # of the inputs' mean square: identical channels make the problem singular
_SHARED = 0.9999  # below 1, for the same reason
_DELAYED, _LEAST_LOSSES = 128, 32  # features and channels whose loss is taken off at once
_MUCH = 0.95  # of all are left where the others are dropped
_FEW = 2  # features for each output, at the least: few outputs are multiplied when asked for
_BLOCK = 384  # rows of a matrix that are brought up to date at once
_INVERTED = 192  # rows of a matrix that are inverted at once
_CANCELLED = 1e-4  # of a number is left when its last digits begin to matter


def inverse_gram(gram: Tensor, columns: Tensor, *, kinship: Tensor | None = None) -> Tensor:
    """Return the inverse of a Gram matrix, with a ridge that makes it one, in its own memory.

    Parameters
    ----------
    gram
        ``(num_features, num_features)``, contiguous, float64: inner products of the reading layer's
        inputs.
    columns
        ``(num_channels, num_columns)``: the features of each channel.
    kinship
        ``(num_channels, num_channels)``, positive semidefinite: how alike channels are presumed to
        be where the data do not tell, 1 for the same; default: each like itself only.
    """
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30)
    gram.diagonal().add_(ridge)
    if kinship is not None:
        for first in range(0, len(kinship), _BLOCK):
            shared = (ridge * _SHARED) * kinship[first : first + _BLOCK].to(gram)
            shared.diagonal(first).zero_()
            for feature in columns.T:  # the same column of two channels
                gram[feature[first : first + _BLOCK, None], feature] += shared
    return invert(gram)


def invert(matrix: Tensor) -> Tensor:
    r"""Return the inverse of a positive definite matrix, in its own memory.

    With the factor of Cholesky, :math:`A = L L^\top`, it is :math:`L^{-\top} L^{-1}`. LAPACK solves
    for both in small steps; here nearly all of it are products of large blocks, which take half the
    time.

    Parameters
    ----------
    matrix
        ``(size, size)``, contiguous, float64, symmetric.

    Raises
    ------
    torch.linalg.LinAlgError
        It is not positive definite.
    """
    left = matrix.mT  # LAPACK's matrices lie column by column
    torch.linalg.cholesky(left, out=left)
    size = len(left)
    for first in range(0, size, _INVERTED):
        rows = slice(first, min(first + _INVERTED, size))
        own = torch.eye(rows.stop - first).to(left)
        own = torch.linalg.solve_triangular(left[rows, rows], own, upper=False)
        above = left.new_empty(len(own), first)
        for start in range(0, first, _INVERTED):
            columns = slice(start, start + _INVERTED)
            torch.mm(left[rows, start:first], left[start:first, columns], out=above[:, columns])
        torch.mm(own, above, out=left[rows, :first]).neg_()
        left[rows, rows] = own
    for first in range(0, size, _INVERTED):  # what a row of the product reads is below it
        rows = slice(first, min(first + _INVERTED, size))
        made = left[first:, rows].T @ left[first:, : rows.stop]
        left[rows, :first] = made[:, :first]
        left[:first, rows] = made[:, :first].T
        left[rows, rows] = _mirrored(made[:, first:])
    return matrix


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
        ``(num_features, num_features)``: see :func:`inverse_gram`. Its memory is used up.
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
    features = columns.flatten().cpu()
    is_channels = torch.zeros(len(inverse), dtype=torch.bool)
    is_channels[features] = True
    order = torch.cat([features, torch.nonzero(~is_channels).squeeze(1)])
    scale = readout.new_ones(readout.size(1)) if importance is None else importance
    # One small step after another: the CPU is the place for that.
    inverse = inverse.cpu()
    is_in_order = bool((order == torch.arange(len(order))).all())
    inverse = inverse if is_in_order else inverse[order[:, None], order]
    left = _Left(inverse, readout.cpu()[order], scale.cpu(), *columns.shape)
    left.lose(len(columns) - count)
    found = torch.zeros(readout.shape, dtype=readout.dtype)
    found[order[left.features]] = left.weights
    return left.kept.to(columns.device), found.to(readout.device)


class _Left:
    """The channels that are left, and what the loss of the others has made of ``S``, ``M``, ``W``.

    Features lie channel by channel; those of no channel come last. To bring all of the matrices up
    to date after each loss would read and write them for a few rows. So what the losses take off
    them is kept apart and taken off for many at once, of symmetric matrices in the lower triangle.
    Only the channels' own blocks and the rows that are asked for are always up to date. Of few
    outputs there is no ``M``, only ``W``, of which these rows of ``M`` are made. Where a
    loss cancels most of what stood in a block of ``S``, as that of a copy does, the rows of this
    channel are brought up to date at once, so that its block and its rows agree to the last digit.
    """

    def __init__(
        self, inverse: Tensor, weights: Tensor, scale: Tensor, count: int, width: int
    ) -> None:
        self.features = torch.arange(len(weights))
        self.weights = weights
        self._channels, self._width = torch.arange(count), width
        self._is_left = torch.ones(count, dtype=torch.bool)
        self._scale, self._is_few = scale, weights.size(1) * _FEW <= len(weights)
        self._inverse, self._blocks = inverse, self._own(inverse)
        if self._is_few:
            self._products = self._sides()
            weighed = (weights * scale)[: count * width].view(count, width, -1)
            self._read = _mirrored(weighed @ weighed.mT)
        else:
            self._products = _lower_squares(weights * scale)
            self._read = self._own(self._products)

    @property
    def kept(self) -> Tensor:
        """The channels that are left, in order."""
        return self._channels[self._is_left]

    def _own(self, matrix: Tensor) -> Tensor:
        """Return each channel's block of a matrix, ``(num_channels, width, width)``."""
        count, width = len(self._channels), self._width
        size = count * width
        blocks = matrix[:size, :size].reshape(count, width, count, width)
        return _mirrored(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1))

    def _sides(self) -> Tensor:
        """Return ``-D^2 W^T`` and ``W^T``."""
        weights = self.weights.T
        return torch.stack([weights * -self._scale.square()[:, None], weights])

    def lose(self, count: int) -> None:
        """Take away so many channels, each time the one that is missed least."""
        at_once = max(_DELAYED // self._width, _LEAST_LOSSES)
        while count > 0:
            run = min(count, at_once)
            # What is taken off S is rows^T solved, off W given^T times the weights that were lost,
            # off M given^T half and its transpose.
            logs = self.weights.new_empty(4, run * self._width, len(self.features))
            lost = torch.empty(run, dtype=torch.int64)
            settled = self._blocks.diagonal(dim1=1, dim2=2).contiguous()
            _native.lose_channels(
                self._inverse,
                self._products,
                self._blocks,
                self._read,
                settled,
                logs,
                self._is_left,
                lost,
                run,
                cancelled=_CANCELLED,
            )
            lost = (lost[:, None] * self._width + torch.arange(self._width)).flatten()
            self._weigh(lost, logs[2])
            count -= run
            if count > 0:
                self._settle(logs)

    def _weigh(self, lost: Tensor, given: Tensor) -> None:
        """Bring the weights up to date; those of the features that are lost become 0."""
        # Each had taken over a part of those that were lost before it.
        taken = torch.linalg.solve_triangular(
            given[:, lost].T, self.weights[lost], upper=False, unitriangular=True
        )
        self.weights.addmm_(given.T, taken, alpha=-1)
        self.weights[lost] = 0.0

    def _settle(self, logs: Tensor) -> None:
        """Bring ``S`` and ``M`` up to date; drop what is lost where that is enough."""
        size = len(self._channels) * self._width
        is_left = torch.ones(len(self.features), dtype=torch.bool)
        is_left[:size] = self._is_left.repeat_interleave(self._width)
        stay = torch.nonzero(is_left).squeeze(1)
        if len(stay) <= _MUCH * len(is_left):
            logs = logs[:, :, stay]
            self._inverse = _native.keep_lower(self._inverse, stay)
            if not self._is_few:
                self._products = _native.keep_lower(self._products, stay)
            self.weights, self.features = self.weights[stay], self.features[stay]
            left = self._is_left
            self._channels, self._is_left = self._channels[left], left[left]
            self._blocks, self._read = self._blocks[left], self._read[left]
        rows, solved, given, half = logs
        _take_off(self._inverse, rows, solved)
        if self._is_few:
            self._products = self._sides()
        else:
            _take_off(self._products, torch.cat([given, half]), torch.cat([half, given]))


def _mirrored(blocks: Tensor) -> Tensor:
    """Return symmetric matrices of their lower triangles."""
    lower = blocks.tril()
    return lower + lower.tril(-1).mT


def _lower_squares(x: Tensor) -> Tensor:
    """Return ``x x^T``, of which the lower triangle is made."""
    found = x.new_empty(len(x), len(x))
    for first in range(0, len(x), _BLOCK):
        last = first + _BLOCK
        torch.mm(x[first:last], x[:last].T, out=found[first:last, :last])
    return found


def _take_off(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Take ``left^T right`` off the lower triangle of a symmetric matrix."""
    for first in range(0, len(matrix), _BLOCK):
        last = first + _BLOCK
        matrix[first:last, :last].addmm_(left[:, first:last].T, right[:, :last], alpha=-1)
