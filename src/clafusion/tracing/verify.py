"""Prove an analysis: permute every channel group, exchange heads, and compare the outputs."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations

import torch
from torch import Tensor

from clafusion.errors import GraphVerificationError, check_type
from clafusion.execution.call import State, call_model, rounding_of
from clafusion.execution.lazy import LazyState
from clafusion.execution.walk import WIDER, Walk, in_lockstep
from clafusion.execution.writes import written_inputs
from clafusion.tracing.copies import copied, evaluation_copy
from clafusion.tracing.heads import exchange_moves, possible_heads, possible_shared_heads
from clafusion.tracing.known_proofs import KnownProofs, proof_key
from clafusion.tracing.model import ChannelGroup, HeadPartition, TracedModel
from clafusion.tracing.module_lists import possible_list_heads
from clafusion.tracing.moves import Moves, joined, permutation_moves
from clafusion.tracing.operations import module_path, op_name
from clafusion.tracing.outputs import Outputs, difference, outputs_of
from clafusion.tracing.readout import find_readout
from clafusion.tracing.trial_weights import BaseWeights, TrialWeights

__all__ = ["computes_the_same", "verify_graph", "verify_weights", "with_proved_heads"]

# Relative to the largest output. Float64 leaves 1e-16 a rounding, and deep networks amplify it.
# Other types are the fallback for graphs that do not run in float64.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_OWN_TOLERANCE = 1e-5  # of a walk with a model's own weights in float32; else float64 decides
_NOISE = 1e-12  # relative to each weight: thousands of roundings in float64
_MOST = 1e-6  # the largest bound for float64, however much a network amplifies
_AT_RANDOM = (
    "the model may depend on state or randomness: make its forward deterministic in eval mode"
)


def verify_graph(
    traced: TracedModel,
    inputs: tuple[Tensor, ...],
    *,
    seed: int = 0,
    proofs: KnownProofs | None = None,
) -> None:
    """Prove that permuting channels and exchanging heads leaves the model's outputs as they are.

    Each channel group moves by a cycle through all its channels, and by a swap of two channels;
    the heads of each layer likewise. A cycle and a swap generate every permutation. Both move
    random weights, for a gate at zero would hide a mistake behind it. The model's own weights are
    moved by the cycle, and by the swap as well where random weights overflow.

    The model itself runs once, and the traced graph has to compute the same. The rest are four
    walks of the graph: with random weights one as they are and one after each move, side by side,
    and one with the model's own weights after the cycle. Each walk makes a tensor when a node reads
    it, so that no copy of the model is held. Those with random weights compute in float64, whatever
    the model's types, where the graph admits that. The bound is then 1e-9 of the largest output, or
    what noise of 1e-12 in every weight makes of the outputs, but at most 1e-6. Otherwise they
    compute in the model's types (bound 1e-3 for float32). A model's own weights in float32 are
    walked as they are, beside the graph's outputs that the model's were compared with. Where the
    outputs move by more than 1e-5 two walks in float64 decide.

    Parameters
    ----------
    traced
        The traced model.
    inputs
        A few rows of input, such as ``traced.example_inputs``.
    seed
        Seed of the permutations and the random weights.
    proofs
        Proofs with random weights that were made before: of these only the model's own weights are
        moved, by the cycle, in one walk.

    Raises
    ------
    InputError
        ``traced`` is no traced model, or ``inputs`` no tuple.
    GraphVerificationError
        The outputs differ; the message names the groups that change them on their own, and the
        first operation at which the values differ.
    """
    check_type(traced, TracedModel, "traced", "a traced model, as clafusion.trace returns it")
    check_type(inputs, tuple, "inputs", "a tuple of tensors")
    trial = _Trial(traced, inputs, seed, proofs)
    trial.check_fidelity()
    if trial.keeps_outputs(*_moves(trial, traced.groups, traced.heads)):
        return
    _verify_groups(trial)
    if not _can_be_exchanged(traced.heads, trial):
        raise GraphVerificationError(
            "exchanging heads (of an attention, or the groups of a convolution) changed the "
            "output. The analysis does not understand this model: please open an issue with its "
            "code"
        )


def verify_weights(traced: TracedModel, inputs: tuple[Tensor, ...], *, seed: int = 0) -> bool:
    """Say whether a graph that is proved with random weights is proved with a model's own, too.

    What random weights show is true of all weights. So only the model's own are moved, by the
    cycle and the swap, and the graph has to reproduce the outputs of the model itself.

    Parameters
    ----------
    traced, inputs, seed
        As for :func:`verify_graph`.
    """
    trial = _Trial(traced, inputs, seed)
    if not trial.is_faithful(trial.fidelity()):
        return False
    return trial.keeps_outputs(*_moves(trial, traced.groups, traced.heads), sorts=(False,))


def computes_the_same(traced: TracedModel, inputs: tuple[Tensor, ...]) -> bool:
    """Say whether a traced graph, with a model's weights, puts out what the model does."""
    trial = _Trial(traced, inputs, 0)
    return trial.is_faithful(trial.fidelity())


