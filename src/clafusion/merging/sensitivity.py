r"""How much each model counts in each layer of a merge, by what its own task is sensitive to.

In the spirit of Sens-Merging (Liu et al., arXiv 2502.12420), which weighs the layers of fine-tuned
copies of a base by their sensitivity within a task and the copies by how their logits align across
tasks. Which formulas are the paper's to the letter we could not check. These are ours, for models
:math:`f_i` with parameters :math:`\theta_i` and inputs :math:`x` of their own tasks :math:`D_i`:

.. math::

    s_{i,l} &= \sum_{\theta \in l} \Bigl| \theta\, \frac{\partial}{\partial \theta}
        \sum_{x \in D_i} \lVert f_i(x) \rVert^2 \Bigr|, \qquad
    \alpha_{i,l} = s_{i,l} \Bigm/ \sqrt{\textstyle\sum_m s_{i,m}^2} \\
    g_{i,j} &= \sqrt{\frac{\sum_{x \in D_j} \lVert f_i(x) - f_j(x) \rVert^2}
        {\sum_{x \in D_j} \lVert f_j(x) \rVert^2}}, \qquad
    \tau_i = \sum_{j \ne i} \frac{1}{1 + g_{i,j}} \Bigm/
        \sum_{k, j \ne k} \frac{1}{1 + g_{k,j}} \\
    \sigma_{i,l} &= \frac{w_i \exp(\alpha_{i,l}\, \tau_i / T)}
        {\sum_k w_k \exp(\alpha_{k,l}\, \tau_k / T)}

and layer ``l`` of ``n`` models becomes :math:`\theta_0 + \lambda\, n \sum_i \sigma_{i,l}\,
(\theta_i - \theta_0)`: task arithmetic with weights of its own in each layer. The sensitivity is,
to first order, what setting each parameter to 0 would change. From the paper are the first-order
Taylor sensitivity of layers, the distance of logits on the other tasks' inputs, and the softmax
with a temperature ``T`` of their product. Ours are

- the squared norm of the outputs in place of a labelled loss, as inputs have no labels here;
- distances that are relative, and become alignments: the nearer a model's logits come to those of
  the other tasks' own models, the more it counts. Of logits of classes each row's mean is taken
  away first, which says nothing of the classes;
- the models' weights :math:`w_i` before the exponentials;
- a *layer*: the parameters that are one module's own.

With equal sensitivities and alignments, or a large ``T``, it is task arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from clafusion.errors import InputError

__all__ = ["alignments", "layer_of", "relative_sensitivities", "shares"]


def layer_of(parameter: str) -> str:
    """Return the module whose own a parameter is."""
    return parameter.rpartition(".")[0]


def relative_sensitivities(of_layers: Mapping[str, float]) -> dict[str, float]:
    r"""Return :math:`\alpha_{i,l}` of a model's layers, from :math:`s_{i,l}`.

    Where no layer is sensitive, all are alike.

    Raises
    ------
    InputError
        A sensitivity is not finite.
    """
    for name, one in of_layers.items():
        if not math.isfinite(one):
            raise InputError(f"the sensitivity of {name!r} is not finite: take another method")
    norm = math.sqrt(math.fsum(one * one for one in of_layers.values()))
    if not norm:
        return dict.fromkeys(of_layers, 1 / math.sqrt(max(len(of_layers), 1)))
    return {name: one / norm for name, one in of_layers.items()}


def alignments(distances: Sequence[Sequence[float]]) -> list[float]:
    r"""Return :math:`\tau_i` of each model; they add up to 1.

    Parameters
    ----------
    distances
        :math:`g_{i,j}`: how far model ``i`` is from model ``j`` on the inputs of task ``j``. Those
        of a model to itself are not read.

    Raises
    ------
    InputError
        A distance is not finite.
    """
    count = len(distances)
    if count == 1:
        return [1.0]
    found = []
    for i, row in enumerate(distances):
        others = [one for j, one in enumerate(row) if j != i]
        if not all(map(math.isfinite, others)):
            raise InputError("outputs of the models are not finite on one another's inputs")
        found.append(math.fsum(1 / (1 + one) for one in others))
    total = math.fsum(found)
    return [one / total for one in found]


def shares(
    sensitivities: Sequence[Mapping[str, float]],
    aligned: Sequence[float],
    weights: Sequence[float],
    temperature: float,
) -> dict[str, tuple[float, ...]]:
    r"""Return :math:`\sigma_{i,l}` of all models by the layer; of each layer they add up to 1.

    Parameters
    ----------
    sensitivities
        :math:`\alpha_{i,l}` of each model, with the same layers.
    aligned
        :math:`\tau_i` of each model.
    weights
        :math:`w_i`, above 0.
    temperature
        ``T``, above 0.
    """
    found = {}
    for layer in sensitivities[0]:
        powers = [
            one[layer] * align / temperature
            for one, align in zip(sensitivities, aligned, strict=True)
        ]
        most = max(powers)
        odds = [w * math.exp(one - most) for w, one in zip(weights, powers, strict=True)]
        total = math.fsum(odds)
        found[layer] = tuple(one / total for one in odds)
    return found
