"""Operations that take many values to few: sums, extremes, softmax, sorts, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clafusion.tracing.labels.ids import collapse, combine, fixed_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, rule
from clafusion.tracing.labels.rules.common import collapse_within, combined, joined, moving, reduced
from clafusion.tracing.labels.rules.elementwise import elementwise

# Reductions whose result changes when a value is there twice.
_COUNTING = frozenset("sum nansum norm logsumexp prod linalg_vector_norm count_nonzero".split())
_ADDING = frozenset("sum nansum mean".split())
_SORTING = frozenset("sort topk kthvalue".split())
_SPREADS = frozenset("var std var_mean std_mean".split())


@rule(
    *"""sum mean amax amin var std norm logsumexp prod any all nansum var_mean std_mean
    linalg_vector_norm max min median max_pool_all count_nonzero aminmax""".split()
)
def _reduction(propagation: LabelPropagation, call: Call) -> Label:
    """Reduce one operand over the axes ``dim``; ``max(a, b)`` and ``min(a, b)`` are elementwise."""
    operands = call.tensors()
    if len(operands) == 2:
        return elementwise(propagation, call)
    ids = propagation.activation(call.label_of(operands[0][1]), call.value_of(operands[0][1]))
    axes = call.concrete(call.bound.get("dim"))
    axes = [axes] if isinstance(axes, int) else list(axes or range(ids.dim()))
    axes = [axis % max(ids.dim(), 1) for axis in axes]
    if len(axes) == 1 and call.name in _ADDING:
        propagation.unite_stacked(ids, axes[0])
    results = reduced(propagation, call.node.name, ids, axes, _counts(call))
    # Where the model uses the index of the extreme value, channels keep their places.
    has_index = call.name in ("max", "min", "median") and isinstance(call.output, tuple)
    if has_index and _read(call) - {0}:
        propagation.pin(torch.where(results < 0, ids, -1))
    elif _takes_sets(propagation, ids, axes):
        propagation.lose(ids, "each of its results stands for several channels", as_wholes=True)
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    if outputs[0].dim() < ids.dim():
        results = results.flatten() if outputs[0].dim() == 0 else results.squeeze(tuple(axes))
        results = results.reshape(outputs[0].shape)
    return (results,) * len(outputs) if isinstance(call.output, tuple) else results


@rule("cosine_similarity", "pairwise_distance")
def _compared(propagation: LabelPropagation, call: Call) -> Label:
    """Compare two operands along one axis: their channels are the same."""
    operands = call.tensors()
    labels = [(call.label_of(node), call.value_of(node)) for _, node in operands]
    ids = combined(propagation, call.node.name, labels)
    axis = call.value("dim") if "dim" in call.bound else -1
    ids = propagation.activation(ids, torch.broadcast_tensors(*(one for _, one in labels))[0])
    return reduced(propagation, call.node.name + "_sum", ids, [axis], counts=True).reshape(
        call.output.shape
    )


def _read(call: Call) -> set[Any]:
    """Return which of an operation's results the model reads."""
    return {user.args[1] for user in call.node.users if user.users}


def _takes_sets(propagation: LabelPropagation, ids: Tensor, axes: Sequence[int]) -> bool:
    """Return whether a reduction takes several channels to one result, and others to others."""
    roots = propagation.roots(collapse_within(ids, axes))
    if bool((roots < 0).any()) or all(roots.size(axis) == 1 for axis in axes):
        return False
    (roots,) = collapse(roots)
    return sum(size > 1 for size in roots.shape) > 1


def _counts(call: Call) -> bool:
    """Return whether a reduction changes when all its values are there twice.

    A variance does unless it divides by their number itself, without a correction.
    """
    if call.name not in _SPREADS:
        return call.name in _COUNTING
    return bool(call.bound.get("unbiased", call.bound.get("correction", 1)) not in (0, False))


@rule(*"softmax _softmax log_softmax _log_softmax _safe_softmax softmin".split())
def _softmax(propagation: LabelPropagation, call: Call) -> Label:
    """Divide every value by a sum along one axis: each keeps its own label."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    sums = reduced(propagation, call.node.name, ids, [call.value("dim")], counts=True)
    return joined(call.node.name, [ids, sums.clamp(max=-1)], ids.shape)


@rule(*"cumsum cumprod logcumsumexp cummax cummin sort argsort topk argmax argmin kthvalue".split())
def _ordered(propagation: LabelPropagation, call: Call) -> Label:
    """Pin channels that lie along the axis, for the result depends on their order."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    axis = call.concrete(call.bound.get("dim"))
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    along = None if axis is None or ids.dim() == 0 else axis % ids.dim()
    row = ids if along is None else collapse_within(ids, [along])
    if along is None or row.size(along) > 1:
        gives_places = call.name == "argmax" or (
            isinstance(call.output, tuple) and bool(_read(call) - {0})
        )
        if gives_places and along is not None and call.name in ("topk", "argmax"):
            # Experts that a router chooses can change places together with its outputs.
            places = fixed_ids(f"{call.node.name}_places", [ids.size(along)])
            shape = [-1 if i == along else 1 for i in range(ids.dim())]
            propagation.meet(ids, places.view(shape).expand(ids.shape))
        else:
            propagation.pin(ids)
        if call.name in _SORTING and not gives_places:
            propagation.lose(ids, "it sorts values")
        row = torch.tensor(-1)
    elif outputs[0].dim() < ids.dim():
        row = row.squeeze(along)  # positions of one channel: the results are of that channel
    labels = tuple(
        moving(row, f"{call.node.name}{i}", output.shape) for i, output in enumerate(outputs)
    )
    return labels if isinstance(call.output, tuple) else labels[0]


@rule(
    *"""fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2
    fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn""".split()
)
def _fourier(propagation: LabelPropagation, call: Call) -> Label:
    """Transform positions; channels along a transformed axis keep their places."""
    ids = propagation.activation(call.label("self"), call.value("self"))
    dims = call.value("dim")
    if dims is None:
        count = len(call.bound.get("s") or range(ids.dim()))
        dims = list(range(ids.dim() - count, ids.dim()))
    axes = [axis % ids.dim() for axis in ([dims] if isinstance(dims, int) else dims)]
    row = collapse_within(ids, axes)
    if any(row.size(axis) > 1 for axis in axes):
        propagation.pin(ids)
        return fixed_ids(call.node.name, call.output.shape)
    return moving(row, call.node.name, call.output.shape)


@rule(
    *"""max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa lp_pool2d _upsample_nearest_exact1d _upsample_nearest_exact2d""".split()
)
def _pooling(propagation: LabelPropagation, call: Call) -> Label:
    """Mix positions: the label stays where all positions of a channel have the same label."""
    node = call.tensors()[0][1]
    ids = propagation.activation(call.label_of(node), call.value_of(node))
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    spatial = _spatial_axes(call.name, ids.dim())
    label = collapse_within(ids, spatial)
    if all(label.size(axis) == 1 for axis in spatial):
        if bool((label < 0).any()):
            label = torch.where(label >= 0, label, combine(call.node.name, [label.clamp(max=-1)]))
        label = label.expand(outputs[0].shape)
    else:
        propagation.pin(ids)  # channels along a pooled axis keep their places
        label = fixed_ids(call.node.name, outputs[0].shape)
    return (label,) * len(outputs) if isinstance(call.output, tuple) else label


def _spatial_axes(name: str, dims: int) -> list[int]:
    """Return the last axes, as many as the digit in the operation's name says."""
    count = next(int(digit) for digit in name if digit.isdigit())
    return list(range(dims - count, dims))
