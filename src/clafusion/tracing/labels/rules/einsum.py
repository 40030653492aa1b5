"""Products over several axes at once: einsum, and batches of matrices that are parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.tracing.labels.ids import fixed_ids
from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import (
    Call,
    ComputedWeight,
    Label,
    NotFollowed,
    ParameterView,
    rule,
)
from clafusion.tracing.labels.rules.common import moving, reduced
from clafusion.tracing.labels.rules.products import contracted
from clafusion.tracing.labels.rules.weighted import linear_labels

__all__ = ["product_labels"]


@dataclass(frozen=True)
class _Factor:
    """An operand: its label, its value, and a letter for each of its axes."""

    label: Label
    value: Tensor
    letters: str

    def size(self, letter: str) -> int:
        return self.value.size(self.letters.index(letter))

    def has(self, letter: str) -> bool:
        return letter in self.letters


@rule("einsum")
def _einsum(propagation: LabelPropagation, call: Call) -> Label:
    """Multiply the operands two by two, from the left."""
    operands = [(call.label_of(node), call.value_of(node)) for _, node in call.tensors()]
    inputs, output = _letters(call.value("equation"), [value.dim() for _, value in operands])
    factors = [_Factor(*one, names) for one, names in zip(operands, inputs, strict=True)]
    first = factors[0]
    for i, second in enumerate(factors[1:], 1):
        rest = "".join(one.letters for one in factors[i + 1 :]) + output
        last = i == len(factors) - 1
        wanted = output if last else "".join(dict.fromkeys(first.letters + second.letters))
        wanted = wanted if last else "".join(one for one in wanted if one in rest)
        label = product_labels(
            propagation, call, (first.label, first.value, first.letters),
            (second.label, second.value, second.letters), wanted,
        )  # fmt: skip
        first = _Factor(label, torch.empty(label.shape, device="meta"), wanted)
    if len(factors) > 1:
        assert isinstance(first.label, Tensor)
        return moving(first.label, call.node.name, call.output.shape)
    ids = propagation.activation(first.label, first.value)
    lost = [i for i, one in enumerate(first.letters) if one not in output]
    if lost:
        ids = reduced(propagation, call.node.name, ids, lost, counts=True).squeeze(lost)
    kept = [one for one in first.letters if one in output]
    return ids.permute([kept.index(one) for one in output])


def _letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of each operand's axes and of the result's, without dots."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    inputs = left.split(",")
    if not arrow:
        counts = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(one for one in set(counts) if counts.count(one) == 1)
        )
    longest = max(
        (dim - len(one) + 3 for one, dim in zip(inputs, dims, strict=True) if "..." in one),
        default=0,
    )
    dots = "".join(chr(0x3B1 + i) for i in range(longest))  # Greek letters, which nobody uses

    def full(letters: str, dim: int) -> str:
        count = dim - len(letters) + 3
        return letters.replace("...", dots[len(dots) - count :]) if "..." in letters else letters

    found = [full(one, dim) for one, dim in zip(inputs, dims, strict=True)]
    if any(len(set(one)) < len(one) for one in found):
        raise NotFollowed("it takes a diagonal")
    return found, right.replace("...", dots)


def product_labels(
    propagation: LabelPropagation,
    call: Call,
    first: tuple[Label, Tensor, str],
    second: tuple[Label, Tensor, str],
    output: str,
) -> Tensor:
    """Return the labels of a product of two operands, summed over the axes that it lacks.

    Parameters
    ----------
    propagation, call
        The running propagation and the operation.
    first, second
        The label, the value and the letters of the axes of each operand.
    output
        The letters of the result's axes.

    Raises
    ------
    NotFollowed
        The axes of a weight cannot be taken for those of a matrix.
    """
    left, right = (
        _without_own_sums(propagation, call, _Factor(*one), other[2] + output)
        for one, other in ((first, second), (second, first))
    )
    if propagation.is_trained(left.label) and not propagation.is_trained(right.label):
        left, right = right, left
    sizes = {one: factor.size(one) for factor in (right, left) for one in factor.letters}
    for one in left.letters:  # of axes that broadcast the size that is not 1
        sizes[one] = max(sizes[one], left.size(one))
    both = [one for one in left.letters if right.has(one)]
    batch = [one for one in both if one in output]
    inner = [one for one in both if one not in output]
    rows = [one for one in left.letters if one in output and one not in both]
    columns = [one for one in right.letters if one in output and one not in both]
    ids = propagation.activation(left.label, left.value)
    order = [left.letters.index(one) for one in (*batch, *rows, *inner)]
    b, m, k, n = (math.prod(sizes[one] for one in part) for part in (batch, rows, inner, columns))
    ids = ids.permute(order).expand([sizes[one] for one in (*batch, *rows, *inner)])
    ids = ids.reshape(b, m, k)
    if propagation.is_trained(right.label):
        places = [right.letters.index(one) for one in (*batch, *inner, *columns)]
        apart = _apart(right.value, places, len(batch), len(inner))
        rest = [one for one in places[len(batch) :] if one not in apart]
        copies = math.prod(right.value.size(one) for one in apart)
        result = _weighted(
            propagation,
            call,
            ids.repeat_interleave(copies, 0),
            right.label,
            [*places[: len(batch)], *apart, *rest],
            len(rest),
            (k, n // copies),
        )
        loose = [right.letters[one] for one in apart]
        letters = [*batch, *loose, *rows, *(one for one in columns if one not in loose)]
    else:
        others = propagation.activation(right.label, right.value)
        others = others.permute([right.letters.index(one) for one in (*batch, *inner, *columns)])
        others = others.expand([sizes[one] for one in (*batch, *inner, *columns)])
        result = contracted(propagation, call.node.name, ids, others.reshape(b, k, n))
        letters = [*batch, *rows, *columns]
    result = result.reshape([sizes[one] for one in letters])
    return result.permute([letters.index(one) for one in output])


def _apart(weight: Tensor, places: Sequence[int], batched: int, inner: int) -> list[int]:
    """Return those of a weight's outgoing axes that lie apart in memory: a matrix for each."""
    columns = list(places[batched + inner :])
    apart: list[int] = []
    while len(columns) > 1:
        last = [weight.stride(one) for one in columns]
        sizes = [weight.size(one) for one in columns]
        if all(last[i] == last[i + 1] * sizes[i + 1] for i in range(len(columns) - 1)):
            break
        apart.append(columns.pop(0))
    return apart


