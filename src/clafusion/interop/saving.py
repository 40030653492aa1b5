"""A result -> a directory that ``from_pretrained`` reads, or a file of weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clafusion.errors import InputError, check_type
from clafusion.execution.lazy import LazyState
from clafusion.interop.configs import config_of
from clafusion.interop.huggingface import (
    ModelDirectory,
    config_as_stored,
    is_of_transformers,
    quiet,
    read_back,
    tokens_directory,
)
from clafusion.interop.model_card import is_model_card, model_card
from clafusion.interop.programs import PROGRAM, save_program
from clafusion.interop.rebuilding import (
    Architecture,
    architecture_of,
    check_of,
    example_of_result,
    program_path,
)
from clafusion.interop.records import METADATA, check_companions, record_of, recording
from clafusion.interop.tokenizers import check_same_labels, check_same_vocabulary
from clafusion.tracing.copies import copied
from clafusion.weights.atomic import (
    check_output,
    check_parent,
    making_directory,
    path_of,
    removed_on_error,
)
from clafusion.weights.build import fill
from clafusion.weights.messages import listed, one_line
from clafusion.weights.round_trip import compare_models
from clafusion.weights.state_files import (
    WRITABLE,
    in_type,
    save_model,
    state_of,
    weight_type,
)

if TYPE_CHECKING:
    from clafusion.results import FusionResult

__all__ = ["check_directory", "save_directory", "save_pair", "save_result"]

_PROCESSORS = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "spm",
    "chat_template",
    "preprocessor_config",
    "processor_config",
    "video_preprocessor_config",
    "image_processor",
    "normalizer",
)
_SHARD = "5GB"  # of a file of weights, at the most
_GENERATION = "generation_config.json"
_HALF = (torch.bfloat16, torch.float16)


def save_result(
    result: FusionResult,
    path: str | os.PathLike[str],
    *,
    processor_of: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = _SHARD,
    command: str | None = None,
) -> str:
    """Write what :meth:`clafusion.FusionResult.save` says; return what builds the network."""
    path = path_of(path, "path")
    check_type(command, (str, type(None)), "command", "text")
    is_file = path.name.lower().endswith((*WRITABLE, PROGRAM))
    if is_file:
        if processor_of is not None:
            raise InputError(
                f"processor_of={processor_of!r} is for a directory; {str(path)!r} is a file of "
                "weights"
            )
        return _save_file(result, path, dtype, command)
    if not is_of_transformers(result.model):
        raise _no_directory(result.model, path)
    check_directory(path, "path")
    parents = _parents(result)
    source = _processor_source(result, parents, processor_of)
    known = {name: one for name, one in map(_with_directory, parents.items()) if one is not None}
    check_same_vocabulary(known)
    of_library = {name: one for name, one in parents.items() if is_of_transformers(one)}
    check_same_labels({name: config_as_stored(one) for name, one in of_library.items()})
    model = _typed(result.model, dtype)
    config = config_of(model)
    with making_directory(path, "path") as made:
        _write(model, config, made, max_shard_size)
        if source is not None:
            _copy_processor(source, made)
        card = model_card(result, parents, config, made, command)
        (made / "README.md").write_text(card, encoding="utf-8")
        _check(result, model, made, path)
    return type(model).__name__


def _save_file(
    result: FusionResult, path: Path, dtype: str | torch.dtype | None, command: str | None
) -> str:
    """Write a file of weights or a program, and the record beside it."""
    check_output(path, (*WRITABLE, PROGRAM), "path")
    check_companions(path, "path")
    is_program = path.name.lower().endswith(PROGRAM)
    if is_program and dtype is not None:
        raise InputError(
            f"dtype={str(dtype)!r} is for files of weights; {str(path)!r} is a program, which "
            "computes in the network's own type"
        )
    made = {"command": command, "seconds": dict(result.timings)}
    if is_program:
        traced = result.problem.target
        architecture = Architecture("program", path.name)
        with recording(record_of(result, architecture) | made, path):
            save_program(result.model, traced.example_inputs, traced.keywords, path)
        return str(architecture)
    if dtype is not None:
        result = _rounded(result, weight_type(dtype, "dtype"))
    with removed_on_error(program_path(path)):
        architecture = architecture_of(result, state_of(result.model), path)
        record = record_of(result, architecture)
        check = check_of(result, architecture)
        metadata = {METADATA: json.dumps(record, allow_nan=False)}
        with recording(record | made, path):
            save_model(result.model, path, check, dtype=dtype, metadata=metadata)
    return str(architecture)


def _rounded(result: FusionResult, dtype: torch.dtype) -> FusionResult:
    """Return a result with the weights that the written ones will be, in the models' own types."""
    model = result.model
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    narrow = in_type({name: one.detach() for name, one in own.items()}, dtype)
    state = LazyState(own, lambda name: narrow[name].to(own[name].dtype))
    return replace(result, model=result.problem.storage.model(model, state, {}))


