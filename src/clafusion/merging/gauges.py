"""Average weights that the model divides by a norm of their own, as if they were plain ones."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from torch import Tensor

from clafusion.execution.lazy import LazyState
from clafusion.merging.problem import MergeWeights, Parent
from clafusion.tracing.model import TracedModel

__all__ = ["complete", "gauged"]


def gauged(parent: Parent) -> Parent:
    """Return a parent at whose parameters normalised weights are the parameters themselves."""
    source = parent.correspondence.source
    if not source.normalised:
        return parent
    return replace(
        parent, correspondence=replace(parent.correspondence, source=_gauged_model(source))
    )


def _gauged_model(model: TracedModel) -> TracedModel:
    own = model.state()
    by_name = {name: one for one in model.normalised for name in (one.parameter, *one.others)}

    def make(name: str) -> Tensor:
        return by_name[name].gauged(own).get(name, own[name]) if name in by_name else own[name]

    return replace(model, weights=LazyState(own, make))


def complete(
    fused: MutableMapping[str, Tensor],
    target: TracedModel,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[MergeWeights],
) -> None:
    """Give averaged weights the lengths and vectors that leave them as they are.

    Parameters
    ----------
    fused
        The averaged parameters, which this changes.
    target
        The target.
    states
        The parents' parameters in the target's structure. The vectors of a weight are those of
        the parent with the largest weight that has it.
    weights
        The parents' weights.
    """
    for one in target.normalised:
        having = [i for i, state in enumerate(states) if all(name in state for name in one.others)]
        if having:
            first = states[max(having, key=lambda i: weights[i].overall)]
            share = (
                1.0 if one.kind == "spectral" else _share(one.parameter, states, weights, having)
            )
            for name, value in one.completed(fused, first).items():
                fused[name] = (share * value).to(fused[name])


def _share(
    parameter: str,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[MergeWeights],
    having: Sequence[int],
) -> float:
    """Return the weight of the parents that have a parameter, of those that have its lengths.

    The lengths, or gains, of a layer that a parent lacks are zero, whatever the parameter is.
    """
    given = [weights[i].of(parameter) for i in having]
    own = [weight for i, weight in zip(having, given, strict=True) if parameter in states[i]]
    return sum(own) / sum(given) if sum(given) else 1.0
