"""Texts through a directory's tokenizer, and the comparison of two vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clafusion.alignment.models import label
from clafusion.errors import InputError
from clafusion.interop.huggingface import quiet, transformers_library
from clafusion.weights.messages import listed, one_line

__all__ = ["check_same_labels", "check_same_vocabulary", "tokenised", "tokenizer_of"]

_BATCH_SIZE = 64
_LONGEST = 512  # tokens, where nothing is said
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


def tokenizer_of(path: Path) -> Any:
    """Return a directory's tokenizer; None where it has none, as that of a network for images.

    Raises
    ------
    InputError
        The library cannot read it.
    """
    if not any((path / name).is_file() for name in _FILES):
        return None
    try:
        with quiet():
            return transformers_library().AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the tokenizer in {str(path)!r} cannot be read: {one_line(error)}"
        ) from error


def tokenised(
    texts: Sequence[str], path: Path, max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Return batches of tokens and attention masks by name, all of one length.

    Parameters
    ----------
    texts
        The texts.
    path
        A Hugging Face directory with a tokenizer.
    max_length
        How many tokens of a text count; default what the tokenizer says, at most 512.

    Raises
    ------
    InputError
        The directory has no tokenizer, or texts of unlike lengths cannot be padded.
    """
    tokenizer = tokenizer_of(path)
    if tokenizer is None:
        raise InputError(
            f"{str(path)!r} has no tokenizer (none of {', '.join(_FILES)}): give tokens (.npz), or "
            "copy the tokenizer's files into the directory"
        )
    longest = max_length or min(int(tokenizer.model_max_length), _LONGEST)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # where a token stands does not depend on others' lengths
    try:
        found = tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
    except Exception as error:
        raise InputError(
            f"the tokenizer in {str(path)!r} does not take these texts: {one_line(error)}"
        ) from error
    named = {str(name): value for name, value in found.items()}
    ids = next(iter(named.values()))
    if len(set(texts)) > 1 and len(ids.unique(dim=0)) == 1 and ids.size(1):
        raise InputError(
            f"the tokenizer in {str(path)!r}, as transformers reads it, gives all of these texts "
            "the same tokens: check its files, or give tokens (.npz)"
        )
    if ids.size(1) == 0:
        raise InputError(f"the tokenizer in {str(path)!r} finds no token in these texts")
    parts = [value.split(_BATCH_SIZE) for value in named.values()]
    return [dict(zip(named, one, strict=True)) for one in zip(*parts, strict=True)]


# --- what two parents must have in common -------------------------------------------------------


def check_same_vocabulary(directories: Mapping[str, Path]) -> None:
    """Refuse directories whose tokenizers give the same text other tokens.

    Raises
    ------
    InputError
        An entry has another number in one, or is missing; the message shows the first.
    """
    known: dict[str, dict[str, int]] = {}
    for name, path in directories.items():
        tokenizer = tokenizer_of(path) if len(directories) > 1 else None
        if tokenizer is not None:
            known[name] = dict(tokenizer.get_vocab())
    for name in list(known)[1:]:
        first = next(iter(known))
        told = _differences(known[first], known[name], (first, name))
        if told:
            raise InputError(
                f"{label(first)} and {label(name)} have other vocabularies, so that the same text "
                f"means other tokens: {told}. Take networks with one tokenizer; clafusion.fuse "
                "with vocabulary='intersection' (clafusion fuse --vocabulary intersection) moves "
                "common entries and keeps the first model's others"
            )


def _differences(one: Mapping[str, int], other: Mapping[str, int], names: tuple[str, str]) -> str:
    if one == other:
        return ""
    alone = [sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())]
    moved = sorted(entry for entry in one.keys() & other.keys() if one[entry] != other[entry])
    parts = [f"{len(one)} and {len(other)} entries"]
    parts += [
        f"only {name!r} has {listed(map(repr, only))}"
        for name, only in zip(names, alone, strict=True)
        if only
    ]
    if moved:
        shown = [f"{entry!r} is {one[entry]} and {other[entry]}" for entry in moved]
        parts.append(listed(shown))
    return "; ".join(parts)


def check_same_labels(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse classifiers whose outputs mean other labels.

    Parameters
    ----------
    configs
        What each parent's ``config.json`` holds, by name.

    Raises
    ------
    InputError
        A label differs; the message shows the first.
    """
    kinds = {name: one.get("problem_type") for name, one in configs.items()}
    told = {name: kind for name, kind in kinds.items() if kind is not None}
    if len(set(told.values())) > 1:
        shown = ", ".join(f"{label(name)} {kind!r}" for name, kind in told.items())
        raise InputError(
            f"the models are for other problems (problem_type in config.json): {shown}"
        )
    maps = {
        name: {int(number): str(text) for number, text in (one.get("id2label") or {}).items()}
        for name, one in configs.items()
        if "Classification" in str(one.get("architectures"))
    }
    for name in list(maps)[1:]:
        first = next(iter(maps))
        one, other = maps[first], maps[name]
        unlike = [i for i in sorted({*one, *other}) if one.get(i) != other.get(i)]
        if unlike:
            i = unlike[0]
            raise InputError(
                f"{label(first)} and {label(name)} have other labels: output {i} is "
                f"{one.get(i, 'missing')!r} and {other.get(i, 'missing')!r} (id2label in "
                "config.json). If they mean the same write the same names; else bring the rows of "
                "the last layer into one order"
            )
