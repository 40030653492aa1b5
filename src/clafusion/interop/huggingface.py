"""Hugging Face directories: config, weights in one or more files, adapters -> a network.

The library transformers reads them by its own ``from_pretrained``, which renames, merges and ties
what it has to. Nothing is downloaded, and no code of a directory is run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clafusion.errors import FusionWarning, InputError, warn
from clafusion.profiling.batches import LABELS
from clafusion.tracing.ties import aliases_of
from clafusion.weights.factories import ModelFile
from clafusion.weights.mapped import file_backed
from clafusion.weights.messages import listed, one_line
from clafusion.weights.recognition import stands_for_another
from clafusion.weights.state_files import file_digest, files_of
from clafusion.weights.storage import InFiles

__all__ = [
    "ModelDirectory",
    "config_as_stored",
    "directory_of",
    "input_names",
    "is_of_transformers",
    "load_directory",
    "quiet",
    "read_back",
    "read_config",
    "stored_config",
    "tokens_directory",
    "transformers_library",
    "weight_files",
]

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelDirectory(ModelFile):
    """A network in a Hugging Face directory, which is read when the network is needed.

    Attributes
    ----------
    factory
        What errors call its architecture: the directory.
    path
        The directory.
    key
        None.
    """

    def load(self) -> nn.Module:
        """Return the network with its weights, in eval mode."""
        return load_directory(self.path)

    def open(self) -> tuple[nn.Module, frozenset[str]]:
        """Return the network, and the names of the parameters that are mapped from files.

        The library maps what it takes from a file as it is. What it has made in memory, as by
        merging an adapter, goes to a temporary file.
        """
        model = self.load()
        own = dict(model.named_parameters())
        if len(file_backed(own)) < len(own):
            kept = {name: one.detach() for name, one in own.items()}
            model = InFiles().model(model, kept, aliases_of(model))
            own = dict(model.named_parameters())
        return model, file_backed(own)

    def build(self) -> nn.Module:
        """Return a network of the same architecture with random weights, in eval mode."""
        base = _base_of(Path(self.path))
        kind = _architecture(base)
        model: nn.Module = kind(_library_config(kind, base))
        return model.eval()

    def check(self) -> None:
        """Refuse a directory that cannot be read; nothing is loaded."""
        base = _base_of(Path(self.path))
        read_config(base)
        _check_weights(base)

    def digest(self) -> str:
        """Return the SHA-256 of its config, its weights and its adapter."""
        digest = hashlib.sha256()
        path = Path(self.path)
        files = [one for weights in weight_files(path) for one in files_of(weights)]
        for directory in dict.fromkeys((path, _base_of(path))):
            files += [directory / name for name in ("config.json", _ADAPTER)]
        for file in files:
            if file.is_file():
                digest.update(f"{file.name} {file_digest(file)} ".encode())
        return digest.hexdigest()


def load_directory(path: str | os.PathLike[str]) -> nn.Module:
    """Return the network in a Hugging Face directory, in eval mode, with its adapter merged.

    Its class is the one that ``config.json`` names. The weights are those of ``model.safetensors``,
    ``pytorch_model.bin`` or their shards.

    Raises
    ------
    InputError
        It has no config, no weights, code of its own or quantised weights; the library knows no
        such class or is missing; the weights lack something or do not fit; or the adapter cannot be
        merged.

    Warns
    -----
    FusionWarning
        Weights in the directory that the network has no place for.
    """
    path = Path(path)
    base = _base_of(path)
    _check_weights(base)
    adapter = (path / _ADAPTER).is_file()
    if adapter:
        peft = _peft(path)
    kind = _architecture(base)
    if adapter:
        with _without_adapter(base) as plain:
            model = _merged(_loaded(kind, plain, path), path, peft)
    else:
        model = _loaded(kind, base, path)
    config: Any = model.config
    config._name_or_path = str(path)
    for one in model.parameters():
        vars(one).pop("_is_hf_initialized", None)  # a mark of how it was made, which copies keep
    return model.eval()


def read_back(kind: type[nn.Module], path: Path, dtype: torch.dtype) -> nn.Module:
    """Return a network that was just written, as ``from_pretrained`` gives it, in eval mode.

    Raises
    ------
    InputError
        The library cannot read it, or finds too little or too much.
    """
    model, info = _from_pretrained(kind, path, dtype, path)
    if info["unexpected_keys"]:
        raise InputError(
            f"the written directory holds {listed(sorted(info['unexpected_keys']))}, which "
            f"{kind.__name__} does not read"
        )
    return model.eval()


def is_of_transformers(model: nn.Module) -> bool:
    """Say whether a network is of the library transformers; the library is not imported for it."""
    return any(
        one.__name__ == "PreTrainedModel" and one.__module__.startswith("transformers.")
        for one in type(model).__mro__
    )


def directory_of(model: nn.Module) -> Path | None:
    """Return the directory that a network of transformers was read from; None if it is gone."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    path = Path(name) if isinstance(name, str) and name else None
    known = ("config.json", _ADAPTER)
    return path if path is not None and any((path / one).is_file() for one in known) else None


