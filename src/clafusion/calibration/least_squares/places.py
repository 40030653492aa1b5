"""Which layers of the target are regressed, and where the parents show what they should put out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from clafusion.correspondence.correspondence import Correspondence
from clafusion.execution.call import State
from clafusion.merging.problem import FusionProblem
from clafusion.tracing.layer import CalibrationPoint, Layer
from clafusion.tracing.operations import (
    RESHAPES,
    affine_operands,
    bound_operands,
    is_affine_product,
    is_transposed,
    op_name,
)

__all__ = ["Place", "View", "regressed_places"]


@dataclass(frozen=True)
class View:
    """Where a parent shows what a layer of the target puts out: the channels and the node."""

    point: CalibrationPoint
    node: str


@dataclass(frozen=True)
class Place:
    """A layer of the target, and the nodes of all networks that it is regressed by.

    Attributes
    ----------
    point
        Its calibration point.
    affine, incoming
        Its linear or convolution node, and the node that feeds it.
    kernel, kernel_bias, kernel_size
        Its weight and bias, and the size of a convolution's kernel (else empty).
    is_transposed
        Whether the weight is ``(num_inputs, num_outputs)``.
    norm, epsilon
        The parameters of the BatchNorm behind it by role, or None, and what that adds to variances.
    shortcut
        What a residual addition adds to the layer's output, where the layer aims at the parents'
        sums.
    rectified
        Whether only a ReLU reads it.
    views
        For each parent where it shows the goal, None where the parent has no such layer.
    """

    point: CalibrationPoint
    affine: fx.Node
    incoming: str
    kernel: str
    kernel_bias: str | None
    kernel_size: tuple[int, ...]
    is_transposed: bool
    norm: Mapping[str, str] | None
    epsilon: float
    shortcut: str | None
    rectified: bool
    views: tuple[View | None, ...]

    @property
    def parameters(self) -> list[str]:
        """The names of the layer's parameters and of its BatchNorm's."""
        names = [self.kernel, self.kernel_bias, *(self.norm or {}).values()]
        return [name for name in names if name is not None]

    @property
    def is_output(self) -> bool:
        """Whether what it puts out are the network's outputs, which are in no group."""
        return bool((self.point.groups < 0).all())

    def num_features(self, kernel: Tensor) -> int:
        """Return how many numbers the layer multiplies for each output, given its weight."""
        return kernel.numel() // kernel.size(1 if self.is_transposed else 0)


def regressed_places(problem: FusionProblem, state: State) -> list[Place]:
    """Return the layers that can be regressed, in the order in which they are computed."""
    order = {node.name: i for i, node in enumerate(problem.target.module.graph.nodes)}
    places = [
        place
        for layer in problem.target.layers
        for point in layer.calibration_points
        if (place := _place(problem, state, layer, point)) is not None
    ]
    # What is solved for one of several that read a parameter would harm the others.
    shared = problem.target.shared_parameters | problem.frozen
    places = [place for place in places if shared.isdisjoint(place.parameters)]
    return sorted(places, key=lambda place: order[place.affine.name])


def _place(
    problem: FusionProblem, state: State, layer: Layer, point: CalibrationPoint
) -> Place | None:
    """Return what a layer is regressed by; None where it cannot be."""
    target = problem.target
    nodes = {node.name: node for node in target.module.graph.nodes}
    if point.affine is None or point.is_crossed:
        return None
    affine = nodes[point.affine]
    operands = affine_operands(affine)
    names = {role: target.entries.get(operand) for role, operand in operands.items()}
    kernel = names.get("weight")
    if kernel is None:
        return None
    kernel_size = tuple(state[kernel].shape[2:])
    if not _is_solvable(affine, kernel_size):
        return None
    norm, epsilon, kernel_bias = None, 0.0, point.bias
    if op_name(nodes[point.node]) == "batch_norm":
        kernel_bias = names.get("bias")
        norm = target.operand_names(nodes[point.node])
        epsilon = float(bound_operands(nodes[point.node])["eps"])
        if set(norm) != {"weight", "bias", "running_mean", "running_var"}:
            return None
    of_parents = [one.correspondence for one in problem.parents]
    if any(
        one.origins[point.weight] == "identity" and point.node not in one.points
        for one in of_parents
    ):
        return None  # what flows past an inserted layer does not show: there is no goal
    is_sum = point.join is not None and all(_has_sum(one, layer, point) for one in of_parents)
    views = tuple(_view(one, layer, point, is_sum) for one in of_parents)
    if not any(views):
        return None
    return Place(
        point,
        affine,
        operands["input"].name,
        kernel,
        kernel_bias,
        kernel_size,
        is_transposed(affine),
        norm,
        epsilon,
        point.shortcut if is_sum else None,
        not is_sum and _is_rectified(nodes[point.node]),
        views,
    )


def _has_sum(correspondence: Correspondence, layer: Layer, point: CalibrationPoint) -> bool:
    """Say whether a parent shows the sum of a residual addition, or what flows past it."""
    other = correspondence.points.get(point.node)
    if _passes(correspondence, layer, point):
        return True
    return other is not None and other.join is not None


def _passes(correspondence: Correspondence, layer: Layer, point: CalibrationPoint) -> bool:
    """Say whether a parent lacks the block whose last write this is, and shows what flows past it.

    A block may have sums inside, as that of a node's own features and its neighbours' in GraphSAGE.
    """
    return layer.index in correspondence.passing and point.weight in layer.last_write


def _view(
    correspondence: Correspondence, layer: Layer, point: CalibrationPoint, is_sum: bool
) -> View | None:
    if is_sum and _passes(correspondence, layer, point):
        passing = correspondence.passing[layer.index]
        return View(passing, passing.node)
    other = correspondence.points.get(point.node)
    if other is None:
        return None
    return View(other, other.join if is_sum and other.join is not None else other.node)


def _is_rectified(node: fx.Node) -> bool:
    return bool(node.users) and all(
        op_name(user) == "relu" or (op_name(user) in RESHAPES and _is_rectified(user))
        for user in node.users
    )


def _is_solvable(affine: fx.Node, kernel: Sequence[int]) -> bool:
    name = op_name(affine)
    if name == "linear" or is_affine_product(affine):
        return True
    bound = bound_operands(affine)
    uneven = bound["padding"] == "same" and any(size % 2 == 0 for size in kernel)
    return name in ("conv1d", "conv2d") and bound["groups"] == 1 and not uneven
