"""Module + inputs -> exported graph. The only user of ``torch.export``."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from clafusion.errors import DataError, UnsupportedOpError
from clafusion.execution.call import without_by_products, without_caches
from clafusion.execution.nesting import nested
from clafusion.execution.results import forget_results
from clafusion.execution.writes import written_inputs
from clafusion.tracing.copies import parameters_protected
from clafusion.tracing.graphs import EDGES, counts_traced
from clafusion.tracing.operations import module_path, op_name
from clafusion.tracing.shapes import inline_shapes

__all__ = ["export_model", "first_line", "refuse_changed_inputs"]

_OUT_OF_TABLE = (
    ". A whole number among the inputs is beyond the table in which the model looks it up: its "
    "vocabulary, or its positions"
)

_EXPORTING = threading.Lock()  # torch.export changes settings of the whole process


def export_model(
    model: nn.Module, arguments: Sequence[Tensor], keywords: Mapping[str, Tensor]
) -> torch.export.ExportedProgram:
    """Export a model in eval mode, with a free batch size where its code allows that.

    Of a graph network the numbers of nodes, edges and graphs are free.

    The bodies of nested graphs become part of the graph itself.

    Parameters
    ----------
    model
        A copy in eval mode, which may be changed but for its parameters.
    arguments, keywords
        Example inputs, positional and by name; they are copied.

    Raises
    ------
    InputError
        The model does not run on the inputs.
    UnsupportedOpError
        ``torch.export`` cannot export the model, the graph holds control flow, or forward changes a
        parameter.
    """
    with _EXPORTING, _quiet_export(), without_caches(model):
        program = _export(
            model,
            tuple(value.clone() for value in arguments),
            {name: value.clone() for name, value in keywords.items()},
        )
    _inline_subgraphs(program.graph_module)
    inline_shapes(program.graph_module)
    return program


def refuse_changed_inputs(module: fx.GraphModule, placeholders: Sequence[str | None]) -> None:
    """Refuse a graph that changes an input in place, for that would change the caller's data.

    Parameters
    ----------
    module
        The exported graph.
    placeholders
        For each of its inputs the state entry's name, or None for a model input.

    Raises
    ------
    UnsupportedOpError
        An operation works in place on an input or on a view of an input.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    arguments = [node.name for node in nodes.values() if node.op == "placeholder"]
    inputs = {one for one, name in zip(arguments, placeholders, strict=True) if name is None}
    for changed, by in written_inputs(module).items():
        if changed in inputs:
            raise UnsupportedOpError(
                f"the model changes its input in place ({op_name(nodes[by])} in "
                f"{module_path(nodes[by]) or 'forward'}), which would change the data: write it "
                "without the underscore or inplace=True"
            )


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Switch off PyTorch's fused transformer kernels, its warnings about exports and its traces.

    The kernels would hide the layers. The warnings are about other uses of exported programs. A
    trace of the Python stack for each node takes a tenth of the time, and nothing reads it.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with_traces = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        fx.config.do_not_emit_stack_traces = with_traces


