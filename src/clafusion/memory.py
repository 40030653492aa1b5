"""How much memory a fusion needs, told before anything long begins."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, fx

from clafusion.alignment.models import label
from clafusion.calibration.least_squares.choice import ROWS_AT_ONCE, choice_rows
from clafusion.calibration.least_squares.hidden import MOST_FEATURES
from clafusion.calibration.least_squares.walks import Rows
from clafusion.config import Auto, FusionConfig, LeastSquares, Orthogonal, Sinkhorn, Unbalanced
from clafusion.errors import InputError
from clafusion.execution.heap import held_now
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import affine_operands
from clafusion.transport.solve import LARGEST_EXACT
from clafusion.weights.factories import Model, ModelFile

__all__ = [
    "NeededMemory",
    "activation_bytes",
    "bytes_of",
    "check_limit",
    "check_weights",
    "needed_memory",
    "shown",
]

_SCRATCH = 64 << 20  # bytes that libraries and the interpreter take on the way
_IN_WHOLE = 256 << 20  # bytes of a weight that is moved and averaged in whole, as most are
_COPIES = 3  # of a weight in float32, while it is moved and averaged
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**i for i, unit in enumerate("KMGT", 1)}
_TEXT = re.compile(r"(?P<number>\d+(\.\d+)?(e\+?\d\d?)?)\s*(?P<unit>([KMGT]I?)?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class NeededMemory:
    """The memory of a process, in bytes, as far as shapes tell it.

    Attributes
    ----------
    held
        What the process holds before: the code, the data and models that are no files.
    stages
        Stage -> what it adds, of which it lets go.
    """

    held: int
    stages: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most that the process holds at a time."""
        return self.held + max(self.stages.values())


def bytes_of(limit: int | str, argument: str) -> int:
    """Return an amount of memory in bytes, given in bytes or as ``"6GB"`` or ``"512 MiB"``.

    Raises
    ------
    InputError
        It is none. The message calls it ``argument``.
    """
    size: object = limit
    if isinstance(limit, str):
        found = _TEXT.fullmatch(limit.strip())
        if found is not None:
            amount = float(found["number"]) * _UNITS[found["unit"].upper()]
            size = int(amount) if math.isfinite(amount) else limit
    if not isinstance(size, Integral) or isinstance(size, bool) or size <= 0:
        raise InputError(
            f"{argument} must be an amount of memory as '6GB' or '800MiB', or a number of bytes; "
            f"got {limit!r}"
        )
    return int(size)


def shown(size: float) -> str:
    """Return an amount of memory as text, rounded up."""
    unit = next((one for one in "TGM" if size >= _UNITS[one]), "M")
    return f"{math.ceil(10 * size / _UNITS[unit]) / 10:g} {unit}B"


def check_limit(limit: int, needed: NeededMemory) -> None:
    """Refuse a limit within which a fusion cannot stay.

    Raises
    ------
    InputError
        The message says the least that would do, and which stage needs it.
    """
    if needed.peak <= limit:
        return
    stage = max(needed.stages, key=lambda one: needed.stages[one])
    raise InputError(
        f"memory_limit={shown(limit)!r} is too little: the least is about {shown(needed.peak)!r}. "
        f"The process holds {shown(needed.held)} before, and {stage!r} needs "
        f"{shown(needed.stages[stage])} more; fewer inputs need less"
    )


def check_weights(limit: int, models: Mapping[str, Model]) -> None:
    """Refuse a limit within which a single weight of a model cannot be moved.

    Raises
    ------
    InputError
        The message names the largest weight, and says how much it needs.
    """
    largest, of_model, called = 0, "", ""
    for name, model in models.items():
        module = model.open()[0] if isinstance(model, ModelFile) else model
        for parameter, one in module.named_parameters():
            if one.numel() > largest:
                largest, of_model, called = one.numel(), name, parameter
    held, needed = held_now(), _COPIES * 4 * largest
    if held + needed > limit:
        raise InputError(
            f"memory_limit={shown(limit)!r} is too little: {called!r} of {label(of_model)} "
            f"alone needs {shown(needed)}, and the process holds {shown(held)} before; the "
            f"least for it is {shown(held + needed)!r}"
        )


