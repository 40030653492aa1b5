r"""Layer weights: each layer of the fused network its own weights of the parents.

Sens-Merging (Liu et al., arXiv 2502.12420) scales each fine-tuned copy of a model, layer by layer,
by how much its loss changes, to first order, with the layer's parameters, set against the other
copies' by a softmax. Here networks have no common origin, other depths and no labels: sensitivities
are those of :func:`clafusion.profiling.importance.sensitivities`, and of matched layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from clafusion.errors import InputError
from clafusion.merging.problem import FusionProblem, MergeWeights

__all__ = ["weigh_layers"]


def weigh_layers(problem: FusionProblem) -> FusionProblem:
    r"""Return the problem with weights for each layer, by the layers' sensitivities.

    With :math:`a_{p,l}` the sensitivity of parent ``p``'s layer that stands at the target's layer
    ``l``, divided by the parent's sum over all layers that it shares with another parent, and
    :math:`w_p` its weight,

    .. math:: w_{p,l} = \frac{w_p\, a_{p,l}}{\sum_q w_q\, a_{q,l}} :

    the odds of the weights times the ratio of the sensitivities, which is a softmax of their
    logarithms. So equal ones, as of equal networks, give the weights themselves, a layer to which
    one network's outputs are not sensitive is the others' alone, and weights of 0 and 1 stay.

    Layers that only one network has keep the weights, and so does the layer that puts out the
    outputs, for those are what the weights are about; parameters that several layers share keep
    them, too.

    Do not expect much of it. With two networks that learnt the same task, two ResNets of CIFAR-10
    gained five points where they were averaged only, at 18 %, and lost two by REPAIR; by least
    squares, and with networks of MNIST, nearly nothing changed
    (``benchmarks/results/layer_weights.json``).

    Raises
    ------
    InputError
        A parent's sensitivities are missing.
    """
    for one in problem.parents:
        given, layers = one.profile.sensitivity, one.traced.layers
        if given is None or len(given) != len(layers):
            raise InputError(
                "layer_weights='sensitivity' needs the sensitivity of each of the "
                f"{len(layers)} layers of {one.name!r}; the profile has "
                f"{'none' if given is None else len(given)}: profile the model by the same options"
            )
    overall = [one.weights.overall for one in problem.parents]
    if max(overall) >= 1.0:
        return problem
    maps = [one.correspondence.layer_map for one in problem.parents]
    shared = [
        layer
        for layer in problem.target.layers
        if sum(one[layer.index] >= 0 for one in maps) > 1
        and not any(bool((point.groups < 0).all()) for point in layer.calibration_points)
    ]
    by_parent: list[dict[int, float]] = []
    for parent, of in zip(problem.parents, maps, strict=True):
        own = {one.index: of[one.index] for one in shared if of[one.index] >= 0}
        assert parent.profile.sensitivity is not None
        values = _normalised([float(parent.profile.sensitivity[k]) for k in own.values()])
        by_parent.append(dict(zip(own, values, strict=True)))
    uses = Counter(name for one in problem.target.layers for name in set(one.parameters))
    own_weights: list[dict[str, float]] = [{} for _ in problem.parents]
    for layer in shared:
        present = [i for i, one in enumerate(by_parent) if layer.index in one]
        found = _weights(
            [overall[i] for i in present], [by_parent[i][layer.index] for i in present]
        )
        for i, weight in zip(present, found, strict=True):
            own_weights[i].update({name: weight for name in layer.parameters if uses[name] == 1})
    return replace(
        problem,
        parents=tuple(
            replace(one, weights=MergeWeights(one.weights.overall, own))
            for one, own in zip(problem.parents, own_weights, strict=True)
        ),
    )


def _weights(overall: Sequence[float], sensitivities: Sequence[float]) -> list[float]:
    """Return the weights of the parents that have a layer; together they weigh what they did."""
    products = [one * other for one, other in zip(overall, sensitivities, strict=True)]
    total, whole = math.fsum(products), math.fsum(overall)
    if total == 0 or len(set(sensitivities)) == 1:
        return list(overall)
    return [whole * one / total for one in products]


def _normalised(values: Sequence[float]) -> list[float]:
    """Return values divided by their sum, all the same where that is 0."""
    total = math.fsum(values)
    return [one / total if total > 0 else 1.0 / len(values) for one in values]
