"""States: channels that meet other channels in a product, such as those of a selective scan.

A label names one channel, but the values of a scan (Mamba, arXiv 2312.00752) belong to two: to an
inner channel, which their label names, and to a state. The states can change places: what writes
them, what reads them and how fast each fades in each inner channel. No label shows that, so it is
tried: in a copy with random weights the states change places, and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from clafusion.execution.walk import WIDER, PickedPositions, Walk, in_lockstep
from clafusion.tracing.labels.drafts import DraftUse
from clafusion.tracing.labels.ids import collapse
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Label, ParameterView
from clafusion.tracing.model import ParameterUse
from clafusion.tracing.moves import Moves, Place, moves_between
from clafusion.tracing.trial_weights import BaseWeights, TrialWeights

__all__ = ["find_states"]

_SAME = 1e-3  # of the change that there is where only what writes or reads the states moves
_ROUNDING = 1e-4  # relative to a value's largest element


@dataclass(frozen=True)
class _Graph:
    """What runs: an :class:`clafusion.execution.walk.Executable`."""

    module: fx.GraphModule
    placeholders: tuple[str | None, ...]
    types: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)
    layouts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    thinning: PickedPositions | None = None


@dataclass(frozen=True)
class _States:
    """What may be the states of one module.

    Attributes
    ----------
    atoms
        ``(num_states,)`` for each value that has them as its channels: their atoms, in order.
    fading
        Parameters that act on inner channels and on states: name -> the states' axis.
    """

    atoms: tuple[Tensor, ...]
    fading: Mapping[str, int]


def find_states(
    propagation: LabelPropagation,
    module: fx.GraphModule,
    placeholders: Sequence[str | None],
    inputs: Sequence[Tensor],
) -> None:
    """Give atoms to the states that can change places.

    Parameters
    ----------
    propagation
        A run on labels that is at its end. The values that have states as channels get labels.
    module, placeholders, inputs
        As for :func:`clafusion.tracing.groups.find_channels`.
    """
    found = list(_possible(propagation))
    if not found:
        return
    graph = _Graph(module, tuple(placeholders), layouts=propagation.layouts)
    with torch.no_grad():
        crossed = _crossed(propagation, graph, tuple(inputs), found)
    if crossed is None:
        return
    shown: set[fx.Node] = set()
    for states in found:
        shown |= _label(propagation, states)
    propagation.crossed |= {node for node in crossed if node not in shown}


def _possible(propagation: LabelPropagation) -> Iterator[_States]:
    """Yield what may be states: equally many channels of a module that met others in a product."""
    by_module: dict[tuple[str, int], dict[tuple[int, ...], Tensor]] = {}
    for ids in propagation.outer:
        (roots,) = collapse(propagation.roots(ids))
        if sum(size > 1 for size in roots.shape) != 1 or bool((roots < 0).any()):
            continue
        atoms = roots.flatten()
        written = next((use for use, *_ in _places(propagation, atoms)), None)
        if written is not None and len(atoms.unique()) == len(atoms):
            module = ".".join(written.name.split(".")[:-2])
            by_module.setdefault((module, len(atoms)), {})[tuple(atoms.tolist())] = atoms
    for (module, count), several in by_module.items():
        if len(several) > 1 and len(torch.cat([*several.values()]).unique()) == count * len(
            several
        ):
            yield _States(tuple(several.values()), dict(_fading(propagation, module, count)))


def _places(
    propagation: LabelPropagation, atoms: Tensor
) -> Iterator[tuple[DraftUse, int, Tensor, Tensor]]:
    """Yield where atoms occur: the use, its axis, the positions, and which atom is at each."""
    for use in propagation.uses.values():
        for axis, ids in use.axes.items():
            same = propagation.roots(ids)[:, None] == atoms
            if bool(same.any()):
                positions, members = same.nonzero().T
                yield use, axis, positions, members


def _fading(propagation: LabelPropagation, module: str, count: int) -> Iterator[tuple[str, int]]:
    """Yield a module's matrices whose rows meet one channel each, with the states' axis."""
    for name, elements in propagation.elements.items():
        tensor = propagation.state[name]
        if tensor.dim() != 2 or not name.startswith(f"{module}." if module else ""):
            continue
        roots = propagation.roots(elements).view(tensor.shape)
        for axis in (0, 1):
            if tensor.size(axis) == count and bool((roots == roots.narrow(axis, 0, 1)).all()):
                yield name, axis


# --- the trial ----------------------------------------------------------------------------------


def _crossed(
    propagation: LabelPropagation,
    graph: _Graph,
    inputs: tuple[Tensor, ...],
    found: Sequence[_States],
) -> set[fx.Node] | None:
    """Return the nodes whose values change as states change places; None where outputs change.

    In float64 where the graph runs in that, as roundings would look like a difference.
    """
    try:
        return _crossed_in(torch.float64, propagation, graph, inputs, found)
    except RuntimeError:  # the graph fixes a type somewhere
        return _crossed_in(None, propagation, graph, inputs, found)


def _crossed_in(
    dtype: torch.dtype | None,
    propagation: LabelPropagation,
    graph: _Graph,
    inputs: tuple[Tensor, ...],
    found: Sequence[_States],
) -> set[fx.Node] | None:
    own = propagation.state
    floats = {name for name, value in own.items() if value.is_floating_point()}
    base = BaseWeights(own, frozenset(floats - propagation.buffers), 0)
    partly = [_States(states.atoms[:1], {}) for states in found]

    def walk(moving: Sequence[_States]) -> Walk:
        weights = TrialWeights(base, dtype, _moves(propagation, moving))
        return Walk(graph, inputs, weights, set(), WIDER if dtype else {})

    walks = [walk([]), walk(found)]
    crossed = set()
    for node in in_lockstep(walks):
        plain, value = (one.value(node) for one in walks)
        is_float = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        if is_float and not _is_same(value, plain):
            crossed.add(node)
    wanted, outputs, of_part = (one.output_tensors() for one in (*walks, walk(partly)))
    return crossed if _gap(outputs, wanted) <= _SAME * _gap(of_part, wanted) else None


def _moves(propagation: LabelPropagation, moving: Sequence[_States]) -> Moves:
    """Return the moves that bring each of the states to the next one's place."""
    pairs: list[tuple[Place, Place]] = []
    for states in moving:
        order = torch.arange(len(states.atoms[0])).roll(1)
        for atoms in states.atoms:
            for draft, axis, positions, members in _places(propagation, atoms):
                use = ParameterUse(
                    draft.name, draft.role, draft.size, draft.stride, draft.offset, -1
                )
                # Of an atom that stands in several places all move, in order.
                places = positions[members.argsort(stable=True)].view(len(atoms), -1)
                pairs.append(((use, axis, places), (use, axis, places[order])))
        for name, axis in states.fading.items():
            tensor = propagation.state[name]
            use = ParameterUse(name, "element", tuple(tensor.shape), tensor.stride(), 0, -1)
            pairs.append(((use, axis, torch.arange(len(order))), (use, axis, order)))
    return moves_between(pairs)


