"""The README.md of a fused network: where it comes from, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clafusion.interop.huggingface import directory_of, transformers_library
from clafusion.weights.digests import tensors_digest, versions
from clafusion.weights.state_files import tensors_of

if TYPE_CHECKING:
    from clafusion.results import FusionResult

__all__ = ["is_model_card", "merge_card", "model_card", "pair_card"]

_HEAD = "---\nlibrary_name: transformers\ntags:\n- merge\n- clafusion\n---"


def model_card(
    result: FusionResult,
    parents: Mapping[str, nn.Module],
    config: Any,
    written: Path,
    command: str | None,
) -> str:
    """Return a model card: parents with hashes, weights, options, assessment, versions."""
    kind = type(result.model).__name__
    tensors = sum(one.numel() for one in result.model.parameters())
    files = sorted(one.name for one in written.glob("*.safetensors"))
    about = [
        f"{kind} with {tensors:,} parameters, fused by clafusion without training. "
        f"Read it by `{kind}.from_pretrained`.",
        "## Parents\n\n" + _parents_table(result, parents),
        f"The hashes are the SHA-256 of the parents' weights as they were fused. Weights are in "
        f"{', '.join(f'`{one}`' for one in files)}, of type {config.dtype}.",
        "## Layers\n\n" + _layers_table(result),
    ]
    title = f"{kind}, fused from {', '.join(parents)}"
    found = None if result.assessment is None else result.assessment.to_dict()
    return _card(title, about, found, result.config.to_dict(), result.taken, command)


def pair_card(
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    weights: Any,
    config: Mapping[str, Any],
) -> str:
    """Return the model card of one of many pairs.

    Parameters
    ----------
    facts
        Those of :func:`clafusion.batch.results.facts_of`, with the names.
    digests
        The hashes of the two directories, by name.
    weights
        The weights that were asked for; None for equal ones.
    config
        The options.
    """
    first, second = facts["first"], facts["second"]
    rows = ["| name | SHA-256 of the directory |", "|---|---|"]
    rows += [f"| {name} | `{digest}` |" for name, digest in digests.items()]
    about = [
        f"Fused by clafusion without training, into the structure of {facts['structure']}, with "
        f"{'equal weights' if weights is None else f'the weights {weights}'}.",
        "## Parents\n\n" + "\n".join(rows),
    ]
    title = f"{first} and {second}, fused"
    return _card(title, about, facts.get("assessment"), config, facts["taken"])


def merge_card(kind: str, facts: Mapping[str, Any], command: str | None) -> str:
    """Return the model card of a model that was merged of models of one origin.

    Parameters
    ----------
    kind
        Its class.
    facts
        Its base and parents with their hashes, the settings and the assessment.
    command
        The command that made it.
    """
    rows = [
        "| name | weight | distance from the base | read from | SHA-256 |",
        "|---|---|---|---|---|",
    ]
    base = {"name": "base", "weight": None, "distance": None, **facts["base"]}
    for one in (base, *facts["parents"]):
        where = "memory" if one["file"] is None else Path(one["file"]).name
        weight, distance = (
            "" if one[name] is None else f"{one[name]:.4g}" for name in ("weight", "distance")
        )
        rows.append(f"| {one['name']} | {weight} | {distance} | {where} | `{one['sha256']}` |")
    about = [
        f"{kind}, merged by clafusion without training from models of one base. "
        f"Read it by `{kind}.from_pretrained`.",
        "## Parents\n\n" + "\n".join(rows),
    ]
    title = f"{kind}, merged from {', '.join(one['name'] for one in facts['parents'])}"
    return _card(title, about, facts["assessment"], facts["settings"], facts["taken"], command)


def _card(
    title: str,
    about: Sequence[str],
    assessment: Mapping[str, Any] | None,
    options: Any,
    taken: Mapping[str, Any],
    command: str | None = None,
) -> str:
    """Return a card of these parts: what the network is comes first, and the versions last."""
    how_good = "It was not assessed."
    if assessment is not None:
        figures = json.dumps(assessment, indent=1)
        how_good = f"{assessment['verdict']}\n\n```json\n{figures}\n```"
    parts = [
        _HEAD,
        f"# {title}",
        *about,
        f"## How good it is\n\n{how_good}",
        f"## Options\n\n```json\n{json.dumps(options, indent=1, default=str)}\n```",
        f"What was taken where they leave a choice:\n\n```json\n{json.dumps(taken, indent=1)}\n```",
    ]
    if command is not None:
        parts.append(f"## Command\n\n```sh\n{command}\n```")
    parts.append("## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in _versions().items()))
    return "\n\n".join(parts) + "\n"


def is_model_card(file: Path) -> bool:
    """Say whether a file is a model card that clafusion wrote."""
    try:
        return file.read_text(encoding="utf-8").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def _parents_table(result: FusionResult, parents: Mapping[str, nn.Module]) -> str:
    rows = ["| name | weight | read from | SHA-256 |", "|---|---|---|---|"]
    for (name, model), weight in zip(parents.items(), result.weights, strict=True):
        path = directory_of(model)
        digest = tensors_digest(tensors_of(model))
        where = "memory" if path is None else path.name
        rows.append(f"| {name} | {weight:.4g} | {where} | `{digest}` |")
    return "\n".join(rows)


def _layers_table(result: FusionResult) -> str:
    """Say for each layer of the result which layer of each parent went into it."""
    names = [one.name for one in result.parents]
    rows = ["| layer | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, layer in enumerate(result.problem.target.layers):
        cells = []
        for one in result.parents:
            k = one.correspondence.layer_map[i]
            cells.append(one.correspondence.source.layers[k].name if k >= 0 else "none")
        rows.append(f"| {layer.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _versions() -> dict[str, str]:
    try:
        found = versions()
    except PackageNotFoundError:  # run from its source
        found = {"torch": torch.__version__}
    known = {"transformers": str(transformers_library().__version__)}
    for name in ("safetensors", "tokenizers", "peft"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, **known}
