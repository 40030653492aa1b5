"""Example inputs in any form -> the tensors that a network is traced with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import InputError
from clafusion.execution.nesting import flattened, is_nested
from clafusion.tracing.graphs import GraphInputs, example_of_graph, graph_inputs, named_graph

__all__ = ["example_tensors", "graph_of", "split_example"]

_EXAMPLE_ROWS = 3  # few, for labels are as large as activations; but 1 is special to torch.export


def example_tensors(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return the inputs that :func:`trace` would trace a model with, and their names.

    There are no names where the model takes them by position.

    Raises
    ------
    InputError
        The inputs cannot be used.
    """
    named = named_graph(model, example_inputs)
    if named is None:
        arguments, keywords = split_example(model, example_inputs)
        return (*arguments, *keywords.values()), tuple(keywords)
    graph, whole = graph_of(named)
    return example_of_graph(graph, whole), graph.names


def graph_of(named: Mapping[str, Any]) -> tuple[GraphInputs, list[Tensor]]:
    """Return what the inputs of a graph are, and the tensors in that order."""
    values = {name: _dense(f"example_inputs[{name!r}]", value) for name, value in named.items()}
    given = graph_inputs(values, "example_inputs, ")
    assert given is not None
    return given, [values[name] for name in given.names]


def split_example(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return positional and keyword tensors of the first rows of example inputs.

    Where one of them is a list or a mapping of tensors, all are taken by keyword, under the names
    of :mod:`clafusion.execution.nesting`.
    """
    sizes: dict[str, int] = {}

    def rows(name: str, value: Any) -> Tensor:
        value = _dense(name, value)
        if value.dim() == 0 or value.size(0) == 0:
            raise InputError(
                f"{name} must have a batch of at least one row; got shape {tuple(value.shape)}"
            )
        # torch.export would take a batch of one for a fixed batch size.
        sizes[name] = value.size(0)
        return torch.cat([value, value]) if value.size(0) == 1 else value[:_EXAMPLE_ROWS]

    arguments: tuple[Tensor, ...] = ()
    keywords: dict[str, Tensor] = {}
    if isinstance(example_inputs, Tensor):
        arguments = (rows("example_inputs", example_inputs),)
    elif isinstance(example_inputs, Mapping):
        keywords = {
            name: rows(f"example_inputs[{name!r}]", value)
            for key, whole in example_inputs.items()
            for name, value in flattened(whole, str(key))
        }
    elif isinstance(example_inputs, (tuple, list)) and any(map(is_nested, example_inputs)):
        keywords = {
            name: rows(f"example_inputs, {name!r}", value)
            for key, whole in zip(_names(model, len(example_inputs)), example_inputs, strict=True)
            for name, value in flattened(whole, key)
        }
    elif isinstance(example_inputs, (tuple, list)) and example_inputs:
        arguments = tuple(rows(f"example_inputs[{i}]", v) for i, v in enumerate(example_inputs))
    else:
        raise InputError(
            "example_inputs must be a tensor, a tuple of tensors or a mapping of names to tensors; "
            f"got {type(example_inputs).__name__}"
        )
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InputError(
            f"the first axis of every input must be the batch, of one size: {shown}. (A list of "
            "tensors is no batch. Of a graph the edges are an input called 'edge_index')"
        )
    return arguments, keywords


def _dense(name: str, value: Any) -> Tensor:
    """Return an example input without its history; refuse what is no ordinary tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.is_meta or value.layout is not torch.strided:
        kind = "on the meta device" if value.is_meta else f"of layout {value.layout}"
        raise InputError(f"{name} must be an ordinary (dense) tensor; it is {kind}")
    return value.detach()


def _names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first arguments of a model's forward."""
    by_position = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    parameters = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in parameters if one.kind in by_position]
    if len(names) < count:
        raise InputError(
            f"the model takes {len(names)} inputs by position that have a name, but example_inputs "
            f"has {count}: give lists and mappings of tensors by name, in a mapping"
        )
    return names[:count]