def save_pair(state: Mapping[str, Any], kind: ModelDirectory, path: Path, card: str) -> None:
    """Write fused weights as a directory, of the architecture of another one.

    Tokenizer, processor and generation config are that one's. A directory that an earlier fusion
    wrote is replaced.

    Parameters
    ----------
    state
        The weights.
    kind
        The parent whose structure they have, perhaps with other widths.
    path
        The directory.
    card
        The text of its README.md.

    Raises
    ------
    InputError
        There is something else; no config describes the network; or it would not come back.
    """
    if path.is_dir() and is_model_card(path / "README.md"):
        shutil.rmtree(path)
    check_directory(path, "out_dir:")
    model = kind.build()
    fill(model, state)
    types = (one.dtype for one in state.values() if isinstance(one, Tensor))
    model = model.to(next((one for one in types if one.is_floating_point), torch.float32))
    _write_checked(model, path, "out_dir", Path(kind.path), card, _SHARD)


def save_directory(
    model: nn.Module,
    path: Path,
    source: Path | None,
    card: str,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = _SHARD,
) -> None:
    """Write a network of transformers as a directory, and read it afresh.

    Parameters
    ----------
    model
        The network.
    path
        The directory, which is not there yet or empty.
    source
        The directory whose tokenizer, processor and generation config it gets; None for none.
    card
        The text of its README.md.
    dtype, max_shard_size
        As for :meth:`clafusion.FusionResult.save`.

    Raises
    ------
    InputError
        As for that method.
    """
    if not is_of_transformers(model):
        raise _no_directory(model, path)
    check_directory(path, "path")
    _write_checked(_typed(model, dtype), path, "path", source, card, max_shard_size)


def _write_checked(
    model: nn.Module,
    path: Path,
    argument: str,
    source: Path | None,
    card: str,
    max_shard_size: str | int,
) -> None:
    """Write a directory with all that belongs into it; refuse one that loses weights.

    Errors call the path ``argument``.
    """
    config = config_of(model)
    with making_directory(path, argument) as made:
        _write(model, config, made, max_shard_size)
        if source is not None:
            _copy_processor(source, made)
        (made / "README.md").write_text(card, encoding="utf-8")
        _check_weights(model, read_back(type(model), made, config.dtype), path)


def _no_directory(model: nn.Module, path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} would be a Hugging Face directory, and {type(model).__name__} is no "
        f"network of transformers: give a file ({', '.join(WRITABLE)})"
    )


