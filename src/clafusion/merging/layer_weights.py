r"""Layer weights: each layer of the fused network its own share of the two networks.

Sens-Merging (Liu et al., arXiv 2502.12420) scales each fine-tuned copy of a model, layer by layer,
by how much its loss changes, to first order, with the layer's parameters, set against the other
copies' by a softmax. Here networks have no common origin, other depths and no labels: sensitivities
are those of :func:`clafusion.profiling.importance.sensitivities`, and of matched layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from clafusion.correspondence.correspondence import Correspondence
from clafusion.errors import InputError

__all__ = ["LayerWeights", "MergeWeights", "layer_shares"]

LayerWeights = Literal["uniform", "sensitivity"]


@dataclass(frozen=True)
class MergeWeights:
    """A network's share of each layer of the fused network.

    Attributes
    ----------
    overall
        Its share of the outputs, and of every layer that has no share of its own.
    own
        Parameter (or buffer) of the fused network -> its share.
    """

    overall: float
    own: Mapping[str, float] = field(default_factory=dict)

    def of(self, parameter: str) -> float:
        """Return the network's share of a parameter, and of the layer that it belongs to."""
        return self.own.get(parameter, self.overall)

    def rest(self) -> MergeWeights:
        """Return what is left for the other one of two networks."""
        return MergeWeights(1.0 - self.overall, {name: 1.0 - one for name, one in self.own.items()})

    def of_units(self, plan: Correspondence) -> tuple[float, ...]:
        """Return the network's share of each layer of ``plan.deep``."""
        return tuple(
            next((self.own[name] for name in layer.parameters if name in self.own), self.overall)
            for layer in plan.deep.layers
        )


def layer_shares(
    plan: Correspondence, weight: float, deep: Tensor | None, shallow: Tensor | None
) -> MergeWeights:
    r"""Return the deep network's share of each layer, by the layers' sensitivities.

    With :math:`a_u` the sensitivity of layer ``u`` of the deep network and :math:`b_u` that of its
    partner, each divided by its network's sum over all such layers, and ``w`` the weight, the deep
    network's share is

    .. math:: w_u = \frac{w\, a_u}{(1 - w)\, b_u + w\, a_u} :

    the weight's odds times the ratio of the sensitivities, which is a softmax of their logarithms.
    So equal ones, as of equal networks, give ``w`` itself, a layer to which one network's outputs
    are not sensitive is the other's alone, and the weights 0 and 1 stay as they are.

    Layers that only one network has keep ``w``, and so does the layer that puts out the outputs, for
    those are what the weight is about; parameters that several layers share keep it, too.

    Do not expect much of it. With two networks that learnt the same task, two ResNets of CIFAR-10
    gained five points where they were averaged only, at 18 %, and lost two by REPAIR; by least
    squares, and with networks of MNIST, nearly nothing changed
    (``benchmarks/results/layer_weights.json``).

    Parameters
    ----------
    plan
        What corresponds in the two networks.
    weight
        The deep network's share of the outputs, in [0, 1].
    deep, shallow
        The networks' :func:`clafusion.profiling.importance.layer_sensitivities`, ``(num_units,)``.

    Raises
    ------
    InputError
        A network's sensitivities are missing.
    """
    for graph, given in ((plan.deep, deep), (plan.shallow, shallow)):
        if given is None or len(given) != len(graph.layers):
            raise InputError(
                "layer_weights='sensitivity' needs the sensitivity of each of the "
                f"{len(graph.layers)} layers; the profile has "
                f"{'none' if given is None else len(given)}: profile the model by the same settings"
            )
    assert deep is not None
    assert shallow is not None
    if not 0.0 < weight < 1.0:
        return MergeWeights(weight)
    both = [
        layer
        for layer in plan.deep.layers
        if plan.partner[layer.index] >= 0
        and layer.index not in plan.target_only_layers
        and not any(bool((point.groups < 0).all()) for point in layer.calibration_points)
    ]
    of_deep = _normalised([float(deep[layer.index]) for layer in both])
    of_shallow = _normalised([float(shallow[plan.partner[layer.index]]) for layer in both])
    uses = Counter(name for layer in plan.deep.layers for name in set(layer.parameters))
    own = {}
    for layer, a, b in zip(both, of_deep, of_shallow, strict=True):
        share = weight if a == b else weight * a / ((1.0 - weight) * b + weight * a)
        own.update({name: share for name in layer.parameters if uses[name] == 1})
    return MergeWeights(weight, own)


def _normalised(values: Sequence[float]) -> list[float]:
    """Return values divided by their sum, all the same where that is 0."""
    total = math.fsum(values)
    return [one / total if total > 0 else 1.0 / len(values) for one in values]
