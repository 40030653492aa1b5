"""Parents' outputs, kept from one assessment to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from clafusion.assessment.evaluation import Network
from clafusion.tracing.architecture import digest_of_values
from clafusion.tracing.model import TracedModel

__all__ = ["OutputCache"]

_KEPT_NUMBERS = 1 << 20  # in outputs that are kept for each parent


class OutputCache:
    """Parents' outputs on the inputs of an assessment, kept for further fusions of these parents.

    They are kept by the inputs' values, as long as the model lives, and as they take at most 4 MB
    a model. A model's weights must not change meanwhile.
    """

    def __init__(self) -> None:
        self._outputs: WeakKeyDictionary[nn.Module, dict[Hashable, Tensor]] = WeakKeyDictionary()

    @property
    def num_bytes(self) -> int:
        """The memory that the outputs take."""
        kept = (one for known in self._outputs.values() for one in known.values())
        return sum(one.numel() * one.element_size() for one in kept)

    def get(
        self, models: Sequence[TracedModel], inputs: tuple[Tensor, ...], output: int
    ) -> list[Tensor]:
        """Return each model's output of a number on some inputs, at the positions that count."""
        key = (output, _values(inputs))

        def run(model: TracedModel) -> Tensor:
            return model.output_tensors(inputs)[output]

        return [self._kept(one.model, key, partial(run, one)) for one in models]

    def keeping(self, model: nn.Module, run: Network) -> Network:
        """Return the network of a model that keeps what it puts out, at all positions."""

        def kept(inputs: tuple[Tensor, ...]) -> Tensor:
            return self._kept(model, ("whole", _values(inputs)), partial(run, inputs))

        return kept

    def _kept(self, model: nn.Module, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        known = self._outputs.setdefault(model, {})
        if key in known:
            return known[key]
        found = make()
        if found.numel() + sum(one.numel() for one in known.values()) <= _KEPT_NUMBERS:
            known[key] = found.detach().clone()  # it may be a view of something larger
        return found

    def forget(self) -> None:
        """Keep none of the outputs any longer."""
        self._outputs.clear()


def _values(inputs: tuple[Tensor, ...]) -> Hashable:
    return tuple((one.shape, one.dtype, digest_of_values(one)) for one in inputs)
