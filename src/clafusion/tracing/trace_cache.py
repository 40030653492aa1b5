"""The last traces of a process, so that models of one architecture share a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clafusion.tracing.architecture import architecture, digest_of_values
from clafusion.tracing.model import TracedModel

__all__ = ["TraceCache", "trace_key"]

_MOST = 64  # traces; a graph without weights takes little memory


class TraceCache:
    """Traced models without their weights and inputs, by architecture and example inputs.

    The graph of a model depends on its code as well, of which only the classes are compared. So
    whoever takes a trace from here has to check that it computes what the model computes. Traces of
    models whose weights choose what is read, as a router chooses experts, are not kept: what the
    example inputs reach is another thing for each set of weights.
    """

    def __init__(self) -> None:
        self._traces: OrderedDict[Hashable, TracedModel] = OrderedDict()
        self._proved: set[Hashable] = set()
        self._lock = threading.Lock()

    def get(
        self, key: Hashable | None, model: nn.Module, inputs: tuple[Tensor, ...]
    ) -> TracedModel | None:
        """Return the trace of a :func:`trace_key`, with the model's weights and these inputs."""
        with self._lock:
            known = None if key is None else self._traces.get(key)
            if known is None:
                return None
            self._traces.move_to_end(key)
        return replace(known, model=model, example_inputs=inputs)

    def is_proved(self, key: Hashable | None) -> bool:
        """Say whether the channel groups of a trace are proved with random weights."""
        return key in self._proved

    def add(self, key: Hashable | None, traced: TracedModel, *, proved: bool) -> None:
        """Keep a trace, if it has a key; forget the one not needed for the longest time."""
        if key is None or _chooses_by_weights(traced):
            return
        with self._lock:
            # Neither is kept: they are the caller's, who may change them, and may be large.
            self._traces[key] = replace(traced, model=nn.Module(), example_inputs=())
            self._traces.move_to_end(key)
            if proved:
                self._proved.add(key)
            while len(self._traces) > _MOST:
                forgotten, _ = self._traces.popitem(last=False)
                self._proved.discard(forgotten)


def _chooses_by_weights(traced: TracedModel) -> bool:
    """Say whether trained weights enter an integer or a truth value: an index, a count, a mask."""
    names = dict(traced.model.named_parameters())
    trained = {node for node, name in traced.entries.items() if name in names}
    for node in traced.module.graph.nodes:
        if trained.isdisjoint(node.all_input_nodes):
            continue
        trained.add(node)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            return True
    return False


def trace_key(
    model: nn.Module, inputs: Sequence[Tensor], keywords: Sequence[str]
) -> Hashable | None:
    """Return what a trace is kept by; None for a model of which no trace can be kept.

    Parameters
    ----------
    model
        The module.
    inputs, keywords
        Its example inputs, and their names where it takes them by keyword.
    """
    kind = architecture(model)
    if kind is None:
        return None
    values = tuple(
        (value.shape, value.dtype, value.device, digest_of_values(value)) for value in inputs
    )
    return kind, tuple(keywords), values, torch.get_default_dtype()
