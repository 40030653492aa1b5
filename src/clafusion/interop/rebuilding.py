"""What builds a fused network again from its file of weights: a factory, a config or a program."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clafusion.config import Like
from clafusion.errors import ClafusionError, FusionWarning, InputError, warn
from clafusion.interop.configs import config_of
from clafusion.interop.huggingface import is_of_transformers, transformers_library
from clafusion.interop.programs import PROGRAM, load_program, save_program
from clafusion.tracing.copies import copied
from clafusion.weights.build import fill
from clafusion.weights.checkpoints import StoredState
from clafusion.weights.factories import build_model, model_without_weights, origin_of
from clafusion.weights.fitting import put_state
from clafusion.weights.messages import listed, one_line
from clafusion.weights.round_trip import check_round_trip, compare_models
from clafusion.weights.state_files import stored_content
from clafusion.weights.storage import InMemory

if TYPE_CHECKING:
    from clafusion.results import FusionResult

__all__ = [
    "Architecture",
    "architecture_of",
    "built_again",
    "check_of",
    "example_of_result",
    "filled_copy",
    "of_factory",
    "of_transformers",
    "program_beside",
    "program_path",
]

_KNOWN = re.compile(
    r"(timm:create_model|torchvision\.models:get_model)\((?P<quote>['\"])[\w./-]+(?P=quote)\)"
)
"""Factories of libraries, which a file may name without being trusted."""


@dataclass(frozen=True)
class Architecture:
    """What builds a network again.

    Attributes
    ----------
    kind
        ``"factory"``, ``"transformers"``, ``"program"``, or ``"none"`` where nothing does.
    text
        The factory, the class's name, the program's file, or why nothing does.
    resized
        Whether the widths are others than the factory's.
    config
        Of a network of transformers its config, as plain data.
    """

    kind: str
    text: str
    resized: bool = False
    config: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.text} with other widths" if self.resized else self.text

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        found = {"kind": self.kind, self.kind: self.text, "resized": self.resized}
        return found if self.config is None else {**found, "config": dict(self.config)}


# --- of a result --------------------------------------------------------------------------------


def architecture_of(result: FusionResult, state: Mapping[str, Any], path: Path) -> Architecture:
    """Find what builds a result's network again; an exported program is written for it.

    Factories are those of the template, of the parent that gives the structure and of the others,
    where the parents were made by them. One counts that makes a network of the same names; of other
    widths only if it then computes what the result computes.

    Parameters
    ----------
    result
        The result.
    state
        What is to be written.
    path
        Where to; a program is written beside it.

    Raises
    ------
    InputError
        The program cannot be written.

    Warns
    -----
    FusionWarning
        Nothing builds it again.
    """
    for factory in _factories(result):
        found = of_factory(result, factory, state)
        if found is not None:
            return found
    found = of_transformers(result.model)
    return found or program_beside(path, result.model, example_of_result(result), "fused")


def of_transformers(model: nn.Module) -> Architecture | None:
    """Return the architecture of a network of transformers, which is its config; else None."""
    if not is_of_transformers(model):
        return None
    try:
        config = config_of(model)
    except InputError:  # no config describes it
        return None
    facts = json.loads(config.to_json_string(use_diff=False))
    facts["_name_or_path"] = ""
    return Architecture("transformers", type(model).__name__, config=facts)


def program_beside(
    path: Path,
    model: nn.Module,
    example: tuple[tuple[Tensor, ...], tuple[str, ...]] | None,
    made: str,
) -> Architecture:
    """Write an exported program beside a file of weights, and return it as the architecture.

    Parameters
    ----------
    path
        The file of weights.
    model
        The network.
    example
        Inputs that it takes, and their names where it takes them by keyword; None for none.
    made
        What was done to get it: "fused" or "merged".

    Raises
    ------
    InputError
        The program cannot be written.

    Warns
    -----
    FusionWarning
        Nothing builds the network again.
    """
    reason = f"the network was {made} as a module, without inputs to export it with"
    if example is not None:
        program = program_path(path)
        try:
            save_program(model, *example, program)
        except InputError:
            raise
        except ClafusionError as error:
            reason = f"the network cannot be exported ({one_line(error)})"
        else:
            return Architecture("program", program.name)
    warn(
        f"{str(path)!r} holds weights alone, which only the code that you {made} by can load: "
        f"{reason}",
        FusionWarning,
    )
    return Architecture("none", reason)


def program_path(path: Path) -> Path:
    """Return where the program beside a file of weights lies."""
    return path.with_name(
        path.name.partition(".safetensors")[0].removesuffix(path.suffix) + PROGRAM
    )


def _factories(result: FusionResult) -> list[str]:
    """Return the factories that may have made the result's structure, the likeliest first."""
    modules: list[Any] = []
    target = result.config.target
    if isinstance(target, Like):
        modules.append(target.template)
    modules.append(result.problem.target.model)
    for step in result.steps or (result,):
        aligned = step.aligned
        traced = [one.traced.model for one in aligned.profiles]
        modules += [traced[aligned.reference], *traced]
    origins = [origin_of(one) for one in modules if isinstance(one, nn.Module)]
    return list(dict.fromkeys(one.factory for one in origins if one is not None))


