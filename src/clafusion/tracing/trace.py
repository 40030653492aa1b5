"""Module + example inputs -> TracedModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy

from clafusion.errors import (
    InputError,
    PinnedWarning,
    UnsupportedOpError,
    check_type,
    kind_of,
    warn,
)
from clafusion.execution.call import call_model, device_of, rounding_of
from clafusion.execution.heap import WHILE_TRACING, give_back
from clafusion.execution.transforms import transforms_undone
from clafusion.execution.walk import HALF_WIDER
from clafusion.tracing.copies import evaluation_copy
from clafusion.tracing.examples import graph_of, split_example
from clafusion.tracing.export import export_model, refuse_changed_inputs
from clafusion.tracing.functional import without_partial_writes
from clafusion.tracing.graphs import (
    GraphInputs,
    example_of_graph,
    mark_rows,
    named_graph,
    with_other_size,
)
from clafusion.tracing.groups import Channels, find_channels
from clafusion.tracing.heads import channels_of_heads, groups_with_sharing
from clafusion.tracing.known_proofs import KnownProofs
from clafusion.tracing.layer import Layer
from clafusion.tracing.layers import find_layers
from clafusion.tracing.model import TracedModel
from clafusion.tracing.module_lists import module_lists
from clafusion.tracing.outputs import difference
from clafusion.tracing.pinned import pinned_channels
from clafusion.tracing.rotations import find_rotatable
from clafusion.tracing.rows import mix_rows
from clafusion.tracing.ties import aliases_of
from clafusion.tracing.trace_cache import TraceCache, trace_key
from clafusion.tracing.verify import (
    computes_the_same,
    verify_graph,
    verify_weights,
    with_proved_heads,
)

__all__ = ["trace", "trace_like"]

_cache = TraceCache()


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    verify: bool = True,
    seed: int = 0,
    proofs: KnownProofs | None = None,
) -> TracedModel:
    """Find a model's layers and its channel groups, and prove the groups.

    ``torch.export`` exports a copy of the model in eval mode. Running the exported graph on labels
    finds the channels that must move together (see :mod:`clafusion.tracing.groups`). The model
    itself is not modified.

    A process keeps the graphs of its last traces, without weights and inputs. One of a model of
    equal architecture, on equal inputs, is taken only after a trial on this model: with ``verify``
    the proof with its own weights (that with random ones is true of all), else a comparison of
    outputs.

    Parameters
    ----------
    model
        Any module that ``torch.export`` accepts.
    example_inputs
        The model's inputs: a tensor, a tuple of tensors (positional) or a mapping (keywords).
        An input may also be a list or a mapping of tensors. The first axis of each tensor is the
        batch; the first three rows are used. Inputs with an ``edge_index`` are a graph, of which a
        small one is made: see :mod:`clafusion.tracing.graphs`.
    verify
        Permute every group at random and compare outputs: see :func:`clafusion.verify_graph`. This
        costs a few forward passes. Without it, a mistake of the analysis would go unnoticed.
    seed
        Seed of those permutations and of the random weights.
    proofs
        Proofs of equal graphs, kept from earlier runs: of these only the model's own weights are
        proved. See :class:`clafusion.profiling.proofs.ProofsOnDisk`.

    Raises
    ------
    InputError
        The model is no module or one that cannot be copied, has NaN or infinite weights, or does
        not run on the inputs; or this is ``torch.inference_mode``.
    UnsupportedOpError
        The model cannot be exported, or the analysis has no rule for one of its operations.
    GraphVerificationError
        A permutation changed the output.
    """
    _check_model(model)
    check_type(verify, bool, "verify", "True or False")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed must be a whole number; got {seed!r}")
    traced = partial(_trace, model, verify=verify, seed=seed, proofs=proofs)
    graph = named_graph(model, example_inputs)
    if graph is not None:
        return _of_graph(graph, traced)
    return traced(*split_example(model, example_inputs))


def _of_graph(named: Mapping[str, Any], traced: Callable[..., TracedModel]) -> TracedModel:
    """Trace a graph network with a small graph, or where it admits no other with the given one.

    ``traced`` is :func:`_trace` but for the inputs.
    """
    given, whole = graph_of(named)
    small = example_of_graph(given, whole)
    found = traced((), dict(zip(given.names, small, strict=True)), given)
    if found.static_batch is None:
        return found
    return traced((), dict(zip(given.names, whole, strict=True)), given)


def _trace(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    keywords: Mapping[str, Tensor],
    graph: GraphInputs | None = None,
    *,
    verify: bool,
    seed: int,
    proofs: KnownProofs | None,
) -> TracedModel:
    """Return a trace that is known, or a new one."""
    device = device_of(model)
    if device is not None:
        arguments = tuple(value.to(device) for value in arguments)
        keywords = {name: value.to(device) for name, value in keywords.items()}
    inputs = (*arguments, *keywords.values())
    key = trace_key(model, inputs, tuple(keywords))
    traced = _cache.get(key, model, inputs)
    proved = traced is not None and _cache.is_proved(key)
    with transforms_undone():
        if traced is None or not _is_true_of(
            traced, proved=proved, verify=verify, seed=seed, proofs=proofs
        ):
            traced = _traced(
                model, arguments, keywords, graph, verify=verify, seed=seed, proofs=proofs
            )
            proved = False
    _cache.add(key, traced, proved=verify or proved)
    for name, count in traced.unreached.items():
        warn(
            f"the example inputs reach all but {count} entries of {name!r}, which keep their "
            "places. Give example_inputs as long as those that the model is for",
            PinnedWarning,
        )
    return traced


def _is_true_of(
    traced: TracedModel, *, proved: bool, verify: bool, seed: int, proofs: KnownProofs | None
) -> bool:
    """Say whether a graph from elsewhere is this model's, too, whatever their code reads."""
    try:
        if not verify:
            return computes_the_same(traced, traced.example_inputs)
        if proved:
            return verify_weights(traced, traced.example_inputs, seed=seed)
        verify_graph(traced, traced.example_inputs, seed=seed, proofs=proofs)
    except Exception:  # raised again by a trace of its own, if it is the model's fault
        return False
    return True


