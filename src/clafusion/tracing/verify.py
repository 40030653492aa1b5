"""Prove an analysis: permute every channel group of a copy and compare the outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from clafusion.errors import GraphVerificationError
from clafusion.execution.call import State, call_model
from clafusion.tracing.heads import exchange_heads, possible_heads, possible_shared_heads
from clafusion.tracing.model import ChannelGroup, GroupAxis, HeadPartition, TracedModel
from clafusion.tracing.ties import identity_of

__all__ = ["computes_the_same", "permute_channels", "verify_graph", "with_proved_heads"]

# Relative to the largest output. Float64 leaves 1e-16 a rounding, and deep networks amplify it.
# Float32 is the fallback for models that fix a dtype inside.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUNDED_INSIDE = 1e-4  # float64 outside, but some values pass through float32
_NOISE = 1e-12  # relative to each weight: thousands of roundings in float64
_MOST = 1e-6  # the largest bound for float64, however much a network amplifies
_AT_RANDOM = (
    "the model may depend on state or randomness: make its forward deterministic in eval mode"
)


def permute_channels(
    state: State, groups: Sequence[ChannelGroup], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return a copy of ``state`` in which channel ``permutation[i]`` has moved to place ``i``.

    Parameters
    ----------
    state
        Parameters and buffers by name. Entries that are one tensor, as a state dict has of tied
        parameters, move together.
    groups
        The groups to permute.
    permutations
        For each group a permutation ``(size,)``.
    """
    # A parameter that is used as a whole moves once along each axis. Of one that is used through
    # views, each view moves.
    of_parts: list[tuple[GroupAxis, Tensor]] = []
    of_wholes: dict[str, dict[int, Tensor]] = {}
    for group, permutation in zip(groups, permutations, strict=True):
        for group_axis in group.axes:
            name = group_axis.use.parameter
            sources = group_axis.positions[permutation.cpu()].reshape(-1)
            if group_axis.use.size != tuple(state[name].shape):
                of_parts.append((group_axis, sources))
                continue
            indices = of_wholes.setdefault(name, {})
            if group_axis.axis not in indices:
                indices[group_axis.axis] = torch.arange(group_axis.use.size[group_axis.axis])
            indices[group_axis.axis][group_axis.positions.reshape(-1)] = sources
    uses = (group_axis.use.parameter for group in groups for group_axis in group.axes)
    names = {identity_of(state[name]): name for name in uses}
    permuted = {}
    for name, tensor in state.items():
        moved = tensor.detach()
        for axis, index in of_wholes.get(name, {}).items():
            moved = moved.index_select(axis, index.to(moved.device))
        permuted[name] = moved if name in of_wholes else moved.clone()
    for group_axis, sources in of_parts:
        view = group_axis.use.view(permuted[group_axis.use.parameter])
        positions = group_axis.positions.reshape(-1).to(view.device)
        moved = view.index_select(group_axis.axis, sources.to(view.device))
        view.index_copy_(group_axis.axis, positions, moved)
    for name, tensor in state.items():
        moved_as = names.get(identity_of(tensor))
        if moved_as is not None:
            permuted[name] = permuted[moved_as]
    return permuted


def verify_graph(traced: TracedModel, inputs: tuple[Tensor, ...], *, seed: int = 0) -> None:
    """Prove that permuting channels and exchanging heads leaves the model's outputs as they are.

    Each channel group moves by a cycle through all its channels and by a swap of two channels,
    which together generate every permutation; the heads of each layer likewise. The outputs are
    compared once with the model's own weights and once with random weights, for a gate at zero
    would hide a mistake behind it.

    The model itself runs, not the traced graph, in float64 where it allows that, else in float32
    (bound 1e-3 of the largest output). In float64 the bound is 1e-9, or what noise of 1e-12 in
    every weight makes of the outputs, but at most 1e-6; it is 1e-4 where the model casts values to
    a shorter type inside. The traced graph's own output is compared, too.

    Parameters
    ----------
    traced
        The traced model.
    inputs
        A few rows of input, such as ``traced.example_inputs``.
    seed
        Seed of the permutations and the random weights.

    Raises
    ------
    GraphVerificationError
        The outputs differ; the message names the groups that change them on their own.
    """
    trial = _Trial(traced, inputs, seed)
    _verify_groups(trial)
    if not _can_be_exchanged(traced.heads, trial):
        raise GraphVerificationError(
            "exchanging heads (of an attention, or the groups of a convolution) changed the "
            "output. The analysis does not understand this model: please open an issue with its "
            "code"
        )