def tokens_directory(model: nn.Module) -> Path | None:
    """Return the directory whose tokenizer makes a network's tokens; None if it is gone.

    It is that of the network, or of another one whose vocabulary the network has taken.
    """
    taken = getattr(model, "_clafusion_tokens_of", None)
    return Path(taken) if taken is not None else directory_of(model)


def transformers_library() -> Any:
    """Return the library.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "a Hugging Face directory needs the library transformers: install "
            "clafusion[huggingface]"
        ) from error
    return transformers


def input_names(path: Path) -> frozenset[str]:
    """Return what the inputs of the network in a directory are called; nothing is loaded."""
    kind = _architecture(_base_of(path))
    return frozenset(inspect.signature(kind.forward).parameters) - {"self", *LABELS}


def read_config(path: Path) -> dict[str, Any]:
    """Return what a directory's ``config.json`` holds.

    Raises
    ------
    InputError
        It is missing or cannot be read, names no architecture, or the directory has code of its
        own or quantised weights.
    """
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"{str(path)!r} is no Hugging Face directory: it has no config.json. Give the "
            "directory that save_pretrained wrote, or a file of weights and a factory"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{str(file)!r} must hold a mapping; it holds a {type(found).__name__}")
    if found.get("auto_map"):
        raise InputError(
            f"{str(path)!r} has code of its own (auto_map in config.json), which is never run: "
            "trust_remote_code is never switched on. Load the network yourself and give the module "
            "to clafusion.fuse"
        )
    if found.get("quantization_config"):
        raise InputError(
            f"{str(path)!r} has quantised weights (quantization_config in config.json), which "
            "cannot be averaged: give the directory they were made from"
        )
    names = found.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise InputError(
            f"{str(file)!r} names no architecture: write the class that the weights are of, as "
            '"architectures": ["BertForSequenceClassification"]'
        )
    return found


def stored_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the config of the network in a directory, of an adapter that of its base."""
    return read_config(_base_of(Path(path)))


def config_as_stored(model: nn.Module) -> dict[str, Any]:
    """Return the config of a network of transformers as its directory would hold it."""
    config: Any = model.config
    return {**config.to_dict(), "architectures": [type(model).__name__]}


