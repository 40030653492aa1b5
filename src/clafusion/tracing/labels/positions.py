"""Hidden units of layers that mix positions, such as the token mixing of an MLP-Mixer.

A label names one channel. Between two layers over the positions a value has two kinds: the channels
of the stream, which its label names, and the units of the first layer. These belong to the two
layers alone, so they need no labels to be found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import ParameterView
from clafusion.tracing.operations import SAME_VALUES, bound_operands, op_name

__all__ = ["find_token_hidden_units"]


def find_token_hidden_units(propagation: LabelPropagation, module: fx.GraphModule) -> None:
    """Give atoms to the units that one layer over positions writes and such layers alone read.

    Parameters
    ----------
    propagation
        A run on labels that is at its end. The values between the layers get the units' labels.
    module
        The graph.
    """
    entries = {
        node: label.name
        for node, label in propagation.labels.items()
        if node.op == "placeholder" and isinstance(label, ParameterView)
    }
    weighed = {use.name for use in propagation.uses.values() if use.role != "element"}
    users = Counter(name for one, name in entries.items() for _ in one.users)
    # What else reads a bias would not move with the units.
    biases = {one for one, count in users.items() if count == 1} - propagation.buffers
    for node in module.graph.nodes:
        weight = _weight_over_positions(propagation, node, entries, weighed)
        if weight is None:
            continue
        between = list(_between(node))
        readers = [user for one in between for user in one.users if user not in between]
        weights = [_weight_over_positions(propagation, one, entries, weighed) for one in readers]
        are_read = all(
            other is not None
            and bound_operands(one)["input"] in between
            and _is_convolution(one) == _is_convolution(node)  # else it reads another axis
            and other.tensor.size(1) == weight.tensor.size(0)
            for one, other in zip(readers, weights, strict=True)
        )
        given = bound_operands(node).get("bias")
        bias = entries.get(given)
        if not readers or not are_read or (given is not None and bias not in biases):
            continue
        atoms = propagation.fresh(weight.tensor.size(0))
        propagation.weigh(weight, "weight", {0: atoms})
        if bias is not None:
            propagation.forget_elements(bias)
            propagation.scale(ParameterView(bias, propagation.state[bias]), atoms)
        for other in weights:
            if other is not None:
                propagation.weigh(other, "weight", {1: atoms}, inward=[1])
        for one in between:
            label = propagation.labels[one]
            assert isinstance(label, Tensor)
            axis = 1 if _is_convolution(node) else label.dim() - 1
            shape = [-1 if i == axis else 1 for i in range(label.dim())]
            propagation.labels[one] = atoms.view(shape).expand(label.shape)
            propagation.crossed.add(one)


def _weight_over_positions(
    propagation: LabelPropagation,
    node: fx.Node,
    entries: Mapping[fx.Node, str],
    weighed: set[str],
) -> ParameterView | None:
    """Return the weight of a layer that mixes positions of channels, which no label met."""
    if node.op != "call_function" or op_name(node) not in ("linear", "conv1d", "conv2d"):
        return None
    bound = bound_operands(node)
    name = entries.get(bound["weight"])
    if name is None or name in weighed or name in propagation.buffers:
        return None
    tensor = propagation.state[name]
    if tensor[0, 0].numel() > 1 or bound.get("groups", 1) != 1 or tensor.size(0) < 2:
        return None
    if len([user for one, of in entries.items() if of == name for user in one.users]) > 1:
        return None
    return ParameterView(name, tensor)


def _is_convolution(node: fx.Node) -> bool:
    """Say whether a layer reads and writes axis 1, and not the last one."""
    return op_name(node).startswith("conv")


def _between(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a layer's node and the elementwise operations that take nothing but its output."""
    yield node
    for user in node.users:
        is_pointwise = (
            isinstance(user.target, torch._ops.OpOverload)
            and torch.Tag.pointwise in user.target.tags
        )
        if (is_pointwise or op_name(user) in SAME_VALUES) and user.all_input_nodes == [node]:
            yield from _between(user)
