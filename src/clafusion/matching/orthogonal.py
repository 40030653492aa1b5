r"""Rotate the sources' residual streams into the target's, before channels are matched.

A stream that is read through norms only admits any orthogonal map once these are folded
(:mod:`clafusion.tracing.rotations`). The map is the one that brings the source's values at the
hook points that both show nearest to the target's (Procrustes),

.. math:: Q = \operatorname{argmin}_{Q^\top Q = 1} \sum_h
          \frac{\lVert X_h Q - Y_h \rVert^2}{\lVert X_h \rVert \lVert Y_h \rVert}
          = U V^\top, \qquad U S V^\top
          = \sum_h \frac{X_h^\top Y_h}{\lVert X_h \rVert \lVert Y_h \rVert}.

The weights of the source are rotated before they are matched, and the stream's plan is then the
identity: no matrix has to be moved by something that is no plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clafusion.alignment.models import label
from clafusion.correspondence.correspondence import Correspondence
from clafusion.errors import WidthWarning, warn
from clafusion.execution.lazy import LazyState
from clafusion.matching.activation_costs import flowing
from clafusion.profiling.profile import ModelProfile
from clafusion.targets.sources import Source, TargetSources
from clafusion.tracing.model import TracedModel
from clafusion.tracing.rotatable import (
    RotatableGroup,
    rotated_state,
    rotation_basis,
    with_kept_directions,
)
from clafusion.transport.plan import TransportPlan
from clafusion.weights.build import with_weights

__all__ = ["nearest_rotation", "rotatable_group", "rotate_sources", "unrotated_model"]


def rotate_sources(sources: TargetSources, names: Sequence[str]) -> TargetSources:
    """Rotate the streams of every source that the target has, too, with as many channels.

    The others, and those for which a plan is known, stay as they are.

    Parameters
    ----------
    sources
        The target and its sources.
    names
        What warnings call the sources.

    Warns
    -----
    WidthWarning
        A stream has other widths in the two networks, so that it is matched by a plan.
    """
    found = [_rotated(*one) for one in zip(sources.sources, names, strict=True)]
    return replace(sources, sources=tuple(found))


def rotatable_group(model: TracedModel, index: int) -> RotatableGroup | None:
    """Return what is to know to rotate a channel group of a model; None where it cannot be."""
    atoms = model.groups[index].atoms
    return next((one for one in model.rotatable or () if torch.equal(one.atoms, atoms)), None)


def unrotated_model(
    model: TracedModel, correspondence: Correspondence, rotations: Mapping[int, Tensor]
) -> TracedModel:
    """Return a copy of a source whose streams are back where they were before some rotations."""
    back = [
        (group, rotation.T)
        for index, rotation in rotations.items()
        if (group := rotatable_group(model, correspondence.groups[index])) is not None
    ]
    return with_weights(model, rotated_state(model.state(), back))


def _rotated(source: Source, name: str) -> Source:
    correspondence, profile = source.correspondence, source.profile
    rotations: dict[int, Tensor] = {}
    found: dict[int, tuple[RotatableGroup, Tensor]] = {}
    for one, other in zip(correspondence.target.groups, correspondence.groups, strict=True):
        if other < 0 or one.index in source.plans:
            continue
        of = _admitted(correspondence, one.index, other, name)
        rotation = None if of is None else _rotation(source, one.index, of)
        if of is not None and rotation is not None:
            rotations[one.index] = rotation
            found[other] = of, rotation
    if not found:
        return source
    model = profile.traced
    traced = with_weights(model, rotated_state(model.state(), list(found.values())))
    return replace(
        source,
        correspondence=replace(correspondence, source=traced),
        profile=replace(
            profile,
            traced=traced,
            rows=_rotated_rows(profile, {index: one for index, (_, one) in found.items()}),
            moments=None,
        ),
        plans={
            **source.plans,
            **{i: TransportPlan.identity(len(one)) for i, one in rotations.items()},
        },
        rotations=rotations,
    )


def _admitted(
    correspondence: Correspondence, index: int, other: int, name: str
) -> RotatableGroup | None:
    """Return the source's group, where both networks admit that it is rotated."""
    to = rotatable_group(correspondence.target, index)
    of = rotatable_group(correspondence.source, other)
    if to is None or of is None or to.is_centred != of.is_centred:
        return None
    if to.size != of.size:
        warn(
            f"solver 'orthogonal': the stream {of.name!r} has {of.size} channels in {label(name)} "
            f"and {to.size} in the result; it is matched by a plan, for only streams of equal "
            "width are rotated",
            WidthWarning,
        )
        return None
    target = correspondence.target
    moved = {axis.use.parameter for axis in target.groups[index].axes}
    # A product of layers is in the channels of the source as it was.
    return of if moved.isdisjoint(correspondence.products) else None


def _rotation(source: Source, index: int, group: RotatableGroup) -> Tensor | None:
    """Return the rotation by which the source's values come nearest to the target's."""
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for pair in source.correspondence.hooks[index]:
        key = flowing(source.correspondence, source.profile, pair)
        if pair.target not in source.target.rows or key not in source.profile.rows:
            continue
        x = source.profile.rows[key][:, pair.source_columns].double()
        y = source.target.rows[pair.target][:, pair.target_columns].double()
        if len(x) == len(y) and x.size(1) == y.size(1) == group.size:
            norm = x.norm() * y.norm()
            if float(norm) > 0:
                total += (x.T @ y / norm).cpu()
    if not bool(total.any()):
        return None
    return nearest_rotation(total, is_centred=group.is_centred)


def nearest_rotation(products: Tensor, *, is_centred: bool) -> Tensor:
    r"""Return the orthogonal :math:`Q` with the largest :math:`\langle Q, M \rangle`.

    Parameters
    ----------
    products
        The matrix ``M``: products of the source's channels with the target's.
    is_centred
        Whether ``Q`` has to leave the vector of ones as it is.
    """
    basis = rotation_basis(len(products), is_centred=is_centred).to(products)
    u, _, v = torch.linalg.svd(basis.T @ products @ basis)
    return with_kept_directions(u @ v, basis)


def _rotated_rows(
    profile: ModelProfile, rotations: Mapping[int, Tensor]
) -> Mapping[tuple[int, int], Tensor]:
    """Return the rows of a profile after its groups were rotated."""
    model, rows = profile.traced, profile.rows

    def make(key: tuple[int, int]) -> Tensor:
        values, (layer, place) = rows[key], key
        points = model.layers[layer].hook_points
        index = ~place if place < 0 else place
        if index >= len(points):  # the outputs of a classifier
            return values
        groups, members = points[index].groups, points[index].members
        for group, rotation in rotations.items():
            places = torch.nonzero(groups == group).squeeze(1)
            places = places[members[places].argsort(stable=True)]
            if len(places):
                values = values.clone()
                for turn in places.view(len(rotation), -1).unbind(1):
                    values[:, turn] = values[:, turn] @ rotation.to(values)
        return values

    if isinstance(rows, dict):
        return {key: make(key) for key in rows}
    return LazyState(rows, make)