def _architecture(path: Path) -> Any:
    """Return the class that a config names."""
    name = read_config(path)["architectures"][0]
    library = transformers_library()
    kind = getattr(library, name, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise InputError(
            f"{str(path / 'config.json')!r} names the architecture {name!r}, which transformers "
            f"{library.__version__} does not have: install a release that has it"
        )
    return kind


def _library_config(kind: Any, path: Path) -> Any:
    try:
        with quiet():
            return kind.config_class.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{str(path / 'config.json')!r} cannot be used: {one_line(error)}"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a model's weights: of a directory, or the one that is given."""
    if not path.is_dir():
        return [path]
    names = (*_WEIGHTS, "adapter_model.safetensors", "adapter_model.bin")
    found = [path / name for name in names if (path / name).is_file()]
    base = _base_of(path)
    return found if base == path else [*found, *weight_files(base)]


def _check_weights(path: Path) -> None:
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise InputError(
            f"{str(path)!r} has no weights: none of {', '.join(_WEIGHTS)} is there. Nothing is "
            "downloaded: fetch the whole directory"
        )
    for file in weight_files(path):
        told = stands_for_another(file)
        if told is not None:
            raise InputError(f"{str(file)!r} {told}")


def _loaded(kind: Any, path: Path, called: Path) -> nn.Module:
    model, info = _from_pretrained(kind, path, "auto", called)
    unread = sorted(info["unexpected_keys"])
    if unread:
        warn(
            f"{str(called)!r} has weights that {kind.__name__} has no place for, and that are left "
            f"out: {listed(unread)}",
            FusionWarning,
        )
    return model


def _from_pretrained(
    kind: Any, path: Path, dtype: Any, called: Path
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Read a network; refuse one that the library would complete by random weights."""
    try:
        with quiet():
            model, info = kind.from_pretrained(
                str(path),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=dtype,
            )
    except Exception as error:
        raise InputError(f"{str(called)!r} cannot be read: {one_line(error, most=400)}") from error
    if info["missing_keys"]:
        raise InputError(
            f"{str(called)!r} lacks weights of {kind.__name__}: "
            f"{listed(sorted(info['missing_keys']))}. They would be random: give a directory with "
            "all weights, or name the class in config.json that the weights are of"
        )
    return model, info


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing reports and progress; what they say is an error of ours."""
    logging = transformers_library().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- adapters -----------------------------------------------------------------------------------


def _base_of(path: Path) -> Path:
    """Return the directory of an adapter's base; for a directory without an adapter itself."""
    if not path.is_dir():
        raise InputError(f"{str(path)!r} is no directory. Nothing is downloaded")
    if (path / "config.json").is_file() or not (path / _ADAPTER).is_file():
        return path
    try:
        adapter = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))
        named = adapter.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{str(path / _ADAPTER)!r} cannot be read: {one_line(error)}") from error
    for base in (Path(str(named)), path / str(named)):
        if named and base.is_dir():
            return base
    raise InputError(
        f"{str(path)!r} holds an adapter without its base, {named!r}, which is no directory here. "
        f"Nothing is downloaded: fetch it, and write its directory into {_ADAPTER} as "
        "base_model_name_or_path"
    )


def _peft(path: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"{str(path)!r} holds an adapter ({_ADAPTER}), and merging it needs the library peft: "
            "install peft, or merge it yourself (merge_and_unload) and save the whole network"
        ) from error
    return peft


@contextmanager
def _without_adapter(path: Path) -> Iterator[Path]:
    """Yield a directory of links to all files but those of the adapter.

    The library would put the adapter's layers into the network, beside the weights.
    """
    with tempfile.TemporaryDirectory() as made:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(made) / file.name).symlink_to(file.resolve())
        yield Path(made)


def _merged(model: nn.Module, path: Path, peft: Any) -> nn.Module:
    """Add an adapter to the weights that it is for."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            merged: nn.Module = peft.PeftModel.from_pretrained(model, str(path)).merge_and_unload(
                safe_merge=True
            )
    except Exception as error:
        raise InputError(
            f"the adapter in {str(path)!r} cannot be merged into the weights: {one_line(error)}"
        ) from error
    lacking = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    if lacking:
        raise InputError(f"the adapter in {str(path)!r} lacks weights: {lacking[0][:300]}")
    return merged