def computes_the_same(traced: TracedModel, inputs: tuple[Tensor, ...]) -> bool:
    """Say whether a traced graph, with a model's weights, puts out what the model does."""
    with torch.no_grad():
        plain = copy.deepcopy(traced.model).eval()
        generator = torch.Generator().manual_seed(0)
        inputs, outputs = _trial_inputs(traced, plain, inputs, generator)
        found = [value for value in traced.run(inputs) if isinstance(value, Tensor)]
        return _difference(found, outputs) <= _TOLERANCE[torch.float32]


def with_proved_heads(
    traced: TracedModel, inputs: tuple[Tensor, ...], *, verify: bool, seed: int = 0
) -> TracedModel:
    """Return a traced model with those heads that can change places without changing outputs.

    The trial is that of :func:`verify_graph`, on all of
    :func:`clafusion.tracing.heads.possible_heads`.

    Parameters
    ----------
    traced, inputs, seed
        As for :func:`verify_graph`.
    verify
        Whether to prove the channel groups as well.

    Raises
    ------
    GraphVerificationError
        With ``verify``, as for :func:`verify_graph`.
    """
    candidates = possible_heads(traced)
    if not (candidates or verify or possible_shared_heads(traced)):
        return traced
    trial = _Trial(traced, inputs, seed)
    if verify:
        _verify_groups(trial)
    heads = list(chain.from_iterable(finest for finest, *_ in candidates))
    if not _can_be_exchanged(heads, trial):  # try each layer's alternatives alone
        proved = (
            next((heads for heads in alternatives if _can_be_exchanged(heads, trial)), ())
            for alternatives in candidates
        )
        heads = list(chain.from_iterable(proved))
    traced = replace(traced, heads=tuple(heads))
    shared = possible_shared_heads(traced)
    if not _can_be_exchanged(shared, trial):
        shared = [one for one in shared if _can_be_exchanged([one], trial)]
    return replace(traced, heads=(*traced.heads, *shared))


