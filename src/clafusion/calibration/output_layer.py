r"""Refit the last layer to the probabilities that the parents put out together.

A mean of probabilities is no mean of what any layer puts out, so that no regression of the layers
aims at it. But the last layer alone, given what the fused network feeds it, is a convex problem.
With :math:`x_i` its inputs and :math:`\bar y_i` what the parents put out together there, the
weights :math:`W_0` of the regression become

.. math:: W = \arg\min_W \frac{1}{n} \sum_i \tau\, \mathrm{CE}\bigl(
              \operatorname{softmax}(\log \bar y_i / \tau),\,
              \operatorname{softmax}(W x_i / \tau)\bigr)
              + \frac{\lambda}{2} \lVert W - W_0 \rVert^2 .

That is distillation (Hinton et al., arXiv 1503.02531) of one layer, without labels. The temperature
:math:`\tau` is below 1, on both sides: what counts is which class is the largest, not how far
behind the others are, for a layer of few inputs cannot have both. :math:`W_0` is the minimum where
the fused network puts out what the parents do, whatever the temperature.

It is solved by Newton's method with conjugate gradients in a trust region (Steihaug, SIAM J. Numer.
Anal. 1983) in float64, in coordinates in which the layer's inputs are uncorrelated, to its minimum:
what comes out does not depend on the order of the parents.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.calibration.least_squares.equations import penalty_of
from clafusion.calibration.least_squares.places import Place, regressed_places
from clafusion.calibration.least_squares.rows import (
    Positions,
    by_position,
    channels_last,
    chosen_positions,
    chosen_rows,
    features,
    num_positions,
)
from clafusion.calibration.least_squares.storing import stacked, store_solution
from clafusion.config import LeastSquares
from clafusion.execution.walk import Walk
from clafusion.merging.combination import are_probabilities, log_probabilities, together
from clafusion.merging.problem import FusionProblem
from clafusion.profiling.batches import Data, in_chunks
from clafusion.profiling.masks import counting_outputs, kept_positions
from clafusion.threads import one_thread

__all__ = ["refit_output_layer", "refitted_weights"]

Flat: TypeAlias = NDArray[np.float64]

_TEMPERATURE = 1 / 16
_CHUNK = 125  # inputs that are run at once
_ROWS, _LEAST_ROWS = 8192, 500
_WORK = 1 << 29  # products of a pass over all rows
_STEPS, _STILL = 100, 1e-7  # of the solver, and the slope at which it ends
_EXACT = 2e-5  # probabilities that are as near to the goal are there
_SAME = 1e-3  # how far roundings may move probabilities


def refit_output_layer(
    problem: FusionProblem,
    state: MutableMapping[str, Tensor],
    data: Data,
    settings: LeastSquares,
    *,
    seed: int = 0,
) -> str | None:
    """Refit the last layer in a state, in place, to what ``problem.combination`` says.

    Nothing changes where the network puts that out already.

    Returns
    -------
    str or None
        Why the layer was left as it is; None where it was refitted, or need not be.
    """
    if any(one.output_plan is not None for one in problem.parents):
        return "the outputs are matched"
    last = [
        one for one in regressed_places(problem, state)[-1:] if one.is_output and one.norm is None
    ]
    if not last:
        return "it is no layer that can be regressed"
    place = last[0]
    start = stacked(place, state)
    rows = min(_ROWS, _WORK // start.numel())
    if rows < _LEAST_ROWS:
        return f"it has {start.numel()} weights, too many"
    collected = list(_rows(problem, place, state, data, settings.samples, rows, seed))
    if not collected:
        return "more than a softmax follows it"
    inputs, logs = (torch.cat(one) for one in zip(*collected, strict=True))
    found = (inputs @ start).softmax(-1)
    if float((found - logs.exp()).abs().max()) > _EXACT:
        store_solution(place, state, refitted_weights(inputs, logs, start, settings.ridge))
    return None


def _rows(
    problem: FusionProblem,
    place: Place,
    state: MutableMapping[str, Tensor],
    data: Data,
    samples: int,
    num_rows: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the layer's inputs, with the 1 of a bias, and what the parents put out there.

    Both are in float64: ``(num_rows, num_features (+ 1))``, and ``(num_rows, num_classes)`` the
    logarithms of the probabilities. Nothing is yielded where a softmax of what the layer puts out
    is not what the network puts out.
    """
    target, wanted = problem.target, problem.combination
    assert wanted.output is not None, "outputs that are no classes have no probabilities"
    counted = [one for one in problem.parents if one.weights.overall > 0]
    weights = [one.weights.overall for one in counted]
    chosen: Positions | None = None
    batches = in_chunks(data, target, samples, _CHUNK, device=target.device)
    for i, batch in enumerate(batches):
        count = 0 if target.graph is not None else len(batch[0])
        walk = Walk(target, batch, state, {place.incoming, place.affine.name})
        made = by_position(channels_last(walk, place.affine.name, place.point), (), count)
        x = walk.reach_for(place.incoming, place.affine.name)
        outputs = [walk.output_tensors()]
        outputs += [one.traced.output_tensors(batch) for one in counted]
        found = [one[wanted.output].movedim(wanted.axis, -1) for one in outputs]
        are_soft = all(map(are_probabilities, found))
        logs = [log_probabilities(one, are_soft=are_soft).reshape(made.shape) for one in found]
        own, *parents = logs
        if float((made.double().softmax(-1) - own.exp()).abs().max()) > _SAME:
            return
        if chosen is None:
            every = num_positions(place.affine, x, place.kernel_size, count)
            generator = torch.Generator().manual_seed(seed)
            chosen = chosen_positions(every, num_rows, samples, generator)
        positions = chosen.of(i)
        sides = features(
            place.affine,
            x,
            place.kernel_size,
            positions,
            count,
            has_bias=place.point.bias is not None,
        ).T.double()
        goal = chosen_rows(together(parents, weights, wanted.means).log(), positions)
        mask = counting_outputs(target, kept_positions(target, batch), wanted.output)
        if mask is not None and mask.shape == made.shape[:2]:
            counting = chosen_rows(mask.unsqueeze(-1), positions).squeeze(-1)
            sides, goal = sides[counting], goal[counting]
        yield sides, goal


