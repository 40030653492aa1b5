"""Parents' outputs, kept from one pass over some inputs to the next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clafusion.assessment.evaluation import Network
from clafusion.execution.walk import Walk
from clafusion.profiling.moments import side_by_side
from clafusion.profiling.profile import Observer
from clafusion.tracing.architecture import digest_of_values
from clafusion.tracing.model import TracedModel

__all__ = ["LARGE_CACHE", "OutputCache", "OutputStream"]

_KEPT_NUMBERS = 1 << 20
LARGE_CACHE = 1 << 25
"""Numbers in the outputs of a parent that a single fusion may keep."""


class OutputCache:
    """Parents' outputs on the inputs of an assessment, kept for further fusions of these parents.

    They are kept by the inputs' values, as long as the model lives. A model's weights must not
    change meanwhile.

    Parameters
    ----------
    most
        How many numbers are kept for each model; default 4 MB of them.
    """

    def __init__(self, most: int = _KEPT_NUMBERS) -> None:
        self._most = most
        self._outputs: WeakKeyDictionary[nn.Module, dict[Hashable, Tensor]] = WeakKeyDictionary()

    @property
    def num_bytes(self) -> int:
        """The memory that the outputs take."""
        kept = (one for known in self._outputs.values() for one in known.values())
        return sum(one.numel() * one.element_size() for one in kept)

    def get(self, model: TracedModel, inputs: tuple[Tensor, ...], output: int) -> Tensor:
        """Return a model's output of a number on some inputs, at the positions that count."""

        def run() -> Tensor:
            walk = Walk(model, inputs, model.state(), set(), fastest=True)  # as a profile does
            return walk.output_tensors()[output]

        return self._kept(model.model, (output, _values(inputs)), run)

    def keeping(self, model: nn.Module, run: Network) -> Network:
        """Return the network of a model that keeps what it puts out, at all positions."""

        def kept(inputs: tuple[Tensor, ...]) -> Tensor:
            return self._kept(model, ("whole", _values(inputs)), partial(run, inputs))

        return kept

    def observer(self, output: int, most_inputs: int) -> Observer:
        """Return what keeps models' outputs of a number on the first inputs that they run on.

        It is called with the model, the inputs and a function that returns the outputs.
        """
        seen: Counter[int] = Counter()

        def observe(
            model: TracedModel, inputs: tuple[Tensor, ...], outputs: Callable[[], list[Tensor]]
        ) -> None:
            if seen[id(model)] < most_inputs:
                seen[id(model)] += inputs[0].size(0)
                self._kept(model.model, (output, _values(inputs)), lambda: outputs()[output])

        return observe

    def _kept(self, model: nn.Module, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        known = self._outputs.setdefault(model, {})
        if key in known:
            return known[key]
        found = make()
        if found.numel() + sum(one.numel() for one in known.values()) <= self._most:
            known[key] = found.detach().clone()  # it may be a view of something larger
        return found

    def forget(self) -> None:
        """Keep none of the outputs any longer."""
        self._outputs.clear()


def _values(inputs: tuple[Tensor, ...]) -> Hashable:
    return tuple((one.shape, one.dtype, digest_of_values(one)) for one in inputs)


class OutputStream:
    """A parent's outputs on batches.

    On inputs that a fusion has seen the parent runs in the parts in which its profile does: so the
    profile's outputs are these to the last bit, and those of every other fusion, too.

    Parameters
    ----------
    model
        The parent.
    output
        The number of the output.
    known
        What it put out before.
    held_out
        Whether the inputs are held out, so that no profile is of them.
    """

    def __init__(
        self, model: TracedModel, output: int, known: OutputCache, *, held_out: bool
    ) -> None:
        self._model, self._output, self._known = model, output, known
        is_cut = model.graph is None and model.output_has_rows[output]
        self._in_parts = not held_out and is_cut
        self._waiting: deque[tuple[Tensor, ...]] = deque()
        self._made: list[Tensor] = []
        self._num_inputs = 0  # that the outputs in ``_made`` are of

    def feed(self, inputs: tuple[Tensor, ...]) -> None:
        """Add a batch; nothing runs yet."""
        if self._in_parts:
            self._waiting.extend(side_by_side(self._model, inputs))

    def take(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the outputs for the next inputs, which were fed."""
        if not self._in_parts:
            return self._known.get(self._model, inputs, self._output)
        count = inputs[0].size(0)
        while self._num_inputs < count:
            part = self._waiting.popleft()
            self._made.append(self._known.get(self._model, part, self._output))
            self._num_inputs += part[0].size(0)
        whole = torch.cat(self._made)
        end = count * (len(whole) // self._num_inputs)
        self._made, self._num_inputs = [whole[end:]], self._num_inputs - count
        return whole[:end]
