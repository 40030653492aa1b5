"""Two profiles -> for each channel group the cost of matching every two channels.

A cost is a function of the two networks' values at a hook point. Its mean over the hook points
counts. Add one of your own by :func:`channel_cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from clafusion.alignment.layer_costs import check_same_inputs
from clafusion.config import CHANNEL_COSTS
from clafusion.correspondence.correspondence import Correspondence
from clafusion.correspondence.hooks import HookPair
from clafusion.errors import InputError, StructureError
from clafusion.matching.graph_costs import fused_gromov_wasserstein
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.statistics import channel_statistics, standardised

__all__ = [
    "MAX_CHANNELS",
    "ChannelCost",
    "activation_costs",
    "channel_cost",
    "correlations",
    "flowing",
    "group_costs",
    "group_structures",
    "group_views",
    "measures",
    "output_costs",
    "pair_costs",
    "says_nothing",
    "view_costs",
]

ChannelCost: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Values ``(num_rows, num_source)`` and ``(num_rows, num_target)`` -> costs of every two."""

_IN_CACHE = 1 << 16  # entries of a cost that stay close to a core
_TIE = 1e-5  # what a difference of means or deviations counts: it decides where correlations do not

MAX_CHANNELS = 10_000
"""Largest group that is matched: cost and plan of 10,000 channels take 1.6 GB."""


class _Measure(NamedTuple):
    at_hook: ChannelCost
    of_mean: Callable[[Tensor], Tensor]
    on_structure: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def costs(self, x: Tensor, y: Tensor, structure: Tensor | None) -> Tensor:
        """Return the costs at a hook point, whose rows may be nodes of a structure."""
        if self.on_structure is not None:
            return self.on_structure(x, y, structure)
        return self.at_hook(x, y)


_MEASURES: dict[str, _Measure] = {}


