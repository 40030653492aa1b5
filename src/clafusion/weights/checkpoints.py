"""Checkpoints as people have them: which state dicts a file holds, and under which names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any

from torch import Tensor

from clafusion.errors import FusionWarning, InputError, warn
from clafusion.weights.messages import listed
from clafusion.weights.state_files import EXTRA_STATE, stored_content
from clafusion.weights.values import unusable_values

__all__ = [
    "StoredState",
    "choose",
    "load_state",
    "named_for",
    "ranked",
    "states_in",
    "without_prefixes",
]

_KNOWN = ("", "state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
"""Under these keys and prefixes lies what was trained, the first before the next."""
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("n_averaged",)  # AveragedModel's, which no network needs
_DEEPEST = 4  # mappings in mappings are searched down to this depth


@dataclass(frozen=True)
class StoredState:
    """A state dict in a file.

    Attributes
    ----------
    where
        Its place: the keys that lead to it and the prefix that was taken off, joined by dots. The
        key that chooses it.
    entries
        Its entries by name: tensors, and what ``get_extra_state`` returned.
    versions
        The versions of the modules that wrote it, by their path, as ``load_state_dict`` takes them.
    left_out
        The names in the same state dict that are not among ``entries``.
    beside
        The names of tensors that lie in the file beside the state dict, in no state dict.
    """

    where: str
    entries: Mapping[str, Any]
    versions: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def below(self, prefix: str) -> StoredState:
        """Return the entries whose names have a prefix, without it."""
        versions = self.versions
        return StoredState(
            ".".join(part for part in (self.where, prefix.removesuffix(".")) if part),
            _below(self.entries, prefix),
            None if versions is None else _below({f"{k}.": v for k, v in versions.items()}, prefix),
            tuple(n for n in self.entries if not n.startswith(prefix) and n not in _COUNTERS),
            self.beside,
        )


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if name.startswith(prefix)
    }


def load_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Any]:
    """Read a state dict from a file of weights, or from the index of several.

    It loads weights only: it runs no code that a file may contain. A state dict may lie under any
    key, and keys within it. A prefix ``module.`` or ``_orig_mod.`` that all names have is taken
    off.

    Parameters
    ----------
    path
        A ``.safetensors``, ``.pt``, ``.pth``, ``.th``, ``.bin`` or ``.ckpt`` file, or the
        ``.index.json`` of a checkpoint in several files.
    key
        Which of the state dicts in the file: the keys that lead to it, joined by dots, and perhaps
        a prefix of its names, as ``"model_ema"`` or ``"state_dict.teacher"``. Default: the one
        under ``state_dict``, ``model_state_dict``, ``model``, ``net``, ``network``, ``module`` or
        ``weights``, with a warning if the file has more; else the only one.

    Returns
    -------
    dict
        Name -> tensor; what ``get_extra_state`` returned may be anything.

    Raises
    ------
    InputError
        The file is missing, unreadable, corrupt or of another kind, holds no state dict, or holds
        several of which ``key`` has to choose; or a tensor in it has no values or unusable ones.
    """
    called = f"checkpoint {str(path)!r}"
    state = choose(states_in(stored_content(path), key, called), called)
    problems = unusable_values(state.entries)
    if problems:
        raise InputError(f"{called}: {'; '.join(problems)}")
    return dict(without_prefixes(state).entries)


# --- where in the file --------------------------------------------------------------------------


def states_in(content: Any, key: str | None, called: str) -> list[StoredState]:
    """Return the state dicts in what a file holds, with the names that they have there.

    Parameters
    ----------
    content
        What the file holds.
    key
        As for :func:`load_state`: the state dicts at or below it only.
    called
        What errors call the file.

    Raises
    ------
    InputError
        There is none.
    """
    if not isinstance(content, Mapping):
        raise InputError(
            f"{called} holds a {type(content).__name__}, not a state dict (names and tensors)"
        )
    if key is not None:
        if not isinstance(key, str):
            raise InputError(f"key must be a text, the place of a state dict; got {key!r}")
        for place in _places(content, key):
            found = list(_found(place, key, 0)) if isinstance(place, Mapping) else [place]
            if found:
                return found
        raise InputError(f"{called} has no state dict {key!r}; it has {_shown(content)}")
    found = list(_found(content, "", 0))
    if not found:
        raise InputError(
            f"{called} holds no state dict: {_lack(content)}; in the program that made it, save "
            "the state dict alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    return list({id(one.entries): one for one in reversed(found)}.values())[::-1]


def _found(content: Mapping[Any, Any], where: str, depth: int) -> Iterator[StoredState]:
    if _is_state(content):
        yield StoredState(where, content, getattr(content, "_metadata", None))
    elif depth < _DEEPEST and "param_groups" not in content:  # which an optimizer has
        beside = tuple(
            f"{where}.{name}" if where else name
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, Tensor) and value.dim() > 0
        )
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                for one in _found(value, f"{where}.{name}" if where else name, depth + 1):
                    yield replace(one, beside=(*beside, *one.beside))


def _is_state(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith(EXTRA_STATE))
        for name, value in content.items()
    )


def _places(content: Mapping[Any, Any], key: str) -> Iterator[Mapping[Any, Any] | StoredState]:
    """Yield what lies at a path of keys, the last of which may be a prefix of names."""
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            if name == key:
                yield value
            elif key.startswith(f"{name}."):
                inner = key.removeprefix(f"{name}.")
                for place in _places(value, inner):
                    yield replace(place, where=key) if isinstance(place, StoredState) else place
    if _is_state(content):
        (whole,) = _found(content, "", 0)
        below = whole.below(f"{key}.")
        if below.entries:
            yield replace(below, left_out=())  # which the caller knows


def _shown(content: Mapping[Any, Any]) -> str:
    found = [repr(one.where) for one in _found(content, "", 0) if one.where]
    if _is_state(content):
        found = [repr(name) for name in dict.fromkeys(one.split(".")[0] for one in content)]
    return listed(found) or "none"


def _lack(content: Mapping[Any, Any]) -> str:
    """Say why a file's content is no state dict."""
    while True:
        inner = [content[one] for one in _KNOWN if isinstance(content.get(one), Mapping)]
        if not inner:
            break
        content = inner[0]
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    return f"not tensors: {listed(map(repr, others))}" if others else "it has no entries"


