"""Aligned models -> the structure that the result gets, and which layer of each parent goes where.

The only stage that knows words like deeper or shallower. After it there are a target and sources.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clafusion.alignment.compatibility import check_outputs
from clafusion.alignment.models import AlignedModels, label, naming
from clafusion.config import WIDTHS, Deeper, FusionConfig, Like, Shallower, Target, Wider
from clafusion.correspondence.correspondence import Correspondence, correspond
from clafusion.correspondence.heads import unite_models
from clafusion.correspondence.structure import resized_shape
from clafusion.errors import InputError, StructureError
from clafusion.profiling.thinning import thinned
from clafusion.targets.places import (
    Place,
    layer_maps,
    place_in_template,
    places_of,
    union_places,
)
from clafusion.targets.products import layer_products
from clafusion.targets.union import union_model
from clafusion.tracing.model import TracedModel
from clafusion.tracing.trace import trace_like
from clafusion.weights.build import with_state

__all__ = [
    "Chooser",
    "ChosenTarget",
    "choose_target",
    "chooses",
    "resized_model",
    "width_position",
]


@dataclass(frozen=True)
class ChosenTarget:
    """The structure of the result, and where the parents' layers go.

    Attributes
    ----------
    model
        The structure.
    owner
        Position of the parent whose own model it is; None where it is nobody's.
    layer_maps
        For each parent and each layer of the target the parent's layer, or -1.
    products
        For each parent the parameters that are products of several layers.
    name
        What errors call the structure.
    """

    model: TracedModel
    owner: int | None
    layer_maps: tuple[tuple[int, ...], ...]
    products: tuple[Mapping[str, Tensor], ...] = ()
    name: str = "the target"


Chooser: TypeAlias = Callable[[AlignedModels, FusionConfig, "TracedModel | None"], ChosenTarget]
"""``(aligned, config, template)`` -> the structure of the result, and where the layers go."""

_METHODS: dict[type[Target], Chooser] = {}


def chooses(settings: type[Target]) -> Callable[[Chooser], Chooser]:
    """Register the function that chooses the structure for a target of this type."""

    def register(function: Chooser) -> Chooser:
        _METHODS[settings] = function
        return function

    return register


def choose_target(
    aligned: AlignedModels, config: FusionConfig, template: TracedModel | None = None
) -> ChosenTarget:
    """Choose the structure of the result.

    Parameters
    ----------
    aligned
        The models.
    config
        ``config.target`` says which structure.
    template
        The traced module of a target :class:`clafusion.config.Like` one.

    Raises
    ------
    StructureError
        The structure cannot be built, has no place for a layer, or puts out something else.
    InputError
        A width is asked for that is no parent's.
    """
    method = _METHODS.get(type(config.target))
    if method is None:
        raise InputError(
            f"no function chooses the target {config.target.name!r}: register one by "
            "clafusion.targets.target.chooses"
        )
    return method(aligned, config, template)


@chooses(Like)
def _like(
    aligned: AlignedModels, config: FusionConfig, template: TracedModel | None
) -> ChosenTarget:
    if template is None:
        raise InputError("target 'like' needs a template, a module of the wanted structure")
    first = aligned.profiles[0].traced
    names = "target.template", label(aligned.names[0])
    check_outputs(names, template, first, both_are_parents=False)
    places = union_places(aligned, config) if _has_gaps(aligned) else places_of(aligned)
    placed = place_in_template(template, aligned.profiles, places)
    return _chosen(template, None, placed, name="target.template")


@chooses(Deeper)
def _deeper(
    aligned: AlignedModels,
    config: FusionConfig,
    _template: TracedModel | None,
) -> ChosenTarget:
    target = config.target
    assert isinstance(target, Deeper)
    if not _has_gaps(aligned):
        return _with_width(_of_reference(aligned), aligned, target)
    if target.width != "own":
        raise _no_structure(target)
    return _of_union(aligned, config)


@chooses(Wider)
def _wider(
    aligned: AlignedModels,
    config: FusionConfig,
    _template: TracedModel | None,
) -> ChosenTarget:
    """Choose the structure; how wide it gets is known when channels are matched."""
    return _of_union(aligned, config) if _has_gaps(aligned) else _of_reference(aligned)


@chooses(Shallower)
def _shallower(
    aligned: AlignedModels,
    config: FusionConfig,
    _template: TracedModel | None,
) -> ChosenTarget:
    target = config.target
    assert isinstance(target, Shallower)
    if _has_gaps(aligned):
        raise _no_structure(target)
    chosen = _with_width(_of_reference(aligned), aligned, target)
    return _with_products(chosen, aligned, target.merge)


def _has_gaps(aligned: AlignedModels) -> bool:
    """Say whether some model has layers for which the deeper one has no partner."""
    return any(pair.alignment.unmatched_shallow for pair in aligned.pairs)


def _no_structure(target: Deeper | Shallower) -> StructureError:
    return StructureError(
        "each of the networks has layers that another one has no partner for, so that no network's "
        f"structure can be the result's; target={target.name!r} with width={target.width!r} is for "
        "results of one of them. Give target=Like(module), a module of the wanted structure"
    )


def _of_reference(aligned: AlignedModels) -> ChosenTarget:
    model = aligned.profiles[aligned.reference].traced
    return _chosen(model, aligned.reference, places_of(aligned))


def _of_union(aligned: AlignedModels, config: FusionConfig) -> ChosenTarget:
    places = union_places(aligned, config)
    models = [one.traced for one in aligned.profiles]
    union = union_model(aligned.names, models, aligned.reference, places)
    return _chosen(union, None, places, name="the union")


def _chosen(
    model: TracedModel, owner: int | None, places: Sequence[Place], name: str = "the target"
) -> ChosenTarget:
    maps = layer_maps(places)
    return ChosenTarget(model, owner, maps, tuple({} for _ in maps), name)


def _with_products(chosen: ChosenTarget, aligned: AlignedModels, merge: str) -> ChosenTarget:
    """Multiply the layers that the target lacks into the next ones."""
    products = []
    for name, profile, of in zip(aligned.names, aligned.profiles, chosen.layer_maps, strict=True):
        with naming(name):
            products.append(layer_products(chosen.model, profile, of, merge))
    return replace(chosen, products=tuple(products))


# --- widths -------------------------------------------------------------------------------------


def _with_width(
    chosen: ChosenTarget, aligned: AlignedModels, target: Deeper | Shallower
) -> ChosenTarget:
    """Give the structure the widths that are asked for."""
    owner = chosen.owner
    assert owner is not None, "the structure is the reference's so far"
    giver = _width_giver(chosen, aligned, target.width)
    if giver == owner:
        return chosen
    of_giver = _united(chosen, aligned, giver)
    if of_giver.changes_no_width:
        return chosen
    every = tuple(range(len(of_giver.source.layers)))
    if chosen.layer_maps[giver] == every:  # of one depth: it has the structure, too
        return replace(chosen, model=_model(aligned, giver), owner=giver)
    if of_giver.target.united_heads:
        one, other = of_giver.target.united_heads[0], of_giver.source.united_heads[0]
        raise StructureError(
            f"width={target.width!r} gives {of_giver.target.layers[one.layer].name!r} "
            f"{other.count} attention heads, but its module's code has {one.count}: give "
            "target=Like(module), a module that has as many"
        )
    sizes = {
        one.index: of_giver.source.groups[other].size
        for one, other in zip(of_giver.target.groups, of_giver.groups, strict=True)
        if other >= 0
    }
    resized = resized_model(chosen.model, sizes)
    return replace(chosen, model=resized, owner=None)


def _model(aligned: AlignedModels, position: int) -> TracedModel:
    return aligned.profiles[position].traced


def _united(chosen: ChosenTarget, aligned: AlignedModels, position: int) -> Correspondence:
    """Return what corresponds in a parent, which may have another number of heads."""
    of = chosen.layer_maps[position]
    target, source = unite_models(chosen.model, _model(aligned, position), of)
    return correspond(target, source, of)


def _width_giver(chosen: ChosenTarget, aligned: AlignedModels, width: str | int) -> int:
    """Return the position of the parent whose widths the result gets."""
    names, owner = aligned.names, chosen.owner
    assert owner is not None, "the structure is the reference's so far"
    named = width_position(names, width)
    if named is not None:
        return named
    if width == "own":
        return owner
    sign = 1 if width == "wide" else -1
    best, most = owner, 0
    for i in range(len(names)):
        if i != owner:
            grown = sign * _grown(_united(chosen, aligned, i))
            if grown > most:
                best, most = i, grown
    return best


def width_position(names: Sequence[str], width: str | int) -> int | None:
    """Return the position of the model that a width names; None for a word such as "wide".

    Raises
    ------
    InputError
        The width names no model, or could mean two things.
    """
    if isinstance(width, int):
        if not 0 <= width < len(names):
            raise InputError(
                f"target.width must be the position of a model, from 0 to {len(names) - 1}; got "
                f"{width}"
            )
        return width
    if width in names:
        at = list(names).index(width)
        if width in WIDTHS:
            raise InputError(
                f"target.width={width!r} is a word, and also the name of a model: give the "
                f"model's position, {at}, or call the model something else"
            )
        return at
    if width not in WIDTHS:
        raise InputError(
            f"target.width must be {', '.join(map(repr, WIDTHS))} or a model's name or position "
            f"({', '.join(map(label, names))}); got {width!r}"
        )
    return None


def _grown(correspondence: Correspondence) -> int:
    """Return by how many channels in all the source is wider than the target."""
    return sum(
        correspondence.source.groups[other].size - one.size
        for one, other in zip(correspondence.target.groups, correspondence.groups, strict=True)
        if other >= 0
    )


def resized_model(model: TracedModel, sizes: Mapping[int, int], advice: str = "") -> TracedModel:
    """Return a model with other sizes of its channel groups; its weights do not matter.

    It has to be traced anew: where the channels lie in the parameters depends on the widths.
    ``advice`` is added to the error.

    Raises
    ------
    StructureError
        A width is fixed in the module's code; the message names the module and the line.
    """
    state = {}
    for name, tensor in model.state().items():
        shape = resized_shape(model, name, tensor.shape, sizes)
        same = shape == tuple(tensor.shape)
        state[name] = tensor if same else torch.ones(shape, dtype=tensor.dtype).to(tensor.device)
    module = with_state(model.model, state, model.aliases)
    try:
        made = trace_like(module, model)
        return made if model.thinning is None else thinned(made)
    except InputError as error:
        raise StructureError(
            "the result cannot have the wanted widths: a width is fixed in the module's "
            f"code{_where_it_fails(error)}: {error}. Give target=Like(module), a module "
            f"of the wanted widths{advice}"
        ) from error


def _where_it_fails(error: Exception) -> str:
    """Say in which submodule, and at which line of whose code, a module failed to run."""
    names: dict[int, str] = {}
    path = line = ""
    cause = error.__cause__
    for frame, number in traceback.walk_tb(None if cause is None else cause.__traceback__):
        module = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
        if isinstance(module, nn.Module):
            names = names or {id(one): name for name, one in module.named_modules()}
            if not str(frame.f_globals.get("__name__")).startswith("torch."):
                path = names.get(id(module), "")
                line = f" ({Path(frame.f_code.co_filename).name}, line {number})"
    return (f", of {path!r}" if path else "") + line
