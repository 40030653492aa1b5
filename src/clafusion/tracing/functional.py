"""Writes to a part of a tensor, as ``x[:, :3] = y``, as operations that return the whole tensor.

A graph does not say who reads what such a write changes: later nodes read the tensor itself, not
the result of the write. Neither labels nor layers could follow that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from clafusion.tracing.operations import op_name

__all__ = ["changes_what_others_read", "without_partial_writes"]

_aten = torch.ops.aten
_VIEWS = frozenset(
    """slice select unsqueeze squeeze transpose t mT numpy_T permute view _unsafe_view unflatten
    detach alias narrow""".split()
)
_WHOLE = frozenset(
    """copy zero fill index_put masked_scatter scatter scatter_add index_add index_copy
    index_fill""".split()
)
_ENDS = 1 << 40  # a slice to here goes to the end


def without_partial_writes(
    module: fx.GraphModule, placeholders: Sequence[str | None], trained: frozenset[str]
) -> None:
    """Replace writes to views, and writes of other values than a tensor's own, in a graph.

    Only those that others read are replaced, and none that works on constants alone. A write that
    reaches a view in a way that cannot be turned round stays as it is.

    Parameters
    ----------
    module, placeholders
        As for :func:`clafusion.tracing.groups.find_channels`.
    trained
        The state entries that are no constants.
    """
    graph = module.graph
    feeds = [node for node in graph.nodes if node.op == "placeholder"]
    constants = {
        node
        for node, name in zip(feeds, placeholders, strict=True)
        if name is not None and name not in trained
    }
    order: dict[fx.Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    changed = False
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        chain = _chain(node.args[0])
        root = chain[-1]
        if _is_alias(root):
            continue
        is_whole = len(chain) == 1
        if root.op == "placeholder" or (is_whole and op_name(node) not in _WHOLE):
            continue
        if not _depends(node, constants) or not _is_read_later(node, root, order):
            continue
        with graph.inserting_after(node):
            changed |= _replace(graph, node, chain, order)
    if changed:
        graph.lint()
        module.recompile()


def changes_what_others_read(node: fx.Node) -> bool:
    """Return whether a write puts other values into a tensor of which no other reader knows."""
    if not _writes(node) or op_name(node) not in _WHOLE:
        return False
    order = {one: float(i) for i, one in enumerate(node.graph.nodes)}
    root = _chain(node.args[0])[-1]
    return _is_alias(root) or (root is not node.args[0] and _is_read_later(node, root, order))


def _is_alias(node: fx.Node) -> bool:
    """Return whether a node shows another one's memory, in a way that is not turned round here."""
    if node.target is operator.getitem:
        return _is_alias(node.args[0]) or op_name(node.args[0]) in ("unbind", "split", "chunk")
    if not isinstance(node.target, torch._ops.OpOverload) or op_name(node) in _VIEWS:
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _writes(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and target._schema.name.endswith("_")  # __or__ is not mutable
        and bool(node.args)
        and isinstance(node.args[0], fx.Node)
    )


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return a view, what it is a view of, and so on to the tensor that owns the memory."""
    chain = [node]
    while chain[-1].op == "call_function" and (
        op_name(chain[-1]) in _VIEWS or _writes(chain[-1])  # an operation in place returns itself
    ):
        chain.append(chain[-1].args[0])
    return chain


def _depends(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Return whether a write, or what it changes, depends on more than constants."""
    seen, waiting = {node}, [node]
    while waiting:
        for one in (*waiting.pop().all_input_nodes,):
            if one.op == "placeholder" and one not in constants:
                return True
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return False


def _aliases(root: fx.Node) -> list[fx.Node]:
    """Return a tensor and all views of it, each after what it is a view of."""
    found = [root]
    for one in found:
        for user in one.users:
            is_view = user.op == "call_function" and (op_name(user) in _VIEWS or _writes(user))
            if is_view and user.args[0] is one and user not in found:
                found.append(user)
    return found


def _is_read_later(node: fx.Node, root: fx.Node, order: Mapping[fx.Node, float]) -> bool:
    """Return whether others than the write's own readers see what it changes."""
    return any(
        order[user] > order[node] for one in _aliases(root) if one is not node for user in one.users
    )