def _verify_groups(trial: _Trial) -> None:
    """Raise where the traced graph differs from the model, or a permutation changes outputs."""
    traced, fidelity = trial.traced, trial.fidelity
    if not fidelity <= _TOLERANCE[torch.float32]:
        raise GraphVerificationError(
            f"the traced graph computes something else than the model (relative difference "
            f"{fidelity:.1e}); {_changes(trial) or _AT_RANDOM}"
        )
    for move in (_cycle, _swap):
        permutations = [move(group.size, trial.generator) for group in traced.groups]

        def permuted(state: State, chosen: Sequence[ChannelGroup] = traced.groups) -> State:
            return permute_channels(state, chosen, [permutations[group.index] for group in chosen])  # noqa: B023

        if trial.leaves_outputs(permuted):
            continue
        changes = _changes(trial)
        if changes:
            raise GraphVerificationError(f"the model puts out something else each time: {changes}")
        broken = [
            group
            for group in traced.groups
            if not trial.leaves_outputs(partial(permuted, chosen=[group]))
        ]
        named = ", ".join(f"{group.name!r} ({group.size} channels)" for group in broken[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise GraphVerificationError(
            f"permuting the channel groups changed the output (relative difference "
            f"{trial.gap(permuted):.1e}, bound {trial.bound:.0e}); groups that break it: "
            f"{named or 'none alone'}{more}. The analysis does not understand this model: please "
            "open an issue with its code"
        )


def _changes(trial: _Trial) -> str:
    """Say which state the model's forward changes, in eval mode; empty for none."""
    model = copy.deepcopy(trial.traced.model).eval()

    def state() -> dict[str, object]:
        plain: dict[str, object] = {
            f"{path}.{name}".lstrip("."): value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        }
        return plain | {name: value.clone() for name, value in model.named_buffers()}

    before = state()
    inputs, _ = _trial_inputs(trial.traced, model, trial.traced.example_inputs, torch.Generator())
    with torch.no_grad():
        call_model(model, inputs, trial.traced.keywords)
    changed = [name for name, value in state().items() if not _is_same(before.get(name), value)]
    if not changed:
        return ""
    return (
        f"its forward changes {', '.join(map(repr, changed[:5]))}, also in eval mode. Keep what "
        "a call leaves behind out of what the next one computes"
    )


def _is_same(before: object, after: object) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    return before == after


def _can_be_exchanged(heads: Sequence[HeadPartition], trial: _Trial) -> bool:
    """Return whether heads can change places, those of each partition in an order of its own."""
    for move in (_cycle, _swap) if heads else ():
        orders = [(one, move(len(one.members), trial.generator).tolist()) for one in heads]
        if not trial.leaves_outputs(partial(exchange_heads, trial.traced, orders=orders)):
            return False
    return True


class _Trial:
    """A model with its own and with random weights, to try changes of the weights on.

    Attributes
    ----------
    fidelity
        How far the traced graph's outputs are from the model's, relative to the largest.
    bound
        How far outputs may move by rounding alone, relative to the largest.
    """

    def __init__(self, traced: TracedModel, inputs: tuple[Tensor, ...], seed: int) -> None:
        self.traced = traced
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            plain = copy.deepcopy(traced.model).eval()
            inputs, outputs = _trial_inputs(traced, plain, inputs, self.generator)
            own_outputs = [value for value in traced.run(inputs) if isinstance(value, Tensor)]
            self.fidelity = _difference(own_outputs, outputs)
            self.model, self.inputs, outputs = _widest(plain, inputs, traced.keywords, outputs)
        types = {value.dtype for value in self.model.parameters() if value.is_floating_point()}
        self.bound = max((_TOLERANCE.get(dtype, 1e-2) for dtype in types), default=1e-3)
        if types == {torch.float64} and _casts(traced):
            self.bound = _ROUNDED_INSIDE
        own = dict(traced.state())
        if self.model is not plain:
            own = {
                name: value.double() if value.is_floating_point() else value
                for name, value in own.items()
            }
        redrawn = _redrawn(self.model, own, self.generator)
        self.expected = [(own, outputs), (redrawn, self._outputs(redrawn))]
        self._bound_is_final = self.bound != _TOLERANCE[torch.float64]
        self._of_noise = torch.Generator().manual_seed(seed)

    def _amplified(self) -> float:
        """Return how far noise in the weights moves the outputs: deep networks amplify rounding."""
        trained = dict(self.model.named_parameters())

        def with_noise(state: State) -> State:
            noisy = dict(state)
            for name in filter(state.__contains__, trained):
                value = state[name]
                signs = torch.randint(0, 2, value.shape, generator=self._of_noise) * 2.0 - 1.0
                noisy[name] = value * (1 + _NOISE * signs.to(value))
            return noisy

        gap = self.gap(with_noise)
        return gap if math.isfinite(gap) else 0.0

    def _outputs(self, state: State) -> list[Tensor]:
        named = _named(self.model, state, self.traced)
        with torch.no_grad():
            return call_model(self.model, self.inputs, self.traced.keywords, state=named)

    def gap(self, change: Callable[[State], State]) -> float:
        """Return how far a change of the weights moves the outputs, relative to the largest."""
        return max(
            _difference(self._outputs(change(state)), outputs) for state, outputs in self.expected
        )

    def leaves_outputs(self, change: Callable[[State], State]) -> bool:
        """Return whether a change of the weights moves the outputs by no more than rounding."""
        gap = self.gap(change)
        if gap > self.bound and not self._bound_is_final and gap <= _MOST:
            self._bound_is_final = True
            self.bound = min(max(self.bound, self._amplified()), _MOST)
        return gap <= self.bound


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that moves every channel, all in one cycle."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


def _swap(size: int, generator: torch.Generator) -> Tensor:
    """Return a permutation that swaps two random channels."""
    permutation = torch.arange(size)
    if size < 2:
        return permutation
    first, second = torch.randperm(size, generator=generator)[:2]
    permutation[first], permutation[second] = second, first
    return permutation


def _redrawn(model: torch.nn.Module, state: State, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state with random parameters, for zero gates and tiny scales would hide mistakes."""
    drawn = dict(state)
    for name, parameter in model.named_parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.dim() > 1:
            noise = (2 * noise - 1) * (6 / max(parameter[0].numel(), 1)) ** 0.5
        drawn[name] = noise.to(parameter) if parameter.dim() > 1 else (0.5 + noise).to(parameter)
    return drawn


def _casts(traced: TracedModel) -> bool:
    """Return whether the model turns values into a type shorter than float64."""
    short = {torch.float32, torch.float16, torch.bfloat16}
    return any(
        node.op == "call_function"
        and any(value in short for value in (*node.args, *node.kwargs.values()) if _is_dtype(value))
        for node in traced.module.graph.nodes
    )


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest expected output."""
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if output.shape != reference.shape:
            return float("inf")
        if reference.numel() == 0:
            continue
        output, reference = output.double(), reference.double()
        same = (output == reference) | (output.isnan() & reference.isnan())
        gap = torch.where(same, 0.0, (output - reference).abs()).nan_to_num(nan=torch.inf)
        finite = reference[reference.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        worst = max(worst, float(gap.max()) / (scale or 1.0))
    return worst


def _trial_inputs(
    traced: TracedModel,
    model: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    generator: torch.Generator,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return the inputs of a trial and the model's outputs: the first example and a shuffled one.

    Examples may be blank, or alike in places. Shuffling an example's elements makes them differ.
    """
    shuffled = []
    for value in inputs:
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        shuffled.append(value.flatten()[order].view_as(value))
    others = slice(1, None) if traced.static_batch is not None else slice(1)
    mixed = tuple(
        torch.cat([value[:1], mixture[others]])
        for value, mixture in zip(inputs, shuffled, strict=True)
    )
    try:
        return mixed, call_model(model, mixed, traced.keywords)
    except Exception:  # the model may refuse numbers that do not belong together
        return inputs, call_model(model, inputs, traced.keywords)


def _widest(
    model: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: tuple[str, ...],
    outputs: list[Tensor],
) -> tuple[torch.nn.Module, tuple[Tensor, ...], list[Tensor]]:
    """Return model, inputs and outputs in float64 where the model runs in that, else as given."""
    try:
        double = copy.deepcopy(model).double()
        wide = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        results = call_model(double, wide, keywords)
        if all(value.dtype == torch.float64 for value in results if value.is_floating_point()):
            return double, wide, results
    except RuntimeError:  # the model's code fixes a type somewhere
        pass
    return model, inputs, outputs


def _named(model: torch.nn.Module, state: State, traced: TracedModel) -> dict[str, Tensor]:
    """Return the module's own entries of a state, tied ones under each of their names."""
    full = {**state, **{name: state[source] for name, source in traced.aliases.items()}}
    return {name: full[name] for name, _ in (*model.named_parameters(), *model.named_buffers())}