def check_directory(path: Path, what: str) -> None:
    """Refuse a directory that a result cannot become.

    Raises
    ------
    InputError
        It is there and not empty, or is a file, or its parent is missing or may not be written to.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{what} {str(path)!r} is a file: give a directory that is not there yet")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"{what} {str(path)!r} exists and is not empty: give another name, or remove it; "
            "nothing is overwritten"
        )
    check_parent(path, what)


def _parents(result: FusionResult) -> dict[str, nn.Module]:
    """Return all parents by name; of fusions one after another not what came between."""
    return {name: one.model for name, one in result.parent_models.items()}


def _with_directory(entry: tuple[str, nn.Module]) -> tuple[str, Path | None]:
    return entry[0], tokens_directory(entry[1])


def _processor_source(
    result: FusionResult, parents: Mapping[str, nn.Module], wanted: str | None
) -> Path | None:
    """Return the directory whose tokenizer and processor the result gets; None for none."""
    if wanted is not None:
        if wanted not in parents:
            raise InputError(
                f"processor_of={wanted!r} is no parent; the parents are {', '.join(parents)}"
            )
        found = tokens_directory(parents[wanted])
        if found is None:
            raise InputError(
                f"processor_of={wanted!r}: that parent was not read from a directory that is still "
                "there, so that it has no tokenizer or processor to take"
            )
        return found
    aligned = (result.steps or (result,))[0].aligned
    first = aligned.names[aligned.reference]
    every = [tokens_directory(one) for one in (parents[first], *parents.values())]
    return next((one for one in every if one is not None), None)


def _typed(model: nn.Module, dtype: str | torch.dtype | None) -> nn.Module:
    """Return a network with weights of another type."""
    if dtype is None:
        return model
    wanted = weight_type(dtype, "dtype")
    narrow = in_type({name: one.detach() for name, one in model.named_parameters()}, wanted)
    made = copied(model)
    with torch.no_grad():
        for name, one in made.named_parameters():
            if one.is_floating_point():
                one.data = narrow[name]
    return made


# --- writing ------------------------------------------------------------------------------------


def _write(model: nn.Module, config: Any, made: Path, max_shard_size: str | int) -> None:
    """Let the library write the weights, which keeps ties as it ties them, and the config."""
    written: Any = model
    own = written.config
    try:
        written.config = config
        with quiet():
            written.save_pretrained(str(made), max_shard_size=max_shard_size)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"transformers cannot write {type(model).__name__}: {one_line(error)}"
        ) from error
    finally:
        written.config = own


def _copy_processor(source: Path, made: Path) -> None:
    """Copy tokenizer, processor, chat template and generation config as they are."""
    for file in sorted(source.iterdir()):
        if file.is_dir():
            if file.name == "additional_chat_templates":
                shutil.copytree(file, made / file.name)
        elif file.suffix in (".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".spm") and (
            file.name == _GENERATION or file.name.startswith(_PROCESSORS)
        ):
            shutil.copyfile(file, made / file.name)


# --- what was written ---------------------------------------------------------------------------


@torch.no_grad()
def _check(result: FusionResult, model: nn.Module, made: Path, path: Path) -> None:
    """Read the directory afresh and compare; refuse it where it computes something else."""
    first = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    half = first.dtype in _HALF
    # What is computed in half precision is too coarse to compare.
    fresh = read_back(type(model), made, torch.float32 if half else first.dtype)
    own = copied(model).float() if half else model
    _check_weights(own, fresh, path)
    called = f"the directory {str(path)!r}"
    compare_models(own, fresh, *example_of_result(result), called=called)


def _check_weights(own: nn.Module, fresh: nn.Module, path: Path) -> None:
    """Refuse a directory from which other weights come back."""
    lost = _differing(own, fresh)
    if lost:
        raise InputError(
            f"{str(path)!r} would not give back the result: {listed(lost)} differ after loading. "
            "Save the weights alone into a file (.safetensors)"
        )


def _differing(own: nn.Module, fresh: nn.Module) -> list[str]:
    """Return the names of weights that did not come back as they were."""
    state, other = own.state_dict(), fresh.state_dict()
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and (
            name not in other
            or other[name].shape != value.shape
            or not torch.equal(other[name], value.to(other[name]))
        )
    ]
