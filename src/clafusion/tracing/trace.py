"""Module + example inputs -> TracedModel. The only user of ``torch.export``."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from clafusion.errors import InputError, UnsupportedOpError
from clafusion.tracing.groups import find_channels
from clafusion.tracing.layers import find_layers
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import module_path, op_name
from clafusion.tracing.verify import with_proved_heads

__all__ = ["architecture", "traced_like", "trace", "trace_like"]

Architecture: TypeAlias = tuple[Any, ...]

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    type(None),
    FunctionType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
)
_EXAMPLE_ROWS = 3  # enough for a batch that is not special; labels are as large as activations


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    *,
    verify: bool = True,
    seed: int = 0,
) -> TracedModel:
    """Find a model's layers and its channel groups, and prove the groups.

    The model is exported with ``torch.export`` in eval mode; the channels that must move together
    are found by running the graph on labels (see :mod:`clafusion.tracing.groups`). The model itself is
    not modified.

    Parameters
    ----------
    model
        Any module that ``torch.export`` accepts.
    example_inputs
        The model's inputs: a tensor, a tuple of tensors (positional) or a mapping (keywords).
        The first axis of each is the batch; the first three rows are used.
    verify
        Permute every group of a copy at random and compare outputs. Costs a few forward passes;
        without it a mistake of the analysis would go unnoticed.
    seed
        Seed of those permutations.

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
    arguments, keywords = _example(example_inputs)
    device = next((one.device for one in model.parameters()), None)
    if device is not None:
        arguments = tuple(one.to(device) for one in arguments)
        keywords = {name: one.to(device) for name, one in keywords.items()}
    with _quiet_export():
        program = _export(
            copied(model).eval(),
            tuple(one.clone() for one in arguments),
            {name: one.clone() for name, one in keywords.items()},
        )
    module = program.graph_module
    _inline_subgraphs(module)

    aliases = _aliases(model)
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    placeholders: list[str | None] = []
    constants: dict[str, Tensor] = {}
    used = {node.name for node in module.graph.nodes if node.op == "placeholder" and node.users}
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
            found = program.constants.get(target, program.state_dict.get(target))
            if not isinstance(found, Tensor):
                if getattr(spec.arg, "name", None) in used:
                    raise UnsupportedOpError(
                        f"the model uses the constant {target!r} of type {type(found).__name__}"
                    )
                found = torch.empty(0)
            constants[name] = found
        placeholders.append(name)

    _refuse_changed_inputs(module, placeholders)
    inputs = (*arguments, *keywords.values())
    graph = TracedModel(
        model=model,
        module=module,
        placeholders=tuple(placeholders),
        example_inputs=inputs,
        keywords=tuple(keywords),
        constants=constants,
        layers=(),
        groups=(),
        heads=(),
        uses=(),
        aliases=aliases,
        static_batch=None,
    )
    state = graph.state()
    with torch.no_grad():
        channels = find_channels(module, placeholders, state, frozenset(state) - trainable, inputs)
        layers = find_layers(module, placeholders, state, channels)
    graph = replace(
        graph,
        layers=layers,
        groups=channels.groups,
        uses=channels.uses,
        static_batch=_static_batch(graph),
    )
    return with_proved_heads(graph, inputs, verify=verify, seed=seed)


def trace_like(model: nn.Module, like: TracedModel) -> TracedModel:
    """Trace a model with another one's example inputs; its analysis is not proven again."""
    names, example = like.keywords, like.example_inputs
    inputs = dict(zip(names, example, strict=True)) if names else example
    return trace(model, inputs, verify=False)


def traced_like(known: TracedModel, model: nn.Module) -> TracedModel:
    """Return the graph of a model of the same :func:`architecture` as a traced one's.

    It is not proved yet: that takes the model's own weights.
    """
    _check_model(model)
    return replace(known, model=model)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a module, or say why there can be none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({_first_line(error)}). Take off what "
            "computes a weight from others (remove_weight_norm, remove_spectral_norm, "
            "torch.nn.utils.prune.remove) or keeps a result of forward"
        ) from error


def architecture(model: nn.Module) -> Architecture | None:
    """Return all that an export can depend on; equal for models that export to the same graph.

    That is every submodule's group and attributes, the parameters' and buffers' shapes, types and
    ties, and the values of buffers, but for a norm's statistics. None where an attribute is not
    plain, for then nobody can tell: a hook, a tensor, an object of a group of its own.
    """
    seen: dict[int, int] = {}

    def tensor(name: str, value: Tensor | None, owner: nn.Module) -> Any:
        if value is None:
            return name, None
        number = seen.setdefault(id(value), len(seen))
        facts = type(value), value.shape, value.stride(), value.dtype, value.device
        is_statistic = type(owner).__module__ == "torch.nn.modules.batchnorm"
        if not isinstance(value, nn.Parameter) and not is_statistic:
            values = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            return name, number, facts, values.numpy().tobytes()
        return name, number, facts, value.requires_grad

    def plain(value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, (list, tuple)):
            return type(value), tuple(plain(one) for one in value)
        if isinstance(value, (set, frozenset)) and all(isinstance(one, str) for one in value):
            return type(value), frozenset(value)
        if isinstance(value, dict) and not value:
            return type(value), ()
        raise TypeError

    found: list[Any] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            own = dict(vars(module))
            parameters, buffers, children = (
                own.pop(kind) for kind in ("_parameters", "_buffers", "_modules")
            )
            found.append(
                (
                    path,
                    type(module),
                    seen.setdefault(id(module), len(seen)),
                    tuple((name, child is None) for name, child in children.items()),
                    tuple(tensor(name, one, module) for name, one in parameters.items()),
                    tuple(tensor(name, one, module) for name, one in buffers.items()),
                    tuple((name, plain(value)) for name, value in own.items()),
                )
            )
        hash(tuple(found))
    except (TypeError, AttributeError, RuntimeError):
        return None
    return tuple(found)


