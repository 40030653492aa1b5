"""Parents' outputs, kept from one assessment to the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn

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
        """Return each model's output of a number on some inputs."""
        values = tuple((one.shape, one.dtype, digest_of_values(one)) for one in inputs)
        return [self._get(one, inputs, output, (output, values)) for one in models]

    def _get(
        self, model: TracedModel, inputs: tuple[Tensor, ...], output: int, key: Hashable
    ) -> Tensor:
        known = self._outputs.setdefault(model.model, {})
        if key in known:
            return known[key]
        found = model.output_tensors(inputs)[output]
        if found.numel() + sum(one.numel() for one in known.values()) <= _KEPT_NUMBERS:
            known[key] = found.detach().clone()  # it may be a view of something larger
        return found

    def forget(self) -> None:
        """Keep none of the outputs any longer."""
        self._outputs.clear()
