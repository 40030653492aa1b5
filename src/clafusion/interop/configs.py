"""The config of a fused network: what its module has become, so that it can be built again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clafusion.errors import InputError
from clafusion.weights.messages import listed, one_line

__all__ = ["config_of"]

_LAYERS, _HIDDEN, _HEADS = "num_hidden_layers", "hidden_size", "num_attention_heads"
_KEY_HEADS, _HEAD_WIDTH, _KINDS = "num_key_value_heads", "head_dim", "layer_types"


def config_of(model: nn.Module) -> Any:
    """Return a config from which the library builds a network of the same shapes.

    It is the network's own, with other numbers of layers, channels and heads where the network has
    other ones. Whether that network also computes the same is another question.

    Raises
    ------
    InputError
        No such config is found, as where every layer has another width.
    """
    own: Any = model.config
    config = copy.deepcopy(own)
    config.architectures = [type(model).__name__]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    wanted = {name: tuple(one.shape) for name, one in model.named_parameters()}
    found = _shapes(model, config)
    if found == wanted:
        return config
    while (nearer := _nearest(model, config, wanted, found)) is not None:
        config, found = nearer
        if found == wanted:
            return config
    names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    first = names[0]
    raise InputError(
        f"no config of {type(model).__name__} describes the fused network: {listed(names)} differ. "
        f"{first!r} has the shape {wanted.get(first, 'of nothing')}, and the nearest config gives "
        f"{found.get(first, 'nothing')}. Fuse into the widths of one parent (width='own'), or save "
        "the weights alone into a file (.safetensors)"
    )


def _nearest(
    model: nn.Module,
    config: Any,
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> tuple[Any, dict[str, tuple[int, ...]]] | None:
    """Return that of all changes of a config which brings it the nearest, and its shapes.

    None where no change brings it nearer; of equals the first.
    """
    best, least = None, _apart(found, wanted)
    for change in _changes(model, config, wanted, found):
        tried = copy.deepcopy(config)
        try:
            _apply(tried, change)
            shapes = _shapes(model, tried)
        except Exception:  # a class checks its numbers in its own way, and this is no config for it
            continue
        apart = _apart(shapes, wanted)
        if apart < least:
            best, least = (tried, shapes), apart
        if apart == 0:
            break
    return best


def _shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a new network; it takes no memory."""
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(config))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be built from its config: {one_line(error)}"
        ) from error
    return {name: tuple(one.shape) for name, one in fresh.named_parameters()}


def _apart(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> int:
    return sum(found.get(name) != wanted.get(name) for name in {*found, *wanted})


def _changes(
    model: nn.Module,
    config: Any,
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> Iterator[dict[str, int]]:
    """Yield changes of a config that may bring it nearer to the shapes, the most telling first."""
    lengths = {len(one) for one in model.modules() if isinstance(one, nn.ModuleList)}
    for name, count in _numbers(config):
        if "layer" in name:
            for length in sorted(lengths - {count}, reverse=True):
                yield {name: length}
    pairs = {
        (old, new)
        for name in wanted.keys() & found.keys()
        if len(wanted[name]) == len(found[name])
        for old, new in zip(found[name], wanted[name], strict=True)
        if old != new
    }
    hidden, heads = getattr(config, _HIDDEN, None), getattr(config, _HEADS, None)
    width = getattr(config, _HEAD_WIDTH, None)
    if isinstance(hidden, int) and isinstance(heads, int) and not isinstance(width, int):
        width = hidden // heads
    named = dict(_numbers(config))
    for old, new in sorted(pairs):
        if hidden == old and isinstance(width, int) and new % width == 0:
            # The network computes with heads of the width that they had.
            yield {_HIDDEN: new, **_of_heads(config, new // width, width)}
        if hidden == old:
            yield {_HIDDEN: new}
    for old, new in sorted(pairs):
        if isinstance(width, int) and isinstance(heads, int) and new % width == 0:
            if heads * width == old:
                yield _of_heads(config, new // width, width)
            keys = getattr(config, _KEY_HEADS, None)
            if isinstance(keys, int) and keys * width == old:
                yield {_KEY_HEADS: new // width}
        yield from ({name: new} for name, value in named.items() if value == old > 1)
        yield from ({name: new} for name in _open_widths(config))


def _of_heads(config: Any, heads: int, width: int) -> dict[str, int]:
    """Return a number of heads, with as many queries' heads for each key's as before.

    Of an encoder and a decoder with as many heads both get it.
    """
    own = config.num_attention_heads
    change = {_HEADS: heads}
    alike = (name for name, one in _numbers(config) if one == own)
    change |= dict.fromkeys((name for name in alike if name.endswith("attention_heads")), heads)
    keys = getattr(config, _KEY_HEADS, None)
    if isinstance(keys, int) and keys * heads % own == 0:
        change[_KEY_HEADS] = keys * heads // own
    if isinstance(getattr(config, _HEAD_WIDTH, None), int):
        change[_HEAD_WIDTH] = width
    return change


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield a config's own whole numbers, those that are called as widths first."""
    numbers = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    }
    yield from sorted(
        numbers.items(),
        key=lambda one: not any(part in one[0] for part in ("size", "dim", "inner", "embd")),
    )


def _open_widths(config: Any) -> Iterator[str]:
    """Yield widths that the config leaves to the class, as GPT-2's inner one."""
    for name, value in config.to_dict().items():
        if value is None and name in ("n_inner", "intermediate_size", "ffn_dim"):
            yield name


def _apply(config: Any, change: dict[str, int]) -> None:
    before = getattr(config, _LAYERS, None)
    for name, value in change.items():
        if "layer" in name and "decoder" not in name and getattr(config, name) == before:
            setattr(config, _LAYERS, value)  # some configs hold it under two names
        setattr(config, name, value)
    count, kinds = getattr(config, _LAYERS, None), getattr(config, _KINDS, None)
    if isinstance(kinds, list) and len(set(kinds)) == 1 and isinstance(count, int):
        setattr(config, _KINDS, kinds[:1] * count)