def _refuse_changed_inputs(module: fx.GraphModule, placeholders: Sequence[str | None]) -> None:
    """Refuse an operation in place on an input or on a view of one: it would change the data."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = {node for node, name in zip(nodes, placeholders, strict=True) if name is None}
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        first = node.args[0] if node.args else None
        if first not in inputs:
            continue
        if schema.is_mutable:
            raise UnsupportedOpError(
                f"the model changes its input in place ({op_name(node)} in "
                f"{module_path(node) or 'forward'}), which would change the data: write it without "
                "the underscore or inplace=True"
            )
        if schema.returns and schema.returns[0].alias_info is not None:
            inputs.add(node)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"model is wrapped in {type(model).__name__}: give its .module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model is compiled by torch.jit: give the module that it was made from")
    if torch.is_inference_mode_enabled():
        raise InputError(
            "in torch.inference_mode() a model would be made that cannot be trained: leave it, or "
            "use torch.no_grad()"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_inference():
            raise InputError(
                f"parameter {name!r} was made in torch.inference_mode() and cannot be trained: "
                "build and load the model outside of it"
            )
        if tensor.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device: load its values first")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f"parameter {name!r} holds {bad} NaN or infinite values; the model is not usable "
                "as it is"
            )


def _example(
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Split example inputs into positional and keyword tensors of a few rows."""

    def rows(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a tensor; got {type(value).__name__}")
        if value.dim() == 0 or value.size(0) == 0:
            raise InputError(
                f"{name} must have a batch of at least one row; got shape {tuple(value.shape)}"
            )
        value = value.detach()
        # A batch of one is special to torch.export: it would fix the batch size.
        return torch.cat([value, value]) if value.size(0) == 1 else value[:_EXAMPLE_ROWS]

    if isinstance(example_inputs, Tensor):
        return (rows("example_inputs", example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {
            str(key): rows(f"example_inputs[{key!r}]", value)
            for key, value in example_inputs.items()
        }
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return tuple(rows(f"example_inputs[{i}]", v) for i, v in enumerate(example_inputs)), {}
    raise InputError(
        "example_inputs must be a tensor, a tuple of tensors or a mapping of names to tensors; "
        f"got {type(example_inputs).__name__}"
    )


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep PyTorch's fused transformer kernels out of the graph, and its warnings to itself.

    The kernels hide the layers; the warnings are about the exported program's use elsewhere.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _export(
    model: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]
) -> torch.export.ExportedProgram:
    auto = {0: torch.export.Dim.AUTO}
    by_name: dict[str, Any] = {}
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise InputError(
            f"the model's forward{signature} does not take these inputs: {error}"
        ) from error
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            by_name[name] = tuple(auto for _ in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            by_name[name] = dict.fromkeys(value, auto)
        else:
            by_name[name] = auto
    shapes: Any = by_name if keywords else tuple(by_name.values())
    failure: Exception | None = None
    try:
        program = torch.export.export(
            model, arguments, dict(keywords), dynamic_shapes=shapes, strict=False
        )
    except Exception as error:
        failure = error
    try:  # a model that cannot run on these inputs may be exported, and the other way round
        with torch.no_grad():
            model(*arguments, **keywords)
    except Exception as cause:
        inputs = (*arguments, *keywords.values())
        shown = ", ".join(f"{tuple(one.shape)} {one.dtype}" for one in inputs)
        types = ", ".join(sorted({str(one.dtype) for one in model.parameters()}))
        raise InputError(
            f"the model does not run on the example inputs {shown}, with parameters of "
            f"{types or 'no type'}: {cause}"
        ) from cause
    if failure is not None:
        raise UnsupportedOpError(
            f"torch.export cannot export {type(model).__name__}: {_first_line(failure)}. Rewrite "
            "data-dependent control flow, or fuse the part of the model that can be exported"
        ) from failure
    return program


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))


def _inline_subgraphs(module: fx.GraphModule) -> None:
    """Put the bodies of ``wrap_with_set_grad_enabled`` and the like into the graph itself."""
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
            for i, one in enumerate(node.args)
            if isinstance(one, fx.Node)
            and one.op == "get_attr"
            and isinstance(getattr(module, str(one.target)), fx.GraphModule)
        )
        body = getattr(module, str(node.args[body_at].target))
        _inline_subgraphs(body)
        inner = [one for one in body.graph.nodes if one.op == "placeholder"]
        mapping = dict(zip(inner, node.args[body_at + 1 :], strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(body.graph, mapping)
        for user in list(node.users):  # the body returns a tuple, its users take items
            item = results[user.args[1]] if isinstance(results, (tuple, list)) else results
            user.replace_all_uses_with(item)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        changed = True
    if changed:
        module.recompile()


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return for every tied entry the name that stands for it."""
    first: dict[int, str] = {}
    aliases = {}
    entries = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in entries:
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return aliases


def _static_batch(graph: TracedModel) -> int | None:
    """Return the batch size where the model's code, and so the graph, fixes it."""
    size = graph.example_inputs[0].size(0)
    try:
        with torch.no_grad():
            graph.run(tuple(one[: size - 1] for one in graph.example_inputs))
    except (RuntimeError, AssertionError):
        return size
    return None