def with_proved_heads(
    traced: TracedModel,
    inputs: tuple[Tensor, ...],
    *,
    verify: bool,
    seed: int = 0,
    proofs: KnownProofs | None = None,
) -> TracedModel:
    """Return a traced model with those heads that can change places without changing outputs.

    The trial is that of :func:`verify_graph`, on all of
    :func:`clafusion.tracing.heads.possible_heads` and
    :func:`clafusion.tracing.module_lists.possible_list_heads`. Everything moves at once first; only
    where that changes the outputs, groups and each layer's heads are tried alone.

    Parameters
    ----------
    traced, inputs, seed, proofs
        As for :func:`verify_graph`.
    verify
        Whether to prove the channel groups as well.

    Raises
    ------
    GraphVerificationError
        With ``verify``, as for :func:`verify_graph`.
    """
    candidates = possible_heads(traced)
    finest = list(chain.from_iterable(finest for finest, *_ in candidates))
    candidates += possible_list_heads(traced, finest)
    if not (candidates or verify or possible_shared_heads(traced)):
        return traced
    trial = _Trial(traced, inputs, seed, proofs)
    if verify:
        trial.check_fidelity()
    heads = list(chain.from_iterable(finest for finest, *_ in candidates))
    with_finest = replace(traced, heads=tuple(heads))
    shared = possible_shared_heads(with_finest)
    groups = traced.groups if verify else ()
    if trial.keeps_outputs(*_moves(trial, groups, [*heads, *shared])):
        return replace(traced, heads=(*heads, *shared))
    if verify:
        _verify_groups(trial)
    traced = replace(traced, heads=tuple(_exchangeable(candidates, trial)))
    shared = possible_shared_heads(traced)
    if not _can_be_exchanged(shared, trial):
        shared = [one for one in shared if _can_be_exchanged([one], trial)]
    return replace(traced, heads=(*traced.heads, *shared))


def _exchangeable(
    candidates: Sequence[Sequence[Sequence[HeadPartition]]], trial: _Trial
) -> list[HeadPartition]:
    """Return the finest of each layer's alternatives that can change places.

    Layers are mostly alike, so the alternatives are tried in all of them at once first.
    """
    for rank in range(max(map(len, candidates), default=0)):
        of_all = [one for several in candidates for one in several[min(rank, len(several) - 1)]]
        if _can_be_exchanged(of_all, trial):
            return of_all
    found: list[HeadPartition] = []
    for several in candidates:
        found += next((heads for heads in several if _can_be_exchanged(heads, trial)), ())
    return found