def _traced(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    keywords: Mapping[str, Tensor],
    graph: GraphInputs | None,
    *,
    verify: bool,
    seed: int,
    proofs: KnownProofs | None,
) -> TracedModel:
    """Export a model and analyse it."""
    program = export_model(evaluation_copy(model), arguments, keywords)
    give_back(WHILE_TRACING)
    module = program.graph_module
    aliases = aliases_of(model)
    placeholders, constants, trainable = _sources(program, model, aliases)
    refuse_changed_inputs(module, placeholders)
    without_partial_writes(module, placeholders, trainable)
    inputs = (*arguments, *keywords.values())
    traced = TracedModel(
        model=model,
        module=module,
        placeholders=placeholders,
        example_inputs=inputs,
        keywords=tuple(keywords),
        constants=constants,
        layers=(),
        groups=(),
        heads=(),
        uses=(),
        aliases=aliases,
        static_batch=None,
        graph=graph,
    )
    state = traced.module_state()
    types = {one.dtype for one in state.values()} & HALF_WIDER.keys()
    with torch.no_grad():
        if graph is not None:
            _mark_rows(traced)
        buffers = frozenset(state) - trainable
        channels = find_channels(module, placeholders, state, buffers, inputs, traced.layouts)
        layers_of = partial(find_layers, module, placeholders, state, buffers=buffers)
        layers = layers_of(channels)
        normalised = tuple(channels.labels.normalised.values())
        traced = replace(traced, unreached=channels.unreached, normalised=normalised)
        traced = _with_batch_behaviour(traced, HALF_WIDER if types else {})
        prove = partial(_proved, layers_of=layers_of, verify=verify, seed=seed, proofs=proofs)
        shapes = {name: tuple(one.shape) for name, one in state.items()}
        lists = [(one.layer, len(one.names)) for one in module_lists(shapes, layers)]
        singles = channels_of_heads(channels.groups, channels.alone, layers, lists)
        if singles:
            whole = channels.with_singles(singles)
            found = prove(traced, whole, layers_of(whole))
            if any(found.groups[i].size == 1 for one in found.heads for i in one.members[0]):
                return found
        return prove(traced, channels, layers)


def _proved(
    traced: TracedModel,
    channels: Channels,
    layers: tuple[Layer, ...],
    *,
    layers_of: Callable[[Channels], tuple[Layer, ...]],
    verify: bool,
    seed: int,
    proofs: KnownProofs | None,
) -> TracedModel:
    """Prove channels and heads; where heads share channels, the layers do not count these."""
    traced = replace(traced, layers=layers, groups=channels.groups, uses=channels.uses)
    give_back(WHILE_TRACING)
    traced = with_proved_heads(
        traced, traced.example_inputs, verify=verify, seed=seed, proofs=proofs
    )
    groups = groups_with_sharing(traced)
    if any(one.sharing > 1 for one in groups):
        layers = layers_of(replace(channels, groups=groups))
        traced = replace(traced, groups=groups, layers=layers)
    return replace(traced, pinned=pinned_channels(traced, channels.labels))


def trace_like(model: nn.Module, like: TracedModel) -> TracedModel:
    """Trace a model with the example inputs of another; its channel groups are not proved again.

    Which of its streams can be rotated is found out where that is known of the other.

    Parameters and errors are those of :func:`trace`, with ``verify=False``.
    """
    names, example = like.keywords, like.example_inputs
    inputs = dict(zip(names, example, strict=True)) if names else example
    traced = trace(model, inputs, verify=False)
    if like.rotatable is None:
        return traced
    return replace(traced, rotatable=find_rotatable(traced).groups)


