"""Which pairs of a zoo can be fused, told in seconds: nothing is proved, profiled or fused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clafusion.alignment.models import check_models, label, reference_of
from clafusion.batch.results import Pair
from clafusion.batch.worker import has_code, union_refusal
from clafusion.config import FusionConfig
from clafusion.errors import ClafusionError, InputError
from clafusion.interop.inputs import example_of, readable
from clafusion.profiling.batches import Data
from clafusion.stages import ExampleInputs, traced_parent
from clafusion.targets.completed import completed_models
from clafusion.tracing.model import TracedModel
from clafusion.weights.factories import Model
from clafusion.weights.messages import one_line

__all__ = ["Cause", "PairsCheck", "check_outputs_of_pairs", "check_pairs"]


@dataclass(frozen=True)
class Cause:
    """Why pairs cannot be fused.

    Attributes
    ----------
    model
        The model that is in all of them; None where there is none, or where it is one pair only.
    pairs
        The pairs.
    reason
        What is told of the first of them.
    """

    model: str | None
    pairs: tuple[Pair, ...]
    reason: str

    def __str__(self) -> str:
        if self.model is None:
            named = [" and ".join(pair) for pair in self.pairs[:3]]
            more = f" and {len(self.pairs) - 3} more" if len(self.pairs) > 3 else ""
            return f"{', '.join(named)}{more}: {self.reason}"
        others = [one for pair in self.pairs for one in pair if one != self.model]
        several = f"{len(others)} models" if len(others) > 1 else "1 model"
        return f"{self.model}: incompatible with {several} ({', '.join(others)}): {self.reason}"


@dataclass(frozen=True)
class PairsCheck:
    """What :func:`check_pairs` found.

    Attributes
    ----------
    layers
        Name of each model that could be traced -> how many layers it has.
    fusible
        The pairs that can be fused, as far as their structures say.
    causes
        Why the others cannot, the cause of most pairs first.
    """

    layers: Mapping[str, int]
    fusible: tuple[Pair, ...]
    causes: tuple[Cause, ...]

    def __str__(self) -> str:
        total = len(self.fusible) + sum(len(one.pairs) for one in self.causes)
        models = ", ".join(f"{name} {count}" for name, count in self.layers.items())
        lines = [f"layers       {models}", f"can be fused {len(self.fusible)} of {total} pairs"]
        return "\n".join([*lines, *(f"cannot       {one}" for one in self.causes)])

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data for JSON."""
        return {
            "layers": dict(self.layers),
            "fusible": [list(one) for one in self.fusible],
            "causes": [
                {
                    "model": one.model,
                    "pairs": [list(pair) for pair in one.pairs],
                    "reason": one.reason,
                }
                for one in self.causes
            ],
        }


def check_pairs(
    models: Mapping[str, Model],
    data: Data,
    pairs: Sequence[Pair],
    config: FusionConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> PairsCheck:
    """Say which pairs can be fused, and why others cannot, grouped by cause.

    Each model is loaded and traced once, and its layers are compared with the others'. The proof
    of each model is left to the fusion, which may still refuse one.

    Parameters
    ----------
    models, data, pairs, config, example_inputs
        As for :func:`clafusion.fuse_pairs`, the pairs as a list.
    """
    config = replace(config or FusionConfig(), verify=False)
    check_outputs_of_pairs(config)
    example = example_inputs
    data = readable(data, models)
    if example is None:
        example = example_of(data, next(iter(models.values())))
    traced: dict[str, TracedModel] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        try:
            traced[name] = traced_parent(name, models[name], example, config)
        except Exception as error:
            failed[name] = one_line(error, label(name), most=None)
    reasons: dict[Pair, str] = {}
    fusible: list[Pair] = []
    for pair in pairs:
        broken = next((name for name in pair if name in failed), None)
        if broken is not None:
            reasons[pair] = failed[broken]
            continue
        try:
            own = [traced[name] for name in pair]
            completed = completed_models(own)
            reference = completed[reference_of(completed, config)]
            if check_models(pair, completed, config) and has_code(reference, own):
                fusible.append(pair)
            else:
                reasons[pair] = union_refusal(pair)
        except ClafusionError as error:
            reasons[pair] = str(error)
    layers = {name: len(one.layers) for name, one in traced.items()}
    return PairsCheck(layers, tuple(fusible), tuple(_causes(reasons, fusible, [*failed])))


def check_outputs_of_pairs(config: FusionConfig) -> None:
    """Refuse pairs of other classes, of which each file would need a program beside it.

    Raises
    ------
    InputError
        ``config.outputs`` is ``"both"``.
    """
    if config.outputs == "both":
        raise InputError(
            "outputs='both' is for clafusion.fuse and clafusion.sweep, not for many pairs: leave "
            "it out here, and fuse networks of other classes one pair at a time"
        )


def _causes(
    reasons: Mapping[Pair, str], fusible: Sequence[Pair], broken: Sequence[str]
) -> list[Cause]:
    """Group failures: by a model that fails with all others, else by what is told of them.

    ``broken`` are the models that could not be traced.
    """
    left = dict(reasons)
    causes = []
    for model in broken:
        same = [pair for pair in left if model in pair]
        if same:
            causes.append(Cause(model, tuple(same), _plain(left[same[0]])))
        for pair in same:
            del left[pair]
    fits = {name for pair in fusible for name in pair}
    while left:
        counts: dict[str, list[Pair]] = {}
        for pair in left:
            for name in pair:
                if name not in fits:
                    counts.setdefault(name, []).append(pair)
        found = max(counts, key=lambda name: len(counts[name]), default=None)
        if found is None or len(counts[found]) < 2:
            break
        model, same = found, counts[found]
        causes.append(Cause(model, tuple(same), _plain(left[same[0]])))
        for pair in same:
            del left[pair]
    by_reason: dict[str, list[Pair]] = {}
    for pair, reason in left.items():
        by_reason.setdefault(re.sub(r"models\['[^']*'\]", "", reason), []).append(pair)
    causes += [Cause(None, tuple(same), _plain(left[same[0]])) for same in by_reason.values()]
    return sorted(causes, key=lambda one: -len(one.pairs))


def _plain(reason: str) -> str:
    """Return what is told, with the models' names as the manifest has them."""
    return re.sub(r"models\['([^']*)'\]", r"\1", reason)