def needed_memory(models: Sequence[TracedModel], count: int, config: FusionConfig) -> NeededMemory:
    """Return how much memory a fusion within a limit needs at least.

    Rows and what is averaged then lie in files.

    Parameters
    ----------
    models
        The parents.
    count
        How many inputs the fusion sees.
    config
        The options.
    """
    activations = [activation_bytes(one, count) for one in models]
    largest = max(_largest_weight(one) for one in models)
    grams = sum(len(one.layers) for one in models) * min(count, _samples(config)) ** 2 * 8
    rows = max(_largest_rows(one, count, config) for one in models)
    groups = sorted((group.size for one in models for group in one.groups), reverse=True)
    # Costs in float64, in float32 what they are made from, or Sinkhorn's costs and its plan, and
    # what the search works with.
    matching = 24 * groups[0] ** 2 if groups else 0
    plans = _full_plans(models, config)
    calibrated = max(activations) + 6 * largest + 4 * min(largest, _IN_WHOLE)
    if isinstance(config.used_calibration, LeastSquares):
        calibrated = (
            sum(activations)
            + max(activations)
            + max(_choice_bytes(models, count), *(_regression_bytes(one, count) for one in models))
        )
    stages = {
        "profile": max(activations) + grams + 2 * largest,
        "match": sum(activations) + grams + 6 * rows + matching + plans + 2 * largest,
        "calibrate": grams + plans + calibrated,
    }
    return NeededMemory(held_now(), {name: _SCRATCH + size for name, size in stages.items()})


def activation_bytes(model: TracedModel, count: int) -> int:
    """Return how much memory values of a run on ``count`` inputs take at the most.

    A value is held until the last operation that reads it has run.
    """
    rows = model.example_inputs[0].size(0)
    roots: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    pending: dict[fx.Node, int] = {}
    held = most = 0
    for node in model.module.graph.nodes:
        if node.op != "call_function":
            continue
        root = roots[node] = _root(node, roots)
        pending[root] = pending.get(root, 0) + len(node.users)
        if root is node:
            sizes[node] = _size(node, model, count, rows)
            held += sizes[node]
            most = max(most, held)
        for operand in node.all_input_nodes:
            base = roots.get(operand)
            if base is not None:
                pending[base] -= 1
                if pending[base] == 0:
                    held -= sizes.pop(base, 0)
        if pending[root] == 0:
            held -= sizes.pop(root, 0)
    return most