def refitted_weights(x: Tensor, logs: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Return the weights that make the probabilities of a goal of a layer's inputs.

    Parameters
    ----------
    x
        ``(num_rows, num_features)``: the inputs, in float64.
    logs
        ``(num_rows, num_classes)``: the logarithms of the goal.
    start
        ``(num_features, num_classes)``: the weights to begin with, towards which the ridge pulls.
    ridge
        The penalty, relative to the mean square of the inputs, as a regression has it.
    """
    from scipy.optimize import minimize  # here, for it takes long to import

    count = len(x)
    penalty = penalty_of(ridge, x.square().sum(0), count) / count
    goal = (logs / _TEMPERATURE).softmax(-1)
    made = x @ start
    with one_thread():
        gram = x.T @ x / count
        gram.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(gram).T

        def unwhitened(flat: Flat) -> Tensor:
            change = torch.from_numpy(flat).to(start).view_as(start)
            found: Tensor = torch.linalg.solve_triangular(factor, change, upper=True)
            return found

        def whitened(slope: Tensor) -> Flat:
            found = torch.linalg.solve_triangular(factor.T, slope, upper=False)
            return np.asarray(found.flatten().cpu())

        def log_of(moved: Tensor) -> Tensor:
            return ((made + x @ moved) / _TEMPERATURE).log_softmax(-1)

        def loss_and_slope(flat: Flat) -> tuple[float, Flat]:
            moved = unwhitened(flat)
            log = log_of(moved)
            fit = -_TEMPERATURE * float((goal * log).sum()) / count
            slope = x.T @ (log.exp() - goal) / count + penalty * moved
            return fit + penalty / 2 * float(moved.square().sum()), whitened(slope)

        def curvature(flat: Flat, along: Flat) -> Flat:
            chances, moved = log_of(unwhitened(flat)).exp(), unwhitened(along)
            shift = x @ moved
            shift = chances * (shift - (chances * shift).sum(-1, keepdim=True)) / _TEMPERATURE
            return whitened(x.T @ shift / count + penalty * moved)

        found = minimize(
            loss_and_slope,
            np.zeros(start.numel()),
            jac=True,
            hessp=curvature,
            method="trust-ncg",
            options={"maxiter": _STEPS, "gtol": _STILL},
        )
        return start + unwhitened(found.x)
