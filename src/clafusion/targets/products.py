r"""Layers that the target lacks, multiplied into the next ones (the layer merging of CLAFusion).

Of fully connected networks, ``W_{l+1} diag(d) W_l`` (arXiv 2110.15538) with ``d`` from the signs of
the layer's pre-activations over the inputs: 1 where their sum is positive, 1 where most of them
are, or the share that is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clafusion.errors import StructureError
from clafusion.profiling.profile import ModelProfile
from clafusion.tracing.layer import Layer
from clafusion.tracing.model import TracedModel

__all__ = ["layer_products"]


def layer_products(
    target: TracedModel, source: ModelProfile, layer_map: tuple[int, ...], merge: str
) -> dict[str, Tensor]:
    """Return the source's layers that the target lacks, multiplied into the next matched ones.

    Parameters
    ----------
    target
        The network that gives the structure.
    source
        The profile of the one that has more layers.
    layer_map
        For each layer of the target the source's.
    merge
        How they go: a value of the option ``target.merge``. By ``"least_squares"`` the product is
        only where the regression starts.

    Returns
    -------
    dict
        Parameter of the target -> what stands for it, in the source's channels. Empty where only
        residual blocks go, for those can be left out.

    Raises
    ------
    StructureError
        Layers to be merged by signs are not linear, have other than one weight matrix, or stand
        behind all that are matched.
    """
    layers, state = source.traced.layers, source.traced.state()
    gone = [one for one in layers if one.index not in layer_map]
    if not any(one.insertable == "identity" for one in gone):
        if gone and merge != "least_squares":
            raise StructureError(_not_linear(gone[0], merge))
        return {}
    made: dict[str, Tensor] = {}
    last = -1
    for layer, k in zip(target.layers, layer_map, strict=True):
        if k > last + 1:
            for i in range(last + 1, k):
                if layers[i].stream != layers[k].stream:
                    raise StructureError(
                        f"layer {layers[i].name!r} is the last of its stream: there is no layer "
                        "left on it into which it could be merged"
                    )
            product = dict(state)
            for i in reversed(range(last + 1, k)):
                _multiply(product, layers[k], source, layers[i], state, merge)
            names = zip(layer.parameters, layers[k].parameters, strict=True)
            made.update({name: product[other] for name, other in names})
        last = k
    if last + 1 < len(layers):
        raise StructureError(
            f"layer {layers[-1].name!r} comes after all that are matched: there is no layer left "
            "into which it could be merged"
        )
    return made


def _not_linear(layer: Layer, merge: str) -> str:
    return (
        f"layer {layer.name!r} is not a single linear layer, so that merge={merge!r} does not "
        "apply; use merge='least_squares'"
    )


def _multiply(
    product: dict[str, Tensor],
    into: Layer,
    source: ModelProfile,
    gone: Layer,
    state: Mapping[str, Tensor],
    merge: str,
) -> None:
    """Multiply an unmatched layer into the layer that stands behind it, in ``product``."""
    (into_weight, into_bias), (gone_weight, gone_bias) = (
        _weight_and_bias(layer, tensors, gone, into, merge)
        for layer, tensors in ((into, product), (gone, state))
    )
    z = source.rows[gone.index, len(gone.hook_points) - 1].double()
    if merge == "sum":
        d = (z.sum(0) > 0).double()
    else:
        d = (z > 0).double().mean(0)
        d = (d > 0.5).double() if merge == "majority" else d
    first, second = state[gone_weight].double(), product[into_weight].double()
    first = first.transpose(0, 1) if _is_transposed(source.traced, gone_weight) else first
    is_transposed = _is_transposed(source.traced, into_weight)
    second = second.transpose(0, 1) if is_transposed else second
    for size in reversed(first.shape[2:]):  # of a convolution the centre, where regression starts
        first = first.select(-1, size // 2)
    # Of a flattened image a channel stands for several columns.
    columns = second.reshape(len(second), len(first), -1)
    merged = torch.einsum("ocr,c,ci->oir", columns, d.to(columns), first)
    merged = merged.reshape(len(second), -1, *second.shape[2:]).to(state[gone_weight])
    product[into_weight] = merged.transpose(0, 1).contiguous() if is_transposed else merged
    if gone_bias is None or merge == "least_squares":
        return
    if into_bias is None:
        raise StructureError(
            f"layer {into.name!r} has no bias to take over that of {gone.name!r}, which is merged "
            f"into it by merge={merge!r}; use merge='least_squares'"
        )
    shift = second @ (d * state[gone_bias].double())
    product[into_bias] = (product[into_bias].double() + shift).to(product[into_bias])


def _is_transposed(model: TracedModel, weight: str) -> bool:
    """Return whether a matrix has its inputs on the first axis, not on the second."""
    return any(
        axis.axis == (0 if axis.direction == "in" else 1)
        for _, axis in model.axes_by_parameter.get(weight, ())
    )


def _weight_and_bias(
    layer: Layer, tensors: Mapping[str, Tensor], gone: Layer, into: Layer, merge: str
) -> tuple[str, str | None]:
    """Return the names of a layer's weight matrix, and of its bias where it is linear."""
    matrices = [name for name in layer.parameters if tensors[name].dim() >= 2]
    vectors = [name for name in layer.parameters if tensors[name].dim() == 1]
    is_linear = (
        len(matrices) == 1
        and tensors[matrices[0]].dim() == 2
        and len(matrices) + len(vectors) == len(layer.parameters) <= 2
    )
    if merge != "least_squares" and not is_linear:
        raise StructureError(_not_linear(layer, merge))
    if len(matrices) != 1:
        raise StructureError(
            f"layer {gone.name!r} cannot be merged into {into.name!r}: {layer.name!r} has "
            f"{len(matrices)} weight matrices, and one is needed; use target='deeper'"
        )
    return matrices[0], vectors[0] if is_linear and vectors else None