def _root(node: fx.Node, roots: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Return the node whose memory a node's value is a view of; itself for memory of its own."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        aliases = target._schema.returns and target._schema.returns[0].alias_info is not None
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        return roots.get(first, node) if aliases and first is not None else node
    return roots.get(node.all_input_nodes[0], node) if node.all_input_nodes else node


def _size(node: fx.Node, model: TracedModel, count: int, rows: int) -> int:
    """Return the bytes of a node's value for ``count`` inputs, where the example has ``rows``."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    total = 0
    thinning = model.thinning
    share = 1.0
    if thinning is not None and node.name in thinning.thinned:
        share = thinning.count / thinning.positions
    for one in values:
        if not isinstance(one, Tensor):
            continue
        dtype = model.types.get(one.dtype, one.dtype)
        size = dtype.itemsize
        grows = False
        for length in one.shape:
            if isinstance(length, torch.SymInt):
                grows = True
                hint = length.node.hint
                size *= rows if hint is None else int(hint)
            else:
                size *= int(length)
        total += math.ceil(size * count / rows) if grows and model.static_batch is None else size
    return math.ceil(share * total)


def _largest_weight(model: TracedModel) -> int:
    """Return the bytes of the largest tensor, in float32."""
    return max((4 * one.numel() for one in model.module_state().values()), default=0)


def _regression_bytes(model: TracedModel, count: int) -> int:
    """Return the bytes of the largest regression: inputs and goals, sums, and what is solved."""
    state, nodes = model.module_state(), {node.name: node for node in model.module.graph.nodes}
    most = 0
    for layer in model.layers:
        positions = max((math.prod(one.positions) for one in layer.hook_points), default=1)
        for point in layer.calibration_points:
            if point.affine is None:
                continue
            kernel = model.entries.get(affine_operands(nodes[point.affine])["weight"])
            if kernel is None:
                continue
            outputs = len(point.groups)
            features = state[kernel].numel() // outputs
            rows = min(count * positions, Rows().number(features))
            sums = 2 * min(features, rows) ** 2 + features * (5 * outputs + 1)
            most = max(most, 4 * rows * (2 * features + 3 * outputs) + 8 * sums)
    return most


def _choice_bytes(models: Sequence[TracedModel], count: int) -> int:
    """Return the bytes of the largest choice among hidden channels of all models side by side.

    A layer's channels may be chosen where one layer alone reads them. Inner products, their
    inverse, that of those that are left and, of many outputs, the products of the readouts are
    matrices in float64; so are the readouts of all, each before and after its channels were put in
    order.
    """
    widest = [_widest_hidden(one) for one in models]
    features = min(sum(width for width, _, _ in widest), MOST_FEATURES)
    if features == 0:
        return 0
    outputs = sum(outputs for _, outputs, _ in widest)
    positions = max(positions for _, _, positions in widest)
    rows = min(count * positions, choice_rows(features))
    matrices = 5 * features**2 + 5 * features * outputs + 512 * features
    return 8 * matrices + features * (8 * rows + 8 * min(rows, ROWS_AT_ONCE))


def _widest_hidden(model: TracedModel) -> tuple[int, int, int]:
    """Return the most features that a layer reads of channels that no other one reads.

    With that layer's outputs and its positions; zeros for none.
    """
    state = model.module_state()
    sizes = {name: tuple(one.shape) for name, one in state.items()}
    places = {
        point.weight: math.prod(hook.positions)
        for layer in model.layers
        for point in layer.calibration_points
        for hook in layer.hook_points[:1]
    }
    found = [(0, 0, 1)]
    for group in model.groups:
        readers = [axis.use.parameter for axis in group.axes if axis.direction == "in"]
        if len(readers) == 1 and len(sizes.get(readers[0], ())) > 1:
            outputs, *features = sizes[readers[0]]
            found.append((math.prod(features), outputs, places.get(readers[0], 1)))
    return max(found)


def _full_plans(models: Sequence[TracedModel], config: FusionConfig) -> int:
    """Return the bytes of plans that are matrices: those of all parents but the reference."""
    solver = config.matching.solver
    if not isinstance(solver, (Auto, Orthogonal, Sinkhorn, Unbalanced)):
        return 0
    least, equal = 0, set[int]()
    if isinstance(solver, (Auto, Orthogonal)):
        # Equal sizes are assigned to each other, which is no matrix.
        least = LARGEST_EXACT
        equal = set.intersection(*({one.size for one in model.groups} for model in models))
    sizes = [
        sum(4 * one.size**2 for one in m.groups if one.size**2 > least and one.size not in equal)
        for m in models
    ]
    return sum(sizes) - max(sizes)


def _largest_rows(model: TracedModel, count: int, config: FusionConfig) -> int:
    most = config.profiling.matching_rows
    points = [point for layer in model.layers for point in layer.hook_points]
    return max(
        (4 * min(count * math.prod(one.positions), most) * len(one.groups) for one in points),
        default=0,
    )


def _samples(config: FusionConfig) -> int:
    return config.profiling.alignment_samples
