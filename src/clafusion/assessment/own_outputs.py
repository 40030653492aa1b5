"""What a fused network puts out, as its calibration has seen it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clafusion.calibration.outputs import KnownOutputs
from clafusion.execution.call import call_model
from clafusion.profiling.thinning import as_thinned
from clafusion.tracing.model import TracedModel

__all__ = ["OwnOutputs"]

_TRIED, _NEAR = 2, 1e-4  # inputs, and how far what is known may be from what the network puts out


class OwnOutputs:
    """A fused network's outputs on inputs in the order of the data, known ones where they hold.

    REPAIR runs the network on all inputs, layer by layer, and where they are one batch the last
    layer puts out what the finished network does. What is known is tried on two inputs first: the
    network itself has to put it out, within 1e-4 of the largest. Where it does not, or where the
    inputs are other ones, the network runs.

    Parameters
    ----------
    model
        The network.
    parent
        A parent: outputs are at the positions that it computes.
    output
        The number of the output.
    known
        What is known of its outputs.
    """

    def __init__(
        self, model: nn.Module, parent: TracedModel, output: int, known: KnownOutputs
    ) -> None:
        self._model, self._parent, self._output = model, parent, output
        self._known: tuple[tuple[Tensor, ...], Tensor] | None = None
        self._start = 0
        if not known or parent.takes_whole_batches or known[0][1][output].dim() == 0:
            return
        found = torch.cat([outputs[output] for _, outputs in known])
        inputs = tuple(map(torch.cat, zip(*(one for one, _ in known), strict=True)))
        count = len(inputs[0])
        if len(found) % count == 0:
            found = found.unflatten(0, (count, -1))
            few = tuple(one[:_TRIED] for one in inputs)
            own, wanted = found[:_TRIED].flatten(0, 1), self._run(few)
            is_same = own.shape == wanted.shape
            if is_same and bool((own - wanted).abs().max() <= _NEAR * wanted.abs().max()):
                self._known = inputs, found

    def take(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the outputs for the next inputs."""
        if self._known is not None:
            known, found = self._known
            part = slice(self._start, self._start + len(inputs[0]))
            if all(torch.equal(one[part], other) for one, other in zip(known, inputs, strict=True)):
                self._start = part.stop
                return found[part].flatten(0, 1)
            self._known = None
        return self._run(inputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        own = call_model(self._model, inputs, self._parent.keywords)[self._output]
        return as_thinned(self._parent, inputs, own)