def of_factory(result: FusionResult, factory: str, state: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of a factory; None if it does not make the result's network.

    It does if the names are the same, and of other widths if it then computes what the result
    computes.
    """
    lean = not isinstance(result.problem.storage, InMemory)
    try:
        fresh = (model_without_weights if lean else build_model)(factory)
    except ClafusionError:
        return None
    own = fresh.state_dict()
    if own.keys() != state.keys():
        return None
    if _shapes(own) == _shapes(state):
        return Architecture("factory", factory)
    try:
        fresh = build_model(factory) if lean else fresh
        fill(fresh, state)
        example = example_of_result(result)
        compare_models(result.model, fresh, *example, called=repr(factory), state=state)
    except ClafusionError:  # a width is fixed in its code
        return None
    return Architecture("factory", factory, resized=True)


def check_of(result: FusionResult, found: Architecture) -> Any:
    """Return the check of what is written, for a factory whose own widths these are; else None."""
    if found.kind != "factory" or found.resized:
        return None
    lean = not isinstance(result.problem.storage, InMemory)
    build = partial(model_without_weights if lean else build_model, found.text)

    def check(state: Mapping[str, Any]) -> None:
        inputs, names = example_of_result(result)
        called = repr(found.text)
        check_round_trip(result.model, state, build, inputs, names, called=called, assign=lean)

    return check


def example_of_result(result: FusionResult) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return example inputs of a result, and their names where it takes them by keyword."""
    aligned = (result.steps or (result,))[0].aligned
    traced = aligned.profiles[aligned.reference].traced
    return traced.example_inputs, traced.keywords


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(one, "shape", None) for name, one in state.items()}


# --- of a file ----------------------------------------------------------------------------------


def built_again(path: Path, facts: Mapping[str, Any], *, trust_code: bool) -> nn.Module:
    """Return the network of which ``path`` holds the weights, in eval mode.

    Parameters
    ----------
    path
        The file of weights.
    facts
        What :meth:`Architecture.to_dict` returned.
    trust_code
        Whether a factory that the file names may be run.

    Raises
    ------
    InputError
        The file names code and is not trusted, nothing is known that builds the network, or the
        weights do not fit.
    """
    kind = facts.get("kind")
    text = str(facts.get(str(kind)))
    if kind == "program":
        return load_program(path.with_name(Path(text).name))
    if kind == "factory":
        if not (trust_code or _KNOWN.fullmatch(text)):
            raise InputError(
                f"{str(path)!r} says that {text!r} makes its network, and a file may name any "
                "code: if you trust that one, give trust_code=True"
                + (
                    ""
                    if facts.get("resized")
                    else f", or name it yourself: load({text!r}, {str(path)!r})"
                )
            )
        model = build_model(text)
    elif kind == "transformers":
        model = _of_transformers(path, text, facts)
    else:
        raise InputError(f"{str(path)!r} holds weights alone: {text}")
    state = stored_content(path)
    if facts.get("resized"):
        _fill_all(model, state, path, repr(text))
    else:
        problems = put_state(model, StoredState("", state), repr(str(path)))
        if problems:
            raise InputError(f"{str(path)!r} does not fit {text!r}: {'; '.join(problems)}")
    return model.eval()


def filled_copy(model: nn.Module, path: Path) -> nn.Module:
    """Return a copy of a module with the weights in ``path``, in their widths, in eval mode.

    Raises
    ------
    InputError
        The file cannot be read, or has weights of other names than the module.
    """
    built = copied(model)
    _fill_all(built, stored_content(path), path, f"the {type(model).__name__} given")
    return built.eval()


def _fill_all(model: nn.Module, state: Mapping[str, Any], path: Path, called: str) -> None:
    own = model.state_dict().keys()
    unlike = [*(one for one in own if one not in state), *(one for one in state if one not in own)]
    if unlike:
        raise InputError(
            f"{str(path)!r} does not fit {called}: {listed(map(repr, unlike))} are in one of them "
            "only"
        )
    fill(model, state)


def _of_transformers(path: Path, name: str, facts: Mapping[str, Any]) -> nn.Module:
    library = transformers_library()
    found = getattr(library, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel)):
        raise InputError(f"{str(path)!r}: transformers has no network {name!r}")
    kind: Any = found
    config = kind.config_class.from_dict(dict(facts["config"]))
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = kind(config)
    return model