def _without_own_sums(
    propagation: LabelPropagation, call: Call, factor: _Factor, others: str
) -> _Factor:
    """Return an operand summed over the axes that neither another one nor the result has."""
    axes = [i for i, one in enumerate(factor.letters) if one not in others]
    if not axes:
        return factor
    if propagation.is_trained(factor.label):
        raise NotFollowed("it sums over an axis of its weight alone")
    ids = propagation.activation(factor.label, factor.value)
    ids = reduced(propagation, call.node.name + "_sum", ids, axes, counts=True).squeeze(axes)
    letters = "".join(one for one in factor.letters if one in others)
    return _Factor(ids, torch.empty(ids.shape, device="meta"), letters)


def _weighted(
    propagation: LabelPropagation,
    call: Call,
    ids: Tensor,
    weight: ParameterView | ComputedWeight,
    places: Sequence[int],
    of_matrix: int,
    matrix: tuple[int, int],
) -> Tensor:
    """Return the labels ``(batch, m, n)`` of a product with a weight, a matrix for each batch.

    ``places`` are the weight's axes, the last ``of_matrix`` of them those of a matrix.
    """

    def part(index: tuple[int, ...]) -> ParameterView | ComputedWeight:
        def change(tensor: Tensor) -> Tensor:
            return tensor.permute(list(places))[index].view(matrix)

        try:
            return weight.changed(change)
        except RuntimeError as cause:
            raise NotFollowed("its weight is no matrix in memory") from cause

    batched = len(places) - of_matrix
    sizes = [weight.tensor.size(place) for place in places[:batched]]
    indices = list(itertools.product(*map(range, sizes)))
    if len(indices) != len(ids):
        raise NotFollowed("its weight is spread over a batch")
    parts = [
        linear_labels(propagation, call, rows, part(index), (1, 0))
        for index, rows in zip(indices, ids.split(1), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    found = torch.cat(parts)
    return torch.where(found >= 0, found, fixed_ids(call.node.name, found.shape))
