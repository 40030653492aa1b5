"""Put what a file holds into a model; torch's own strict loading decides whether it fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from clafusion.errors import FusionWarning, InputError, warn
from clafusion.execution.layouts import axes_in_memory, laid_out
from clafusion.tracing.architecture import digest_of_values
from clafusion.tracing.ties import aliases_of
from clafusion.weights.checkpoints import (
    StoredState,
    choose,
    named_for,
    ranked,
    states_in,
)
from clafusion.weights.messages import listed, one_line
from clafusion.weights.values import unlike_values, unusable_values

__all__ = ["check_materialised", "model_with", "put_state"]

_Mark: TypeAlias = "tuple[int, int, bytes]"


def model_with(
    build: Callable[[], nn.Module],
    content: Any,
    key: str | None,
    path: str,
    factory: str,
    *,
    assign: bool = False,
) -> nn.Module:
    """Return a new model with a state dict that a file holds.

    Of several state dicts, and of the prefixes that names may have, those are taken that make the
    names fit. What ``load_state_dict`` accepts fits: a module's own hooks are called.

    Parameters
    ----------
    build
        Makes a new model.
    content
        What the file holds.
    key
        Which of the state dicts in it, as for :func:`clafusion.weights.checkpoints.load_state`.
    path, factory
        What errors call the file and the model.
    assign
        Whether the model gets the file's own tensors, where they are of its types, instead of
        copies; ``build`` may then leave its parameters on the meta device.

    Raises
    ------
    InputError
        The file holds no state dict, none that fits, or several that do; or the model is lazy or
        on the meta device. The message lists the missing names, the unexpected names, and the
        shapes and kinds of numbers that differ.
    """
    called = f"checkpoint {path!r}"
    states = states_in(content, key, called)
    model = build()
    if not assign:
        check_materialised(model, f"factory {factory!r}")
    fits = [one for one in _distinct(_named(states, model)) if _names_fit(model, one)]
    if fits:
        problems = put_state(model, choose(fits, called), called, assign=assign)
        if not problems:
            return model
    else:
        likely = ranked(states)
        guesses = list(_distinct(_named(likely, model)))
        for guess in guesses:  # perhaps the model's own hooks rename what they load
            if not put_state(model, guess, called, assign=assign):
                choose([guess], called)  # which warns of what was left out
                return model
            model = build()  # without what the failed attempt has left
        told = min(guesses, key=lambda one: _misfits(model, one))
        problems = put_state(model, told, called, assign=assign)
    raise InputError(f"{path!r} does not fit {factory!r}: {'; '.join(problems)}")


def check_materialised(model: nn.Module, called: str) -> None:
    """Refuse a model whose weights have no shapes or no values yet.

    Raises
    ------
    InputError
        It is lazy, or on the meta device. The message calls it ``called``.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"{called}: {name!r} has no shape yet, as its module is lazy: run the model once "
                "on a batch before the factory returns it"
            )
        if tensor.is_meta:
            raise InputError(
                f"{called}: {name!r} is on the meta device, which holds no values: build the model "
                "without torch.device('meta')"
            )


def put_state(
    model: nn.Module, state: StoredState, called: str = "the file", *, assign: bool = False
) -> list[str]:
    """Load a state dict into a model in place; return what keeps it from fitting, in words.

    After a problem the model may hold a part of the state dict. With ``assign`` it holds the state
    dict's own tensors, where they are of its types.

    Warns
    -----
    FusionWarning
        The model's own hooks say nothing of parameters that ``called``, the file, lacks, and that
        keep the values which they had. Not where some have no values, on the meta device.
    """
    problems = unusable_values(state.entries)
    if problems:
        return problems
    unlike = unlike_values(model, state.entries)
    entries: Any = OrderedDict(_typed(model, state.entries) if assign else state.entries)
    ties = aliases_of(model) if assign else {}
    if state.versions is not None:
        entries._metadata = state.versions
    before = _lacking(model, state.entries)
    try:
        found = model.load_state_dict(entries, strict=False, assign=assign)
    except Exception as error:  # of another shape, or a hook's own error
        differences = _differences(model, state.entries)
        return [*unlike, *differences] or [one_line(error)]
    lost = _tied_again(model, ties, state.entries)
    missing = _needed(model, getattr(found, "missing_keys", ()), state.entries)
    unexpected = getattr(found, "unexpected_keys", ())
    problems = [*unlike, *lost, *_counted(missing, unexpected, ())]
    if missing or unexpected:
        return problems
    problems += _overwritten(model, state.entries)
    return problems or _unloaded(model, before, called)