def _replace(
    graph: fx.Graph, node: fx.Node, chain: list[fx.Node], order: dict[fx.Node, float]
) -> bool:
    """Replace a write; return whether it could be."""
    root = chain[-1]
    at = order[node]
    made: list[fx.Node] = []

    def call(target: Any, arguments: tuple[Any, ...], like: fx.Node, **keywords: Any) -> fx.Node:
        after = made[-1] if made else node
        with graph.inserting_after(after):
            new = graph.call_function(target, arguments, keywords)
        new.meta = dict(like.meta)
        order[new] = at
        made.append(new)
        return new

    if any(_inverse(one) is None for one in chain[:-1]):
        return False
    value = _value(node, call)
    if value is None:
        return False
    for view in chain[:-1]:
        inverse = _inverse(view)
        assert inverse is not None
        value = inverse(call, value)
    aliases = [one for one in _aliases(root) if order[one] <= at and one not in made]
    new_of = {root: value}
    for one in aliases[1:]:
        base = new_of[one.args[0]]
        if _writes(one):  # it returns what it works on
            new_of[one] = base
        else:
            keywords = dict(one.kwargs)
            new_of[one] = call(one.target, (base, *one.args[1:]), one, **keywords)
    for one in aliases:
        for user in list(one.users):
            if order[user] > at:
                user.replace_input_with(one, new_of[one])
    for new in reversed(made):
        if not new.users:
            graph.erase_node(new)
            del order[new]
    if not node.users:
        graph.erase_node(node)
    return True


def _value(node: fx.Node, call: Callable[..., fx.Node]) -> fx.Node | None:
    """Return what a write puts into the view."""
    target, view = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    name = op_name(node)
    if name == "zero":
        return call(_aten.zeros_like.default, (view,), view)
    if name == "fill" and not isinstance(node.args[1], fx.Node):
        return call(_aten.full_like.default, (view, node.args[1]), view)
    if name == "copy":
        source = node.args[1]
        shown, wanted = source.meta.get("val"), view.meta.get("val")
        if shown is None or wanted is None:
            return None
        if shown.dtype != wanted.dtype:
            source = call(_aten.to.dtype, (source, wanted.dtype), view)
        if tuple(map(str, shown.shape)) != tuple(map(str, wanted.shape)):
            source = call(_aten.expand_as.default, (source, view), view)
        return source
    packet = getattr(_aten, name, None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None:
        return None
    return call(overload, tuple(node.args), view, **dict(node.kwargs))


def _inverse(view: fx.Node) -> Callable[[Callable[..., fx.Node], fx.Node], fx.Node] | None:
    """Return a function that puts a view's new value into what it is a view of."""
    name, base = op_name(view), view.args[0]
    rest: list[Any] = list(view.args[1:])
    if name in ("detach", "alias") or _writes(view):
        return lambda _call, new: new
    if name == "slice":
        defaults: list[Any] = [0, None, None, 1]
        dim, start, end, step = rest + defaults[len(rest) :]
        is_to_the_end = end is None or (isinstance(end, int) and end > _ENDS)
        if start in (0, None) and is_to_the_end and step == 1:
            return lambda _call, new: new
        return lambda call, new: call(
            _aten.slice_scatter.default, (base, new, dim, start, end, step), base
        )
    if name == "select":
        return lambda call, new: call(_aten.select_scatter.default, (base, new, *rest), base)
    if name == "unsqueeze":
        return lambda call, new: call(_aten.squeeze.dim, (new, *rest), base)
    if name in ("transpose", "t", "mT", "numpy_T"):
        return lambda call, new: call(view.target, (new, *rest), base)
    if name == "permute":
        inverse = [rest[0].index(i) for i in range(len(rest[0]))]
        if any(one < 0 for one in rest[0]):
            return None
        return lambda call, new: call(_aten.permute.default, (new, inverse), base)
    if name in ("view", "_unsafe_view", "unflatten", "squeeze"):
        return lambda call, new: call(_aten.reshape_as.default, (new, base), base)
    return None
