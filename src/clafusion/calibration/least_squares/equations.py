"""The regression of one layer: its normal equations, or where rows are few their dual."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from clafusion import _native
from clafusion.calibration.channel_selection import invert
from clafusion.profiling.gram import add_products, gram_matrix
from clafusion.profiling.moments import is_plain
from clafusion.threads import one_thread

__all__ = [
    "DualEquations",
    "Equations",
    "NormalEquations",
    "equations_for",
    "penalty_of",
    "squares",
]

_ROUNDS = 2  # of the majorisation of a ReLU
_SCARCE = 100  # how much more the penalty is where there is one row for each column
_RUN, _RUNS = 256, 16  # rows that are summed in float32, and how many such runs at once
_BLOCK = 192  # rows of a product that are computed at once


class Equations(ABC):
    """A regression of a layer's outputs on its inputs.

    It is solved for the change of the weights, so that where the parents agree nothing is left and
    the weights stay exactly as they are. So they do where no more is left than comes of the
    roundings of the parents' values: in half precision a regression would take these for an error.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.rows = 0
        self._precision = 0.0  # of the parents' values
        self._shortcuts = start.new_zeros(start.size(1))  # sums of squares
        self._left = start.new_zeros(start.size(1))  # of what the start leaves of the goal

    def add(
        self,
        sides: Tensor,
        goal: Tensor,
        active: Tensor | None,
        shortcut: Tensor | None = None,
    ) -> None:
        """Add rows.

        Parameters
        ----------
        sides
            ``(num_features (+ 1) + num_channels, num_rows)``: the inputs, see ``features``,
            and room for what the weights leave of the goal.
        goal, active
            ``(num_rows, num_channels)``: what the inputs should become, and what that should be
            after the ReLU.
        shortcut
            ``(num_rows, num_channels)``: what is added to what the inputs become; ``goal`` is the
            sum.
        """
        self._precision = max(self._precision, torch.finfo(goal.dtype).eps)
        if shortcut is not None:
            self._shortcuts += _square_sums(shortcut.T)
            goal = goal - shortcut
        x, residual = sides.tensor_split([len(self.start)])
        made = _outputs(x, self.start)
        residual.copy_((goal - made.T).T)
        self._left += _square_sums(residual)
        self.rows += len(goal)
        self._take(sides, made, None if active is None else active.T.to(x))

    @abstractmethod
    def _take(self, sides: Tensor, made: Tensor, active: Tensor | None) -> None:
        """Take rows: inputs and residuals, what the start makes, what should leave the ReLU.

        All come channels first.
        """

    @abstractmethod
    def _solved(self, penalty: float) -> Tensor:
        """Return the weights, given the penalty on the squares of their change."""

    @abstractmethod
    def _feature_squares(self) -> Tensor:
        """Return the sum of squares of each input."""

    @abstractmethod
    def _start_squares(self) -> Tensor:
        """Return the sum of squares of each output that the start makes."""

    @abstractmethod
    def _left_active(self) -> Tensor:
        """Return the sums of squares of what the start leaves of what should leave the ReLU.

        They are zero without a ReLU.
        """

    @abstractmethod
    def output_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return each output's mean and mean square, without the bias.

        ``weights`` are ``(num_channels, num_features)``; the regression has a bias.
        """

    def solved(self, ridge: float) -> Tensor:
        """Return the weights ``(num_features (+ 1), num_channels)``."""
        penalty = penalty_of(ridge, self._feature_squares(), self.rows)
        settled, weights = self._is_settled(), self._solved(penalty)
        if bool(settled.any()):
            weights[:, settled] = self.start[:, settled]
        return weights

    def _is_settled(self) -> Tensor:
        """Say of which channels the start leaves no more than roundings.

        A unit in the last place is allowed to each term of a product, to the product, and to the
        sum of it and the shortcut.
        """
        terms = self._feature_squares() @ self.start.square()
        # Products would take long: their squares are at most their number times those of the terms.
        most = self._precision**2 * ((len(self.start) + 1) * terms + self._shortcuts)
        settled = self._left <= most
        if bool(settled.any()):
            allowed = self._precision**2 * (self._start_squares() + terms + self._shortcuts)
            settled = self._left <= allowed
            if bool(settled.any()):  # what should leave the ReLU may be something else
                settled &= self._left_active() <= allowed
        return settled


class NormalEquations(Equations):
    """A regression by sums over rows, which keeps the rows where a ReLU needs them again."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start)
        size = len(start)
        # Of inputs, and of residuals, with the inputs.
        self._sums = start.new_zeros(sum(start.shape), size)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def _take(self, sides: Tensor, _: Tensor, active: Tensor | None) -> None:
        if sides.dtype == torch.float64:
            self._sums += squares(sides)[:, : len(self.start)]
        else:
            add_products(self._sums, sides)
        if active is not None:
            self._kept.append((sides[: len(self.start)], active))

    def _solved(self, penalty: float) -> Tensor:
        size = len(self.start)
        penalised = self._sums[:size].clone()
        penalised.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(penalised)
        weights = self.start + torch.cholesky_solve(self._sums[size:].T, factor)
        for _ in range(_ROUNDS if self._kept else 0):
            residuals = torch.zeros_like(weights)
            for x, active in self._kept:
                residuals += _products(x, _left_of(active, _outputs(x, weights)))
            weights = weights + torch.cholesky_solve(residuals, factor)
        return weights

    def _feature_squares(self) -> Tensor:
        return self._sums[: len(self.start)].diagonal()

    def _start_squares(self) -> Tensor:
        return (self.start * (self._sums[: len(self.start)] @ self.start)).sum(0)

    def _left_active(self) -> Tensor:
        found = torch.zeros_like(self._left)
        for x, active in self._kept:
            found += _square_sums(_left_of(active, _outputs(x, self.start)))
        return found

    def output_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return them by the inputs' own moments."""
        moments = self._sums[: len(self.start)] / self.rows
        mean_squares = (weights * (weights @ moments[:-1, :-1])).sum(1)
        return weights @ moments[:-1, -1], mean_squares


