"""Two or more models -> what matches between them, what does not, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from clafusion.alignment.compatibility import allowed_pairs, check_outputs, fit_layers
from clafusion.alignment.differences import differences, nearest
from clafusion.alignment.models import label, reference_of
from clafusion.config import FusionConfig
from clafusion.correspondence.correspondence import correspond
from clafusion.correspondence.heads import unite_models
from clafusion.correspondence.inserted import check_inserted, differences_between_layers
from clafusion.errors import ClafusionError
from clafusion.reports.text import plain_table, shortened
from clafusion.stages import ExampleInputs, named_models, traced_parent
from clafusion.targets.completed import completed_models
from clafusion.tracing.model import TracedModel

__all__ = ["explain"]


def explain(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    verify: bool = True,
) -> str:
    """Compare models layer by layer: what matches, what does not and why.

    Every model is compared with the one that gives the depth, as :func:`clafusion.fuse` does. It
    says all that stands in the way, where an error of ``fuse`` names the first thing. No data is
    needed but a few inputs.

    Parameters
    ----------
    models
        Two or more networks, as for :func:`clafusion.fuse`.
    example_inputs
        Inputs to trace them with; the first three rows are used.
    verify
        Whether to prove the analysis of each.

    Returns
    -------
    str
        A text of several lines.

    Raises
    ------
    InputError
        The models are none. A model that cannot be analysed is no error here: the text says why.
    """
    config = FusionConfig(verify=verify)
    traced: dict[str, TracedModel] = {}
    lines = []
    for name, model in named_models(models).items():
        try:
            traced[name] = traced_parent(name, model, example_inputs, config)
        except ClafusionError as error:
            lines.append(f"cannot be analysed: {error}")
    if len(traced) > 1:
        names = list(traced)
        traced = dict(zip(names, completed_models(list(traced.values())), strict=True))
        reference = names[reference_of(list(traced.values()), config)]
        lines += [
            _compared((reference, name), traced[reference], traced[name])
            for name in names
            if name != reference
        ]
    return "\n\n".join(lines)


def _compared(names: tuple[str, str], deep: TracedModel, shallow: TracedModel) -> str:
    called = label(names[0]), label(names[1])
    allowed = allowed_pairs(deep.layers, shallow.layers)
    rows = []
    for k, layer in enumerate(shallow.layers):
        partners = [one.name for one in deep.layers if allowed[one.index, k]]
        if partners:
            rows.append([layer.name, shortened(partners), "-"])
            continue
        closest = nearest(layer, deep.layers)
        what = "; ".join(differences(layer, closest))
        rows.append([layer.name, "none", f"{closest.name}: {what}"])
    titles = [f"layer of {names[1]}", f"can match, of {names[0]}", "else the nearest: what differs"]
    lonely = [one for one in deep.layers if not allowed[one.index].any() and not one.insertable]
    lines = [
        f"{called[1]} ({len(shallow.layers)} layers) and {called[0]} ({len(deep.layers)} layers)",
        plain_table(titles, rows),
    ]
    lines += [
        f"{one.name!r} of {called[0]} matches nothing, and cannot be inserted into {called[1]} "
        f"without changing it: {one.obstacle}"
        for one in lonely
    ]
    return "\n".join([*lines, f"verdict: {_verdict(called, deep, shallow)}"])


def _verdict(names: tuple[str, str], deep: TracedModel, shallow: TracedModel) -> str:
    """Say whether two models can be fused; if not, the first reason against it."""
    try:
        with torch.no_grad():
            check_outputs(names, deep, shallow)
        fit = fit_layers(names, deep.layers, shallow.layers)
        if fit.needs_gaps:
            return "they can be fused into the union of both: each is the deeper one somewhere"
        of = fit.layer_map
        target, source = unite_models(deep, shallow, of)
        correspondence = correspond(target, source, of)
        check_inserted(correspondence)
        found = differences_between_layers(correspondence)
        if found:
            return f"they can be fused, for inputs of this shape: of {names[1]} {found}"
    except ClafusionError as error:
        return f"they cannot be fused: {error}"
    return "they can be fused"
