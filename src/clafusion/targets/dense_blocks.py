"""Dense blocks of other lengths: the shorter ones get layers that nothing reads.

A layer of a dense block (DenseNet) puts its channels beside all those before it. A network without
it has no value that could flow past in its place, but a layer whose readers' columns are zero
changes nothing. So a network whose blocks are shorter than another one's is completed before the
two are aligned: each block gets copies of its last layer, and what reads the block gets columns of
zeros for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from clafusion.targets.completing import own_state, with_more_children
from clafusion.tracing.model import ChannelGroup, TracedModel

__all__ = ["with_equal_dense_blocks"]


@dataclass(frozen=True)
class _Block:
    """A container whose children are the layers of a dense block.

    Attributes
    ----------
    path
        Its path.
    keys
        The names of its children, in order.
    written
        For each child the channel group that it puts beside the others.
    """

    path: str
    keys: tuple[str, ...]
    written: tuple[int, ...]


def with_equal_dense_blocks(models: Sequence[TracedModel]) -> list[TracedModel]:
    """Complete the dense blocks that are shorter than those of another network.

    Blocks correspond by the paths of their modules. A network that would compute something else
    stays as it is, and so do all where none has dense blocks.
    """
    blocks = [{one.path: one for one in _dense_blocks(model)} for model in models]
    wanted: dict[str, tuple[str, ...]] = {}
    for of_model in blocks:
        for path, one in of_model.items():
            wanted[path] = max(wanted.get(path, ()), one.keys, key=len)
    found = []
    for model, of_model in zip(models, blocks, strict=True):
        shorter = {
            one: wanted[path]
            for path, one in of_model.items()
            if len(one.keys) < len(wanted[path]) and wanted[path][: len(one.keys)] == one.keys
        }
        found.append(_completed(model, shorter) if shorter else model)
    return found


def _dense_blocks(model: TracedModel) -> list[_Block]:
    """Return the containers of which each child's channels are read by all children behind it."""
    found = []
    for path, module in model.model.named_modules():
        keys = tuple(module._modules)
        if len(keys) < 2 or not _is_container(module):
            continue
        prefixes = [_prefix(path, key) for key in keys]
        written: list[int] = []
        for prefix in prefixes:
            groups = _written(model, prefix)
            if len(groups) != 1 or groups[0] in written:  # a residual block writes to the stream
                break
            written += groups
        if len(written) == len(keys) and all(
            _reads(model.groups[written[i]], prefixes[j])
            for i, j in combinations(range(len(keys)), 2)
        ):
            found.append(_Block(path, keys, tuple(written)))
    return found


def _prefix(path: str, key: str) -> str:
    """Return how the names of a child's parameters begin."""
    return f"{path}.{key}." if path else f"{key}."


def _is_container(module: nn.Module) -> bool:
    """Say whether a module holds nothing but children of one class."""
    classes = {type(child) for child in module.children()}
    return len(classes) == 1 and not module._parameters and not module._buffers


def _written(model: TracedModel, prefix: str) -> list[int]:
    """Return the channel groups that weights of a child write and others read."""
    found = []
    for group in model.groups:
        inside = [one for one in group.axes if one.use.parameter.startswith(prefix)]
        outside = [one for one in group.axes if not one.use.parameter.startswith(prefix)]
        is_written = any(one.direction == "out" and len(one.use.size) > 1 for one in inside)
        if is_written and any(one.direction == "in" for one in outside):
            found.append(group.index)
    return found


def _reads(group: ChannelGroup, prefix: str) -> bool:
    return any(one.direction == "in" and one.use.parameter.startswith(prefix) for one in group.axes)


def _completed(model: TracedModel, shorter: Mapping[_Block, Sequence[str]]) -> TracedModel:
    """Return a network whose blocks have layers of all the names, or itself if that changes it."""
    state = own_state(model)
    additions = {}
    for block, keys in shorter.items():
        last, more = block.keys[-1], keys[len(block.keys) :]
        own = _grown_child(model, block, state)
        group = model.groups[block.written[-1]]
        _widen_readers(group, _prefix(block.path, last), len(more), state)
        for place, key in enumerate(more, 1):
            for name, (value, axes) in own.items():
                for axis, is_norm in axes:
                    value = _with_more(value, axis, value.size(axis), place * group.size, is_norm)
                state[_prefix(block.path, key) + name] = value
        additions[block.path] = dict.fromkeys(more, last)
    return with_more_children(model, additions, state) or model


_Axes = list[tuple[int, bool]]


def _grown_child(
    model: TracedModel, block: _Block, state: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, _Axes]]:
    """Return the last child's entries, with the axes of the channels that it reads from outside.

    Of each axis is said whether it belongs to a norm's vector, not to a weight.
    """
    prefix = _prefix(block.path, block.keys[-1])
    read = {
        group.index
        for group in model.groups
        if any(not one.use.parameter.startswith(prefix) for one in group.axes)
    } - {block.written[-1]}
    found = {}
    for name, value in state.items():
        if name.startswith(prefix):
            axes = {
                (one.axis, len(one.use.size) == 1)
                for group, one in model.axes_by_parameter.get(name, ())
                if group.index in read
            }
            found[name.removeprefix(prefix)] = value, sorted(axes)
    return found


def _widen_readers(group: ChannelGroup, writer: str, count: int, state: dict[str, Tensor]) -> None:
    """Give all that reads a layer's channels as many more, ``count`` times, behind them.

    ``writer`` is how the names of the layer's own parameters begin.
    """
    for one in group.axes:
        name = one.use.parameter
        if not name.startswith(writer):
            # A channel may stand for several positions, one behind the other.
            more = count * one.positions.numel()
            place = int(one.positions.max()) + 1
            is_norm = len(one.use.size) == 1
            state[name] = _with_more(state[name], one.axis, place, more, is_norm)


def _with_more(value: Tensor, axis: int, place: int, count: int, is_norm: bool) -> Tensor:
    """Return a tensor with more entries on an axis: zeros, or what a norm has at the ones before.

    Parameters
    ----------
    value
        The tensor.
    axis, place, count
        Where they come, and how many.
    is_norm
        Whether it is a norm's vector. A norm's entries must not be zero, for it divides by them.
    """
    before, after = (
        value.narrow(axis, 0, place),
        value.narrow(axis, place, value.size(axis) - place),
    )
    if is_norm:
        index = torch.arange(place - count, place, device=value.device) % place
        more = value.index_select(axis, index)
    else:
        more = value.new_zeros([count if i == axis else n for i, n in enumerate(value.shape)])
    return torch.cat([before, more, after], axis)