def _gap(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    gaps = [
        float((one.double() - other.double()).abs().max())
        for one, other in zip(outputs, others, strict=True)
        if one.numel()
    ]
    return max(gaps, default=0.0)


def _is_same(one: Tensor, other: Tensor) -> bool:
    bound = _ROUNDING * float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= bound


# --- the labels ---------------------------------------------------------------------------------


def _label(propagation: LabelPropagation, states: _States) -> set[fx.Node]:
    """Give states atoms of their own; return the nodes that have them as channels."""
    fresh = propagation.fresh(len(states.atoms[0]))
    propagation.count(fresh)  # what is read of all states is added up
    renamed = torch.arange(propagation.created)
    for atoms in states.atoms:
        renamed[atoms] = fresh

    def with_states(ids: Tensor) -> Tensor:
        roots = propagation.roots(ids)
        return torch.where(roots >= 0, renamed[roots.clamp(min=0)], roots)

    for use in propagation.uses.values():
        for axis, ids in use.axes.items():
            use.axes[axis] = with_states(ids)
    for name, axis in states.fading.items():
        tensor = propagation.state[name]
        others = propagation.elements[name].view(tensor.shape).select(axis, 0).clone()
        propagation.forget_elements(name)
        axes = {axis: fresh, 1 - axis: others}
        propagation.weigh(ParameterView(name, tensor), "element", axes)
    shown = set()
    for node, label in propagation.labels.items():
        changed = _changed(label, with_states, int(fresh[0]))
        if changed is not label:
            propagation.labels[node] = changed
            shown.add(node)
    return shown


def _changed(label: Label, change: Callable[[Tensor], Tensor], first: int) -> Label:
    """Return a label with other atoms, or itself where none of those from ``first`` on is in it."""
    if isinstance(label, tuple):
        parts = tuple(_changed(part, change, first) for part in label)
        return parts if any(a is not b for a, b in zip(parts, label, strict=True)) else label
    if not isinstance(label, Tensor):
        return label
    ids = change(collapse(label)[0])
    return ids.expand(label.shape) if bool((ids >= first).any()) else label