def channel_cost(
    name: str,
    help: str | None = None,  # noqa: A002
    *,
    of_mean: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> Callable[[ChannelCost], ChannelCost]:
    """Register a cost of matching two channels by their activations.

    The function gets the values of the channels of both networks at one hook point,
    ``(num_rows, num_source)`` and ``(num_rows, num_target)``, over the same inputs and positions,
    and returns ``(num_source, num_target)``, smaller is closer.

    Parameters
    ----------
    name
        What the option ``matching.cost`` calls it.
    help
        One line for the reference; not for those of :mod:`clafusion.config`, which have theirs.
    of_mean
        What the mean over the hook points is turned into, for example its root.

    Raises
    ------
    ValueError
        There is a cost of this name already, or a new one has no ``help``.
    """

    def register(function: ChannelCost) -> ChannelCost:
        if name in _MEASURES or (help is not None and name in CHANNEL_COSTS):
            raise ValueError(f"there is a channel cost {name!r} already")
        if name not in CHANNEL_COSTS:
            if help is None:
                raise ValueError(f"channel cost {name!r} needs a line of help")
            CHANNEL_COSTS.add(name, help)
        _MEASURES[name] = _Measure(function, of_mean)
        return function

    return register


@channel_cost("correlation", of_mean=lambda mean: mean.neg_().add_(1.0))
def correlations(x: Tensor, y: Tensor) -> Tensor:
    r"""Return how alike every two channels are: their correlation, or what decides in its place.

    With the means :math:`\mu` and the deviations :math:`\sigma` of two channels

    .. math:: \operatorname{corr}(x, y)
              - \varepsilon \left(d(\mu_x, \mu_y) + d(\sigma_x, \sigma_y)\right), \qquad
              d(a, b) = \frac{|a - b|}{\max(|a|, |b|)}, \quad \varepsilon = 10^{-5}:

    channels that are equally correlated go to those of like means and deviations. In place of the
    correlation of two constant channels, as dead ones behind a norm, stands :math:`1 - d(x, y)`, at
    least 0, and 0 where both are 0. Where all channels of both are constant nothing is said: 0.
    """
    found = (standardised(x).T @ standardised(y)).div_(len(x))
    of_x, of_y = channel_statistics(x), channel_statistics(y)
    constant = of_x.scale == 0, of_y.scale == 0
    if all(bool(one.all()) for one in constant):
        return found  # which says nothing
    if all(bool(one.any()) for one in constant):
        a, b = x[0, constant[0]][:, None], y[0, constant[1]]
        largest = torch.maximum(a.abs(), b.abs())
        alike = 1.0 - (a - b).abs() / torch.where(largest > 0, largest, 1.0)
        alike = torch.where(largest > 0, alike.clamp(min=0), 0.0)
        found[constant[0].nonzero(), constant[1].nonzero().T] = alike.to(found)
    # Channels that were dead before a norm over all channels are correlated, each with all others.
    rows = max(_IN_CACHE // len(of_y.mean), 1)
    for first in range(0, len(found), rows):
        part = slice(first, first + rows)
        apart = _relative_differences(of_x.mean[part], of_y.mean)
        apart += _relative_differences(of_x.deviation[part], of_y.deviation)
        found[part] -= _TIE * apart.to(found)
    return found


def _relative_differences(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double()[:, None], b.double()
    return (a - b).abs_().div_(torch.maximum(a.abs(), b.abs()).clamp_(min=1e-30))


@channel_cost("euclidean", of_mean=torch.sqrt_)
def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean of ``(x - y)^2`` over the rows for every two channels."""
    x, y = x.double(), y.double()
    squares = x.square().sum(0)[:, None] + y.square().sum(0)[None]
    return squares.sub_((x.T @ y).mul_(2)).clamp_(min=0).div_(len(x))


@channel_cost("energy")
def _energies(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the quadratic energy of every two channels' difference along the edges of a graph.

    .. math:: \frac{1}{|E|} \sum_{(u, v) \in E} \left((x_u - x_v) - (y_u - y_v)\right)^2

    It is 0 for channels that differ by a constant. The rows are the changes along the edges: see
    :func:`clafusion.profiling.profile.profile_models`.
    """
    return _squared_distances(x, y)


_MEASURES["fused_gromov_wasserstein"] = _Measure(
    _squared_distances, lambda mean: mean, fused_gromov_wasserstein
)


def measures() -> tuple[str, ...]:
    """Return the names of the costs that compare activations."""
    return tuple(_MEASURES)


def _measure(metric: str) -> _Measure:
    if metric not in _MEASURES:
        raise InputError(
            f"matching.cost must be one of {', '.join(map(repr, _MEASURES))} here; got {metric!r}"
        )
    return _MEASURES[metric]


def activation_costs(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    *,
    metric: str = "correlation",
) -> list[Tensor | None]:
    r"""Return for each channel group of the target the costs ``(num_source, num_target)``.

    Over the rows of all hook points at which both networks show the group, with ``x`` and ``y``
    two channels' values,

    .. math:: M = 1 - \operatorname{corr}(x, y) \quad\text{or}\quad
              M = \sqrt{\operatorname{mean}((x - y)^2)}

    for ``"correlation"`` and ``"euclidean"`` (OTFusion, arXiv 1910.05653, section 4.2,
    activation-based); of several hook points the mean counts. Where correlations are equal, and of
    constant channels, other figures decide: see :func:`correlations`. None where the source has no
    such channels. Groups that no layer reads get the cost 0 everywhere.

    Raises
    ------
    InputError
        The profiles are not of the same inputs, the metric is unknown, or a group has more than
        ``MAX_CHANNELS`` channels; the message says how much memory it would take.
    """
    costs: list[Tensor | None] = [None] * len(correspondence.groups)
    for index, cost in group_costs(correspondence, target, source, metric=metric):
        costs[index] = cost
    return costs


def group_costs(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    *,
    metric: str = "correlation",
) -> Iterator[tuple[int, Tensor]]:
    """Yield what :func:`activation_costs` returns, group by group, each as soon as it is known."""
    groups = zip(
        correspondence.target.groups, correspondence.groups, correspondence.hooks, strict=True
    )
    matched = [(one.index, other, pairs) for one, other, pairs in groups if other >= 0]
    for i, cost in _pair_costs(correspondence, target, source, matched, metric):
        yield matched[i][0], cost
        del cost  # before the next one is made


def pair_costs(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    pairs: Sequence[tuple[int, int, Sequence[HookPair]]],
    *,
    metric: str = "correlation",
) -> list[Tensor]:
    """Return the costs ``(num_source, num_target)`` for any pairs of groups.

    Each pair is a group of the target, one of the source, and the hook points that show both.
    Otherwise as :func:`activation_costs`.
    """
    found = dict(_pair_costs(correspondence, target, source, pairs, metric))
    return [found[i] for i in range(len(pairs))]


def _pair_costs(
    correspondence: Correspondence,
    target: ModelProfile,
    source: ModelProfile,
    pairs: Sequence[tuple[int, int, Sequence[HookPair]]],
    metric: str,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the costs of pairs of groups, with their numbers, as soon as all hook points are seen.

    The hook points are taken in the target's order, for their rows may be made when they are read.
    """
    measure = _measure(metric)
    check_same_inputs(target, source)
    device = target.traced.device
    # By hook points, for several groups may lie side by side in one.
    hooks: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, HookPair]]] = {}
    left = [0] * len(pairs)
    for i, (of_target, of_source, shown) in enumerate(pairs):
        to, of = correspondence.target.groups[of_target], correspondence.source.groups[of_source]
        if max(of.size, to.size) > MAX_CHANNELS:
            raise InputError(
                f"the channels of {to.name!r} number {of.size} and {to.size}: their "
                f"cost and plan would take {16 * of.size * to.size / 1e9:.1f} GB. Layers "
                f"of up to {MAX_CHANNELS} channels are supported"
            )
        for pair in shown:
            key = flowing(correspondence, source, pair), pair.target
            hooks.setdefault(key, []).append((i, pair))
            left[i] += 1
    totals: dict[int, tuple[Tensor, int]] = {}

    def cost_of(i: int) -> Tensor:
        if i in totals:
            total, number = totals.pop(i)
            return measure.of_mean(total.div_(number))
        of_target, of_source, _ = pairs[i]
        size = correspondence.source.groups[of_source].size
        num_target = correspondence.target.groups[of_target].size
        return torch.zeros(size, num_target, dtype=torch.float64, device=device)

    def add(keys: tuple[tuple[int, int], tuple[int, int]]) -> None:
        of_source_hook, of_target_hook = keys
        # A composed target, or one whose heads moved, may lack some hook points.
        if of_target_hook not in target.rows or of_source_hook not in source.rows:
            return
        x, y = source.rows[of_source_hook], target.rows[of_target_hook]
        if len(x) != len(y):
            return
        measured = measure.costs(x, y, target.structure_at(of_target_hook))
        for i, pair in hooks[keys]:
            block = _block(measured, pair.source_columns, pair.target_columns)
            total, number = totals.get(i, (None, 0))
            totals[i] = block if total is None else total.add_(block), number + 1

    yield from ((i, cost_of(i)) for i, count in enumerate(left) if count == 0)
    for keys in sorted(hooks, key=_in_order):
        add(keys)  # when the next line hands over a cost, nothing else of its size is held
        for i, _ in hooks[keys]:
            left[i] -= 1
            if left[i] == 0:
                yield i, cost_of(i)


def _block(measured: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the costs of some channels, float64; the caller may change them."""
    for axis, index in enumerate((rows, columns)):
        if not torch.equal(index, torch.arange(measured.size(axis))):
            measured = measured.index_select(axis, index.to(measured.device))
    return measured.to(torch.float64, copy=True)


def _in_order(keys: tuple[tuple[int, int], tuple[int, int]]) -> tuple[Any, ...]:
    """Return what sorts hook points: by the target's layer, point, and before or after it."""
    of_source, of_target = keys
    return tuple(
        (layer, ~index if index < 0 else index, index < 0)
        for layer, index in (of_target, of_source)
    )


def says_nothing(cost: Tensor) -> bool:
    """Say whether all channels cost the same, so that any plan would do.

    So it is where no hook point shows them, and where they are the same for all inputs.
    """
    return cost.numel() > 1 and bool((cost == cost.flatten()[0]).all())


def output_costs(
    target: ModelProfile, source: ModelProfile, *, metric: str = "correlation"
) -> Tensor:
    """Return the costs ``(num_outputs, num_outputs)`` of matching two classifiers' outputs.

    Raises
    ------
    StructureError
        A profile holds no outputs of a classifier: the model does not end with a layer whose
        outputs are its own, or was not profiled with ``layer_values="preactivation"``.
    """
    views = []
    for profile in (source, target):
        last = profile.traced.layers[-1]
        place = last.index, len(last.hook_points)
        rows = profile.rows.get(place)
        if rows is None:
            raise StructureError(
                "matching.outputs needs models that end with their classifier, and "
                f"layer_values='preactivation'; {last.name!r} is the last layer here"
            )
        views.append(rows)
    measure = _measure(metric)
    costs = measure.costs(views[0], views[1], target.structure_at(place))
    return measure.of_mean(costs.double())


def flowing(
    correspondence: Correspondence, source: ModelProfile, pair: HookPair
) -> tuple[int, int]:
    """Return the key of what the source shows at a hook point.

    What leaves an inserted identity layer has passed a nonlinearity already. The profile has that
    value only if it was asked for; before the nonlinearity no channel is dead.
    """
    layer, index = pair.source
    after = layer, ~index
    inserted = correspondence.layer_map[pair.target[0]] < 0
    return after if inserted and after in source.rows else pair.source


def group_views(
    correspondence: Correspondence, source: ModelProfile, index: int
) -> Mapping[tuple[int, int], Tensor]:
    """Return a group's values in a source, by the target's hook points that show the same."""
    views = {}
    for pair in correspondence.hooks[index]:
        key = flowing(correspondence, source, pair)
        if key in source.rows:  # of moved heads not everything shows
            views[pair.target] = source.rows[key][:, pair.source_columns]
    return views


def group_structures(
    correspondence: Correspondence, source: ModelProfile, index: int
) -> Mapping[tuple[int, int], Tensor | None]:
    """Return the structures of the nodes that :func:`group_views` are of, by the same points."""
    return {
        pair.target: source.structure_at(flowing(correspondence, source, pair))
        for pair in correspondence.hooks[index]
    }


def view_costs(
    x: Mapping[tuple[int, int], Tensor],
    y: Mapping[tuple[int, int], Tensor],
    metric: str,
    structures: Mapping[tuple[int, int], Tensor | None],
) -> Tensor | None:
    """Return the costs of two networks' channels ``(num_x, num_y)``, by their :func:`group_views`.

    ``structures`` are their :func:`group_structures`. None where no hook point shows them together.
    """
    measure = _measure(metric)
    common = [key for key in x if key in y and len(x[key]) == len(y[key])]
    if not common:
        return None
    found = [measure.costs(x[key], y[key], structures[key]).double() for key in common]
    return measure.of_mean(torch.stack(found).mean(0))