def _sources(
    program: torch.export.ExportedProgram, model: nn.Module, aliases: Mapping[str, str]
) -> tuple[tuple[str | None, ...], dict[str, Tensor], frozenset[str]]:
    """Return what feeds each of a graph's inputs, the constants, and the names of parameters.

    A model input has no state entry, which None stands for. Constants are the state entries that
    the model's state dict lacks.
    """
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    nodes = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    used = {node.name for node in nodes if node.users}
    placeholders: list[str | None] = []
    constants: dict[str, Tensor] = {}
    trainable: set[str] = set()
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            placeholders.append(None)
            continue
        target = str(spec.target)
        name = aliases.get(target, target)
        if spec.kind is InputKind.PARAMETER:
            trainable.add(name)
        if name not in known:
            value = program.constants.get(target, program.state_dict.get(target))
            if not isinstance(value, Tensor):
                if getattr(spec.arg, "name", None) in used:
                    raise UnsupportedOpError(
                        f"the model uses the constant {target!r} of type {type(value).__name__}"
                    )
                value = torch.empty(0)
            constants[name] = value.detach().clone()  # it may be a global variable's
        placeholders.append(name)
    return tuple(placeholders), constants, frozenset(trainable)


def _check_model(model: nn.Module) -> None:
    """Raise InputError where a model is no usable module or holds unusable weights."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {kind_of(model)}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"model is wrapped in {type(model).__name__}: give its .module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model is compiled by torch.jit: give the module that it was made from")
    if torch.is_inference_mode_enabled():
        raise InputError(
            "in torch.inference_mode() a model would be made that cannot be trained: leave it, or "
            "use torch.no_grad()"
        )
    if next(model.parameters(), None) is None:
        raise InputError(
            f"the model ({type(model).__name__}) has no parameters, so that there is nothing to "
            "fuse: give the model with its trained layers registered in it (in an nn.ModuleList, "
            "not in a list)"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{name!r} has no shape yet, as its module is lazy: run the model once on a batch, "
                "then load its weights"
            )
    for name, tensor in model.named_parameters():
        if tensor.is_inference():
            raise InputError(
                f"parameter {name!r} was made in torch.inference_mode() and cannot be trained: "
                "build and load the model outside of it"
            )
        if tensor.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device: load its values first")
        if bool(tensor.detach().sum().isfinite()):
            continue  # a sum takes no memory, unlike a mask
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f"parameter {name!r} holds {bad} NaN or infinite values; the model is not usable "
                "as it is"
            )


def _with_batch_behaviour(
    traced: TracedModel, types: Mapping[torch.dtype, torch.dtype]
) -> TracedModel:
    """Say in a traced model which batches it admits, if outputs have rows, and how it computes.

    ``types`` are the types to compute in, where the graph runs in them.
    """
    inputs = traced.example_inputs
    if traced.graph is not None:
        return _with_graph_behaviour(traced, traced.graph)
    try:
        wide = replace(traced, types=types)
        outputs = wide.output_tensors(inputs)
    except RuntimeError:  # the graph fixes a type somewhere
        wide, outputs = traced, traced.output_tensors(inputs)
    size = inputs[0].size(0)
    try:
        of_fewer = wide.output_tensors(tuple(value[: size - 1] for value in inputs))
    except Exception:  # whatever the model's code does with another size than the one it knows
        return replace(wide, static_batch=size, keeps_rows=True)
    wide = replace(wide, mixes_rows=mix_rows(outputs, of_fewer, rounding_of(wide.state().values())))
    keeps_rows = any(
        one.dim() > 0 and one.size(0) * (size - 1) == other.size(0) * size > 0
        for one, other in zip(outputs, of_fewer, strict=True)
        if one.dim() == other.dim()
    )
    return replace(wide, static_batch=None, keeps_rows=keeps_rows)


def _with_graph_behaviour(traced: TracedModel, graph: GraphInputs) -> TracedModel:
    """Say in a traced graph network which graphs it admits, and if outputs have rows."""
    inputs = traced.example_inputs
    rows = {graph.rows_of(inputs, kind) for kind in graph.kinds if kind != "index"}
    rows |= {graph.num_graphs(inputs), graph.edges(inputs).size(1)}
    outputs = traced.output_tensors(inputs)
    keeps_rows = any(one.dim() > 0 and one.size(0) in rows for one in outputs)
    other = with_other_size(graph, inputs)
    try:
        found = traced.output_tensors(other)
        expected = call_model(evaluation_copy(traced.model), other, traced.keywords)
        is_free = difference(found, expected) <= rounding_of(traced.state().values())
    except Exception:  # whatever the model's code does with another size than the one it knows
        is_free = False
    size = None if is_free else inputs[0].size(0)
    return replace(traced, static_batch=size, keeps_rows=keeps_rows)


def _mark_rows(traced: TracedModel) -> None:
    """Note in the nodes of a graph network what they have rows for."""
    assert traced.graph is not None
    values: dict[fx.Node, Any] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        values[node] = value
        return value

    traced.run(traced.example_inputs, replace=keep)
    mark_rows(traced.module.graph, traced.graph, traced.example_inputs, values)