def _moves(
    trial: _Trial, groups: Sequence[ChannelGroup], heads: Sequence[HeadPartition]
) -> tuple[Moves, Moves]:
    """Return a cycle of channels and heads, and a swap."""
    of_groups = ([move(one.size, trial.generator) for one in groups] for move in (_cycle, _swap))
    of_heads = zip(*_orders_apart(trial, heads), strict=True) if heads else ((), ())
    of_cycle, of_swap = (
        joined(
            permutation_moves(groups, permutations),
            exchange_moves(trial.traced, list(zip(heads, orders, strict=True))),
        )
        for permutations, orders in zip(of_groups, of_heads, strict=True)
    )
    return of_cycle, of_swap


def _orders_apart(
    trial: _Trial, heads: Sequence[HeadPartition]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the order that a cycle makes of each partition, and the one that a swap makes.

    Partitions that move alike would hide that they can only move together, as the queries and the
    values of an attention do, or those of two layers whose heads are added up. So of two heads some
    partitions change places in the cycle only, some in the swap only; of more each swap is another
    one.
    """
    before: Counter[tuple[int, int]] = Counter()
    for one in heads:
        count = len(one.members)
        rank = before[one.layer, count]
        before[one.layer, count] += 1
        cycle, swap = _cycle(count, trial.generator).tolist(), list(range(count))
        pairs = list(combinations(range(count), 2))
        if pairs:
            first, second = pairs[(rank + one.layer) % len(pairs)]
            swap[first], swap[second] = second, first
        kind = (rank + one.layer) % 3
        if count == 2 and kind < 2:
            cycle, swap = (cycle, [0, 1]) if kind == 0 else ([0, 1], swap)
        yield cycle, swap


def _verify_groups(trial: _Trial) -> None:
    """Raise where permuting channels, but no heads, changes the outputs."""
    groups = trial.traced.groups
    moves = _moves(trial, groups, ())
    if trial.keeps_outputs(*moves):
        return
    gap, parting = trial.gap(*moves), trial.first_parting(*moves)
    broken = [one for one in groups if not trial.keeps_outputs(*_moves(trial, [one], ()))]
    named = ", ".join(f"{group.name!r} ({group.size} channels)" for group in broken[:5])
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    raise GraphVerificationError(
        f"permuting the channel groups changed the output (relative difference {gap:.1e}, bound "
        f"{trial.bound:.0e}){parting}; groups that break it: {named or 'none alone'}{more}. The "
        "analysis does not understand this model: please open an issue with its code"
    )


def _changes(trial: _Trial) -> str:
    """Say which state the model's forward changes, in eval mode; empty for none."""
    model = copied(trial.traced.model).eval()

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
    return not heads or trial.keeps_outputs(*_moves(trial, (), heads))


class _Trial:
    """A traced graph with its own and with random weights, to try moves of the weights on.

    Attributes
    ----------
    bound
        How far outputs may move by rounding alone, relative to the largest.
    """

    def __init__(
        self,
        traced: TracedModel,
        inputs: tuple[Tensor, ...],
        seed: int,
        proofs: KnownProofs | None = None,
    ) -> None:
        self.traced = traced
        self._proofs = proofs
        self.generator = torch.Generator().manual_seed(seed)
        self._own = traced.state()
        self._readout = find_readout(traced.module)
        self._model = evaluation_copy(traced.model)
        with torch.no_grad():
            self._inputs, self._of_model = _trial_inputs(
                traced, self._model, inputs, self.generator
            )
        self._seed = seed
        self._own_outputs: list[Tensor] | None = None
        self._use(torch.float64)

    def _use(self, dtype: torch.dtype | None) -> None:
        """Compute in a type from now on; None for the types that the graph asks for."""
        trained = frozenset(dict(self.traced.model.named_parameters()))
        self._expected: dict[bool, Outputs] = {}
        self._dtype = dtype
        self._weights = {
            redrawn: BaseWeights(self._own, names, self._seed)
            for redrawn, names in ((True, trained), (False, frozenset()))
        }
        types = {one.dtype for one in self._own.values() if one.is_floating_point()}
        self.bound = max(
            (_TOLERANCE.get(one, 1e-2) for one in ([dtype] if dtype else types)), default=1e-3
        )
        self._bound_is_final = dtype is None

    def fidelity(self) -> float:
        """Return how far the graph's outputs are from the model's, relative to the largest.

        It runs in the model's own types: half precision rounds more than mistakes may change.
        """
        with torch.no_grad():
            found = Walk(self.traced, self._inputs, self._own, set(), {}).finish()
        own = [one for one in found if isinstance(one, Tensor)]
        if all(one.dtype is torch.float32 for one in own):
            self._own_outputs = own
        return difference(own, self._of_model)

    def is_faithful(self, gap: float) -> bool:
        """Return whether outputs differ by no more than the model's own types round."""
        return gap <= rounding_of(self._own.values())

    def check_fidelity(self) -> None:
        """Raise where the graph computes something else than the model; lets its outputs go."""
        fidelity = self.fidelity()
        if not self.is_faithful(fidelity):
            raise GraphVerificationError(
                f"the traced graph computes something else than the model (relative difference "
                f"{fidelity:.1e}); {_changes(self) or _AT_RANDOM}"
            )
        if written_inputs(self.traced.module):
            with torch.no_grad():
                again = call_model(self._model, self._inputs, self.traced.keywords)
            if not self.is_faithful(difference(again, self._of_model)):
                raise GraphVerificationError(
                    f"the model puts out something else each time: {_changes(self) or _AT_RANDOM}"
                )
        self._of_model = []  # of a language model these are large

    def gap(self, *several: Moves, sorts: Sequence[bool] = (True, False)) -> float:
        """Return how far moves of the weights move the outputs, relative to the largest.

        ``sorts`` are the weights to be moved: True for random ones, False for the model's own.
        """
        try:
            return self._gap(several, sorts)
        except Exception:
            if self._dtype is None:
                raise
        self._use(None)  # the graph fixes a type somewhere
        return self._gap(several, sorts)

    def _gap(self, several: Sequence[Moves], sorts: Sequence[bool]) -> float:
        worst = 0.0
        for redrawn in sorts:
            finite = True not in self._expected or self._expected[True].are_finite()
            alone = len(sorts) == 1  # random weights, which may have overflowed, are not at hand
            moves = several if redrawn or alone or not finite else several[:1]
            if redrawn or not self._own_stay(moves):
                worst = max([worst, *self._gaps(redrawn, moves)])
        return worst

    def _own_stay(self, several: Sequence[Moves]) -> bool:
        """Say whether moves of the model's own weights keep its outputs, as float32 can tell.

        Half the arithmetic of a walk in float64, and no second walk beside it: the graph's outputs
        are known. A mistake moves outputs by much more than the tolerance, unless it sits behind a
        gate that is all but shut, which that of random weights is not.
        """
        if self._own_outputs is None or self._dtype is not torch.float64:
            return False
        for moves in several:
            weights = TrialWeights(self._weights[False], None, moves)
            walk = Walk(self.traced, self._inputs, weights, set())
            with torch.no_grad():
                found = [one for one in walk.finish() if isinstance(one, Tensor)]
            if not difference(found, self._own_outputs) <= _OWN_TOLERANCE:
                return False
        return True

    def _gaps(self, redrawn: bool, several: Sequence[Moves]) -> list[float]:
        weights = self._weights[redrawn]
        walks = [self._walk(TrialWeights(weights, self._dtype, moves)) for moves in several]
        if redrawn not in self._expected:
            walks.insert(0, self._walk(TrialWeights(weights, self._dtype, {})))
        with torch.no_grad():
            outputs = self._outputs(walks)
            if redrawn not in self._expected:
                self._expected[redrawn] = outputs.pop(0)
            return [difference(one, self._expected[redrawn]) for one in outputs]

    def _outputs(self, walks: Sequence[Walk]) -> list[Outputs]:
        """Run walks side by side; return what they put out."""
        return outputs_of(walks, self._readout, self._inputs[0].size(0))

    def _walk(self, weights: State) -> Walk:
        types = None if self._dtype is None else WIDER
        return Walk(self.traced, self._inputs, weights, set(), types)

    def keeps_outputs(self, *several: Moves, sorts: Sequence[bool] = (True, False)) -> bool:
        """Return whether moves of the weights move the outputs by no more than rounding."""
        if self._proofs is None or True not in sorts:
            return self._keeps_outputs(several, sorts)
        key = proof_key(self.traced, self._inputs, self._seed, *several)
        if key in self._proofs:
            return self._keeps_outputs(several[:1], (False,))
        keeps = self._keeps_outputs(several, sorts)
        if keeps and self._dtype is torch.float64 and self._expected[True].are_finite():
            self._proofs.add(key)
        return keeps

    def _keeps_outputs(self, several: Sequence[Moves], sorts: Sequence[bool]) -> bool:
        gap = self.gap(*several, sorts=sorts)
        if gap > self.bound and not self._bound_is_final and gap <= _MOST:
            self._bound_is_final = True
            self.bound = min(max(self.bound, self._amplified()), _MOST)
        return gap <= self.bound

    def _amplified(self) -> float:
        """Return how far noise in the weights moves the outputs: deep networks amplify rounding."""
        worst = 0.0
        for redrawn, expected in self._expected.items():
            weights = TrialWeights(self._weights[redrawn], self._dtype, {})

            def noisy(name: str, weights: State = weights) -> Tensor:
                value = weights[name]
                seed = zlib.crc32(name.encode()) + self._seed
                signs = torch.randint(
                    0, 2, value.shape, generator=torch.Generator().manual_seed(seed)
                )
                is_float = value.is_floating_point()
                return value * (1 + _NOISE * (2.0 * signs - 1).to(value)) if is_float else value

            walk = self._walk(LazyState(weights, noisy))
            with torch.no_grad():
                (outputs,) = self._outputs([walk])
                gap = difference(outputs, expected)
            worst = max(worst, gap if math.isfinite(gap) else 0.0)
        return worst

    def first_parting(self, *several: Moves) -> str:
        """Say at which operation random weights' values first differ by more than their order.

        Empty where only the model's own weights show a difference.
        """
        for moves in several:
            weights = self._weights[True]
            walks = [self._walk(TrialWeights(weights, self._dtype, one)) for one in ({}, moves)]
            with torch.no_grad():
                for node in in_lockstep(walks):
                    plain, changed = (walk.value(node) for walk in walks)
                    if not _are_permuted(plain, changed, self.bound):
                        where = module_path(node) or "forward"
                        return f", first in {op_name(node)} of {where!r} (node {node.name!r})"
        return ""


def _are_permuted(plain: object, changed: object, bound: float) -> bool:
    """Return whether one value has the other's elements, in any order, up to rounding."""
    if not isinstance(plain, Tensor) or not isinstance(changed, Tensor):
        return True
    if not plain.is_floating_point() or plain.numel() != changed.numel():
        return plain.numel() == changed.numel()
    return difference([changed.flatten().sort()[0]], [plain.flatten().sort()[0]]) <= bound


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
    if traced.graph is not None:
        return _trial_graph(traced, model, inputs, shuffled)
    others = slice(1, None) if traced.static_batch is not None else slice(1)
    mixed = tuple(
        torch.cat([value[:1], mixture[others]])
        for value, mixture in zip(inputs, shuffled, strict=True)
    )
    try:
        return mixed, call_model(model, mixed, traced.keywords)
    except Exception:  # the model may refuse numbers that do not belong together
        return inputs, call_model(model, inputs, traced.keywords)


def _trial_graph(
    traced: TracedModel,
    model: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    shuffled: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return the graph of a trial: what nodes and edges have is shuffled, the edges are not."""
    mixed = tuple(
        mixture if value.is_floating_point() else value
        for value, mixture in zip(inputs, shuffled, strict=True)
    )
    return mixed, call_model(model, mixed, traced.keywords)