# --- which of them ------------------------------------------------------------------------------


def choose(states: Sequence[StoredState], called: str) -> StoredState:
    """Return the state dict that was most likely meant; warn if there are others.

    Raises
    ------
    InputError
        There are several, and none has a known place.
    """
    chosen, *rest = ranked(states)
    others = [one for one in rest if one.where != chosen.where]
    taken = repr(chosen.where) if chosen.where else "the whole"
    if others and _rank(chosen) == _rank(others[0]):
        raise InputError(
            f"{called} holds several state dicts "
            f"({listed(repr(one.where) for one in (chosen, *others))}): choose one by its key "
            "(key=..., --checkpoint-key)"
        )
    if others:
        warn(
            f"{called}: {taken} was taken, not "
            f"{listed([*(repr(one.where) for one in others), *map(repr, chosen.beside)])}; a key "
            "(key=..., --checkpoint-key) chooses another one",
            FusionWarning,
        )
    else:
        left = (*chosen.left_out, *chosen.beside)
        if left:
            warn(
                f"{called}: {taken} was taken; {len(left)} others were left out: "
                f"{listed(map(repr, left))}",
                FusionWarning,
            )
    return chosen


def ranked(states: Sequence[StoredState]) -> list[StoredState]:
    """Return state dicts with those first that were more likely meant."""
    return sorted(states, key=_rank)


def _rank(state: StoredState) -> tuple[int, ...]:
    """Return a place's rank; all that have an unknown part have the last."""
    parts = state.where.split(".")
    if all(part in _KNOWN for part in parts):
        return tuple(map(_KNOWN.index, parts))
    return (len(_KNOWN),)


# --- under which names --------------------------------------------------------------------------


def without_prefixes(state: StoredState) -> StoredState:
    """Take off the prefixes ``module.`` and ``_orig_mod.``, where all names have them."""
    for prefix in (*_PREFIXES, *_PREFIXES):  # either order
        below = state.below(prefix)
        if below.entries and not below.left_out:
            state = replace(below, where=state.where)
    return state


def named_for(state: StoredState, own: Collection[str]) -> Iterator[StoredState]:
    """Yield a state dict under the names that may fit a model, those in the file first.

    Parameters
    ----------
    state
        As the file has it.
    own
        The names in the model's own state dict.
    """
    yield state
    entries = {_WRAPPERS.sub("", name): value for name, value in state.entries.items()}
    if entries.keys() != state.entries.keys() and len(entries) == len(state.entries):
        versions = state.versions and {
            _WRAPPERS.sub("", f"{k}.").removesuffix("."): v for k, v in state.versions.items()
        }
        state = replace(state, entries=entries, versions=versions)
        yield state
    if not own:
        return
    anchor = max(own, key=lambda name: name.count("."))  # which few other names end with
    prefixes = [name.removesuffix(anchor) for name in entries if name.endswith(f".{anchor}")]
    ends = zip(min(entries).split(".")[:-1], max(entries).split(".")[:-1], strict=False)
    shared = (f"{one}." for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    for prefix in dict.fromkeys([*sorted(prefixes, key=len), *accumulate(shared)]):
        yield state.below(prefix)
    parts = anchor.split(".")[:-1]
    for i in range(1, len(parts) + 1):  # the file may be that of the network inside the model
        prefix = ".".join(parts[:i]) + "."
        if not all(name.startswith(prefix) for name in own):
            break
        added = {f"{prefix}{name}": value for name, value in state.entries.items()}
        yield replace(state, entries=added, versions=None)