class DualEquations(Equations):
    """The same regression by inner products of rows, for fewer rows than features.

    With ``X`` the inputs, features by rows, ``R`` the residuals, rows by channels, and ``p`` the
    penalty, the change of the weights :math:`(X X^T + p)^{-1} X R` is
    :math:`X (X^T X + p)^{-1} R`.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__(start)
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        self._made: list[Tensor] = []  # of the start, where a ReLU asks for it

    def _take(self, sides: Tensor, made: Tensor, active: Tensor | None) -> None:
        self._kept.append((sides, active))
        if active is not None:
            self._made.append(made)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Return inputs and residuals of all rows, rows first."""
        sides = torch.cat([sides.T for sides, _ in self._kept])
        inputs, residuals = sides.tensor_split([len(self.start)], 1)
        return inputs, residuals

    def _solved(self, penalty: float) -> Tensor:
        inputs, residuals = self._joined()
        products = squares(inputs)
        inverse = products.clone()
        inverse.diagonal().add_(penalty)
        invert(inverse)
        duals = inverse @ residuals.double()
        actives = [active for _, active in self._kept if active is not None]
        if actives:
            active, made = torch.cat(actives, 1).T, torch.cat(self._made, 1).T
            for _ in range(_ROUNDS):
                left = _left_of(active, made + (products @ duals).to(made))
                duals.addmm_(inverse, left.double())
        # Channel by channel, as kernels lie.
        return torch.addmm(self.start.T, duals.T, inputs.double()).T

    def _feature_squares(self) -> Tensor:
        found = torch.zeros_like(self.start[:, 0])
        for sides, _ in self._kept:
            found += _square_sums(sides[: len(found)])
        return found

    def _start_squares(self) -> Tensor:
        found = torch.zeros_like(self._left)
        for sides, _ in self._kept:
            found += _square_sums(_outputs(sides[: len(self.start)], self.start))
        return found

    def _left_active(self) -> Tensor:
        found = torch.zeros_like(self._left)
        for sides, active in self._kept:
            if active is not None:
                made = _outputs(sides[: len(self.start)], self.start)
                found += _square_sums(_left_of(active, made))
        return found

    def output_moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return them by the outputs of all rows."""
        means, mean_squares = torch.zeros_like(self._left), torch.zeros_like(self._left)
        for sides, _ in self._kept:
            made = _outputs(sides[: weights.size(1)], weights.T)
            means += made.double().sum(1)
            mean_squares += _square_sums(made)
        return means / self.rows, mean_squares / self.rows


def penalty_of(ridge: float, squares: Tensor, rows: int) -> float:
    """Return the penalty on the squares of the weights' change, given the inputs' sums of squares.

    The fewer rows there are for each input, the less the sums say, and the more it is.
    """
    ridge *= 1 + _SCARCE * len(squares) / max(rows, 1)
    return ridge * max(float(squares.mean()), 1e-30)


def equations_for(start: Tensor, num_rows: int) -> Equations:
    """Return an empty regression, in the form that is smaller with so many rows."""
    return DualEquations(start) if num_rows < len(start) else NormalEquations(start)


def _left_of(active: Tensor, found: Tensor) -> Tensor:
    """Return what outputs ``found`` leave of what should be there after a ReLU."""
    # Below 0 anything will do where nothing should leave the ReLU.
    idle = (found <= 0) & (active <= 0)
    return (active - found).masked_fill_(idle, 0.0)


def _outputs(x: Tensor, weights: Tensor) -> Tensor:
    """Return what weights make of inputs: ``(num_channels, num_rows)``.

    PyTorch shares the rows of a product among its threads, and rounds otherwise where each has a
    few: so the many rows come first.
    """
    return (x.T @ weights.to(x)).T


def _square_sums(x: Tensor) -> Tensor:
    """Return the sum of squares of each row in float64, the same bytes for any threads."""
    for axis, value in enumerate((x, x.T)):
        if is_plain(value):
            mean, variance = _native.channel_moments(value, axis)
            return x.size(1) * (variance + mean.square())
    with one_thread():
        return x.double().square().sum(1)


def squares(x: Tensor) -> Tensor:
    """Return ``X X^T`` of features in float64, the same bytes for any number of threads."""
    if x.dtype != torch.float64:
        return gram_matrix(x)
    # The package's kernel would round. Of a symmetric product half is enough.
    total = x.new_empty(len(x), len(x))
    with one_thread():
        for first in range(0, len(x), _BLOCK):
            last = first + _BLOCK
            made = torch.mm(x[first:last], x[:last].T, out=total[first:last, :last])
            own = made[:, first:]
            own.copy_(own.tril() + own.tril(-1).T)
            total[:first, first:last] = made[:, :first].T
    return total


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ``X Y^T`` in float64, the same bytes for any number of threads.

    PyTorch shares long sums among its threads, and adds up their parts in float32. So the sums are
    made in short runs of rows, and the runs added up here.
    """
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    if x.dtype == torch.float64:
        with one_thread():
            return total + x @ y.T
    whole = y.size(1) // _RUN * _RUN
    for first in range(0, whole, _RUNS * _RUN):
        last = min(first + _RUNS * _RUN, whole)
        left, right = (one[:, first:last].unflatten(1, (-1, _RUN)) for one in (x, y))
        total += (left.transpose(0, 1) @ right.permute(1, 2, 0)).double().sum(0)
    with one_thread():
        return total + x[:, whole:] @ y[:, whole:].T