def _typed(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries in the types that a model has for them, laid out in memory as its own."""
    own = model.state_dict()

    def typed(name: str, value: Any) -> Any:
        known = own.get(name)
        if not isinstance(value, Tensor) or not isinstance(known, Tensor):
            return value
        value = value.to(known.dtype)
        axes = axes_in_memory(known) if value.dim() == known.dim() else None
        return value if axes is None else laid_out(value, axes)

    return {name: typed(name, value) for name, value in entries.items()}


def _tied_again(model: nn.Module, ties: Mapping[str, str], entries: Mapping[str, Any]) -> list[str]:
    """Tie what got tensors of its own by an assignment; return which of them differ, in words."""
    lost = []
    names: dict[str, list[str]] = {}
    for name, first in ties.items():
        names.setdefault(first, [first]).append(name)
    for tied in names.values():
        given = [name for name in tied if name in entries] or tied
        for name in given[1:] if given[0] in entries else ():
            if not torch.equal(entries[name], entries[given[0]]):
                lost.append(_untied(name, repr(given[0])))
        owner, leaf = _owner(model, given[0])
        kept = getattr(owner, leaf)
        for name in tied:
            owner, leaf = _owner(model, name)
            setattr(owner, leaf, kept)
    return lost[:1]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that has a state entry, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _untied(name: str, others: str) -> str:
    return (
        f"{name!r} and {others} are tied in the model and differ in the file: remove the one that "
        "is not meant, or give a model that does not tie them"
    )


# --- names --------------------------------------------------------------------------------------


def _named(states: Sequence[StoredState], model: nn.Module) -> Iterator[StoredState]:
    own = model.state_dict().keys()
    for one in states:
        yield from named_for(one, own)


def _distinct(states: Iterator[StoredState]) -> Iterator[StoredState]:
    seen = set()
    for one in states:
        known = one.where, tuple(one.entries)
        if known not in seen:
            seen.add(known)
            yield one


def _names_fit(model: nn.Module, state: StoredState) -> bool:
    own = model.state_dict()
    if any(name not in own for name in state.entries):
        return False
    if _needed(model, [name for name in own if name not in state.entries], state.entries):
        return False
    return not _reshaped(own, state.entries)


def _misfits(model: nn.Module, state: StoredState) -> int:
    """Return how many names a model and a state dict do not have in common."""
    return len(model.state_dict().keys() ^ state.entries.keys())


def _needed(model: nn.Module, missing: Sequence[str], entries: Mapping[str, Any]) -> list[str]:
    """Return which of the names that a file lacks a model needs."""
    return [
        name
        for name in missing
        # Old files lack the first, and eval mode needs none.
        if not name.endswith("num_batches_tracked") and not _is_tied(model, name, entries)
    ]


def _is_tied(model: nn.Module, name: str, entries: Mapping[str, Any]) -> bool:
    """Return whether another name of the same tensor is in the file."""
    aliases = aliases_of(model)
    first = aliases.get(name, name)
    return any(
        other in entries for other in (first, *(a for a, one in aliases.items() if one == first))
    )


# --- what keeps its values ----------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what training has made of a model: its parameters, and the statistics of norms."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    norms = {path for path, one in model.named_modules() if isinstance(one, _BatchNorm)}
    for name, value in model.named_buffers(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        if path in norms and last.startswith("running_"):
            found[name] = value
    own = model.state_dict()
    return {name: value for name, value in found.items() if name in own}


def _lacking(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, tuple[Tensor, _Mark]]:
    """Return what a file lacks of a model, with what shows whether it is loaded all the same."""
    trained = _trained(model)
    names = _needed(model, [name for name in trained if name not in entries], entries)
    return {name: (trained[name], _mark(trained[name])) for name in names}


def _mark(tensor: Tensor) -> _Mark:
    # A write may leave the values as they are, or the version (through ``.data``), but hardly both.
    version = 0 if tensor.is_inference() else tensor._version
    if tensor.is_meta:
        return version, 0, b""
    return version, tensor.data_ptr(), digest_of_values(tensor)


def _unloaded(
    model: nn.Module, before: Mapping[str, tuple[Tensor, _Mark]], called: str
) -> list[str]:
    """Warn of what a file lacks and no hook has loaded; a problem if that is all of a model."""
    now = _trained(model)
    kept = [
        name
        for name, (tensor, mark) in before.items()
        if now.get(name) is tensor and _mark(tensor) == mark
    ]
    if kept and len(kept) == len(now):
        return ["the model's own loading takes nothing from it"]
    if kept and not any(now[name].is_meta for name in kept):
        several = len(kept) > 1
        warn(
            f"{called} lacks {listed(map(repr, kept))}, and the model's own loading says nothing "
            f"of it: {'they keep the values' if several else 'it keeps the value'} that the "
            "factory gave",
            FusionWarning,
        )
    return []


# --- what differs -------------------------------------------------------------------------------


def _differences(model: nn.Module, entries: Mapping[str, Any]) -> list[str]:
    """Return which names and shapes differ between a file and a model, in words."""
    own = model.state_dict()
    return _counted(
        _needed(model, [name for name in own if name not in entries], entries),
        [name for name in entries if name not in own],
        _reshaped(own, entries),
    )


def _reshaped(own: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    return [
        f"{name!r} is {_shape(entries[name])} in the file and {_shape(tensor)} in the model"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor)
        and isinstance(entries.get(name), Tensor)
        and not unusable_values({name: entries[name]})
        and tensor.shape != entries[name].shape
    ]


def _counted(
    missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str]
) -> list[str]:
    return [
        f"{len(names)} {what}: {listed(shown)}"
        for what, names, shown in (
            ("missing from the file", missing, map(repr, missing)),
            ("not in the model", unexpected, map(repr, unexpected)),
            ("of another shape", reshaped, reshaped),
        )
        if names
    ]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _overwritten(model: nn.Module, entries: Mapping[str, Any]) -> list[str]:
    """Return which entries were lost, as others lie in the same memory of the model, in words."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    of_storage: dict[int, list[str]] = {}
    for name, value in own.items():
        if name in entries and value.numel():
            of_storage.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    lost = []
    for names in of_storage.values():
        for name in names if len(names) > 1 else ():
            wanted = entries[name].to(own[name])
            if not torch.equal(torch.nan_to_num(wanted), torch.nan_to_num(own[name])):
                others = listed(repr(other) for other in names if other != name)
                lost.append(_untied(name, others))
    return lost[:1]