def _export(
    model: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]
) -> torch.export.ExportedProgram:
    auto = {0: torch.export.Dim.AUTO}
    by_name: dict[str, Any] = {}
    signature = inspect.signature(model.forward)
    named = nested(list(keywords), list(keywords.values()))
    try:
        bound = signature.bind(*arguments, **named)
    except TypeError as error:
        of_list = (
            ". If it takes a list of tensors, as models for detection do, it cannot be fused: its "
            "inputs have no batch axis"
            if len(arguments) > 1 and len(signature.parameters) == 1
            else ""
        )
        raise DataError(
            f"the model's forward{signature} does not take these inputs: {error}{of_list}"
        ) from error
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            by_name[name] = tuple(auto for _ in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            by_name |= pytree.tree_map(lambda _: auto, value)
        else:
            by_name[name] = pytree.tree_map(lambda _: auto, value)
    if EDGES in keywords:
        by_name[EDGES] = {1: torch.export.Dim.AUTO}
    shapes: Any = by_name if keywords else tuple(by_name.values())
    try:  # before the export, which would log the same failure at length
        with torch.no_grad(), parameters_protected(model):
            outputs = model(*arguments, **named)
    except UnsupportedOpError:
        raise
    except Exception as cause:
        inputs = (*arguments, *keywords.values())
        called = [""] * len(arguments) + [f"{name} " for name in keywords]
        shown = ", ".join(
            f"{name}{tuple(value.shape)} {value.dtype}"
            for name, value in zip(called, inputs, strict=True)
        )
        advice = _OUT_OF_TABLE if isinstance(cause, IndexError) else _advice(model, inputs)
        types = ", ".join(sorted({str(value.dtype) for value in model.parameters()}))
        raise DataError(
            f"the model does not run on the example inputs {shown}, with parameters of "
            f"{types or 'no type'}: {cause}{advice}"
        ) from cause
    answers = without_by_products(outputs)
    _refuse_strange_outputs(answers)
    if answers is not outputs:
        model.forward = _answering(model.forward)
    forget_results(model)
    try:
        traced_counts = counts_traced(model) if EDGES in keywords else nullcontext()
        with _keywords_spelled_out(model, named), traced_counts:
            return torch.export.export(model, arguments, named, dynamic_shapes=shapes, strict=False)
    except Exception as failure:
        raise UnsupportedOpError(
            f"torch.export cannot export {type(model).__name__}: {first_line(failure)}. Rewrite "
            "data-dependent control flow, or fuse the part of the model that can be exported"
        ) from failure


def _answering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that leaves by-products out."""

    @wraps(forward)
    def answer(*arguments: Any, **keywords: Any) -> Any:
        return without_by_products(forward(*arguments, **keywords))

    return answer


@contextmanager
def _keywords_spelled_out(model: nn.Module, named: Mapping[str, Any]) -> Iterator[None]:
    """Give a forward that takes ``**keywords`` a signature with their names, for a while.

    ``torch.export`` cannot tell the shapes of keywords that no signature names.
    """
    signature = inspect.signature(model.forward)
    known = [one for one in signature.parameters.values() if one.kind != one.VAR_KEYWORD]
    others = [one for one in named if one not in {parameter.name for parameter in known}]
    if not others:
        yield
        return
    original, own = model.forward, "forward" in vars(model)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    spelled = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*known, *spelled]
    )
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own:
            model.forward = original


def _advice(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Say what to do about inputs of another floating type than the weights'; or ""."""
    types = {one.dtype for one in model.parameters() if one.is_floating_point()}
    unlike = {one.dtype for one in inputs if one.is_floating_point()} - types
    if len(types) != 1 or not unlike:
        return ""
    return f". Convert the inputs to the weights' type: inputs.to({types.pop()})"


def _refuse_strange_outputs(outputs: Any) -> None:
    """Refuse outputs that are more than tensors, numbers and texts; say how to leave them out."""
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    known = (Tensor, int, float, bool, str, type(None))
    strange = next((one for one in leaves if not isinstance(one, known)), None)
    if strange is None:
        return
    raise UnsupportedOpError(
        f"the model returns a {type(strange).__name__}, which is neither a tensor nor a tuple, "
        "list or dictionary of tensors: wrap it in a module that returns its outputs alone"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type where it has none."""
    return next(iter(str(error).strip().splitlines()), repr(error))


def _inline_subgraphs(module: fx.GraphModule) -> None:
    """Put the bodies of nested graphs, as of ``wrap_with_set_grad_enabled``, into the graph."""
    changed = False
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if "wrap_with" not in str(node.target):
            raise UnsupportedOpError(
                f"operation {node.target} (node {node.name!r}) is not supported: its body depends "
                "on values. Export the model without data-dependent control flow"
            )
        body_at = next(
            i
            for i, argument in enumerate(node.args)
            if isinstance(argument, fx.Node)
            and argument.op == "get_attr"
            and isinstance(getattr(module, str(argument.target)), fx.GraphModule)
        )
        body = getattr(module, str(node.args[body_at].target))
        _inline_subgraphs(body)
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        mapping = dict(zip(inputs, node.args[body_at + 1 :], strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(body.graph, mapping)
        for user in list(node.users):  # the body returns a tuple, of which each user takes an item
            item = results[user.args[1]] if isinstance(results, (tuple, list)) else results
            user.replace_all_uses_with(item)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        changed = True
    if changed:
        module.recompile()
