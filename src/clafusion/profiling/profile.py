"""TracedModel + data -> ModelProfile: all that alignment and matching need to know of a model.

One pass over the data for each model, streamed. Two things are kept, both of a fixed size however
long the data: a Gram matrix for each layer, over the first ``alignment_samples`` inputs, and for
each hook point the channels' values at ``matching_rows`` randomly chosen (input, position) pairs,
the same pairs for every model. Where these values would take more than 256 MB they can be kept in a
temporary file: see :mod:`clafusion.profiling.spilled`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.config import GRAPH_ROWS
from clafusion.errors import FusionWarning, InputError, StructureError, warn
from clafusion.execution.channels_last import is_channels_last
from clafusion.execution.walk import Walk
from clafusion.profiling.batches import Data, batches, has_rows, keeps_order
from clafusion.profiling.few_nodes import few_nodes
from clafusion.profiling.gram import gram_of_parts
from clafusion.profiling.masks import (
    counting_values,
    joined_masks,
    kept_positions,
    masks_of_parts,
    zeroed,
)
from clafusion.profiling.moments import (
    BatchMoments,
    joint_moments,
    moment_axes,
    observed_moments,
    side_by_side,
)
from clafusion.profiling.spilled import SpilledRows
from clafusion.tracing.graphs import samples_of_nodes
from clafusion.tracing.labels.ids import mix
from clafusion.tracing.layer import HookPoint, Layer
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import batch_axis, module_path, rows_kind
from clafusion.tracing.padding import MASK, mask_place
from clafusion.weights.storage import Spill

__all__ = ["ModelProfile", "Observer", "profile_models"]

Observer: TypeAlias = Callable[[TracedModel, tuple[Tensor, ...], Callable[[], list[Tensor]]], None]
"""What is told of a model's outputs: see :func:`profile_models`."""

_LEAST_INPUTS = 3  # of two, every two channels are correlated by 1 or -1
_MUCH = 1 << 28  # bytes of rows


@dataclass(frozen=True)
class ModelProfile:
    """What a model's layers and channels do on a set of inputs.

    Attributes
    ----------
    traced
        The model.
    grams
        For each layer ``(num_samples, num_samples)``: the inner products ``X X^T`` of its true
        output, flattened, between the first samples. Where the model was run.
    features
        For each layer the length of a flattened output.
    rows
        For each hook point ``(layer, index)`` the values ``(num_rows, num_channels)`` of its
        channels at the chosen pairs of input and position, before the nonlinearity, where no
        channel is dead. With ``layer_values="preactivation"`` also, with the key
        ``(layer, ~index)``, the values after the nonlinearity, and for the last layer, with the
        index after its last hook point, the outputs of a classifier.
    num_samples, num_inputs
        How many inputs the Gram matrices are over, and how many were seen in all.
    data_key
        Equal for profiles of the same inputs in the same order.
    importance
        For each channel group its channels' masses, see
        :func:`clafusion.profiling.importance.channel_importance`; empty where all count the same.
    sensitivity
        :func:`clafusion.profiling.importance.layer_sensitivities`, where layers are weighted by it.
    moments
        What :func:`clafusion.profiling.moments.observed_moments` returns, where that was asked for.
    batch_sizes
        How many inputs each batch of ``moments`` has; empty where there are none.
    structure
        The distances of a few nodes of a graph ``(num_nodes, num_nodes)``, where these are the rows
        of all hook points at nodes; else None.
    of_structure
        The places whose rows are of these nodes, and not of graphs or edges, which may be as many.
    """

    traced: TracedModel
    grams: tuple[Tensor, ...]
    features: tuple[int, ...]
    rows: Mapping[tuple[int, int], Tensor]
    num_samples: int
    num_inputs: int
    data_key: int
    importance: tuple[Tensor, ...] = ()
    moments: tuple[BatchMoments, ...] | None = None
    sensitivity: Tensor | None = None
    batch_sizes: tuple[int, ...] = ()
    structure: Tensor | None = None
    of_structure: frozenset[tuple[int, int]] = frozenset()

    def structure_at(self, place: tuple[int, int]) -> Tensor | None:
        """Return the structure of the nodes that a place's rows are of; None where it has none."""
        return self.structure if place in self.of_structure else None

    def __repr__(self) -> str:
        return f"<ModelProfile of {self.traced!r} on {self.num_inputs} inputs>"


def profile_models(
    models: Sequence[TracedModel],
    data: Data,
    *,
    alignment_samples: int,
    matching_rows: int,
    layer_values: str = "output",
    max_inputs: int | None = None,
    moments: bool = False,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
    called: Sequence[str] = (),
    spill: bool = False,
    most_rows: int | None = None,
    observe: Observer | None = None,
    graph_rows: str = "",
) -> list[ModelProfile]:
    """Profile several models on the same batches, in one pass over the data.

    Profiles can be compared if they were made from the same inputs in the same order. A
    DataLoader that shuffles gives another order each time, so the models of a pair are profiled
    together.

    Parameters
    ----------
    models
        Traced models with the same inputs.
    data
        A tensor, a list of batches or a DataLoader, with or without labels.
    alignment_samples
        How many inputs the Gram matrices are over. Each is held at once, as one batch: this
        bounds the memory.
    matching_rows
        How many (input, position) pairs are kept for each hook point.
    layer_values
        What the Gram matrices are of: the layers' outputs, or these before their nonlinearity.
    max_inputs
        Stop after this many inputs; None for all.
    moments
        Whether to record each batch's moments, too, over all inputs: what REPAIR needs.
    seed
        Seed of the choice of pairs.
    progress
        Called with a text and the number of inputs done.
    called
        What errors call each model; default the model.
    spill
        Whether rows may lie in a temporary file, where they would take much memory and all inputs
        run side by side.
    most_rows
        How many bytes of rows are much; default 256 MiB.
    observe
        Called with each model, the inputs that ran side by side, and a function that returns what
        the model puts out for them.
    graph_rows
        ``"edges"`` for rows that are what channels change along each edge of a graph, in place of
        what they are at its nodes; ``"structure"`` for rows of a few nodes that lie together, with
        their :attr:`ModelProfile.structure`.

    Raises
    ------
    InputError
        ``data`` is empty or does not fit the model, a number is not positive, the disk is full, or
        rows that only graphs have are asked of other networks.
    StructureError
        A layer puts out nothing that belongs to one input.
    """
    for name, value in (("alignment_samples", alignment_samples), ("matching_rows", matching_rows)):
        if value < 2:
            raise InputError(f"{name} must be at least 2; got {value}")
    if graph_rows and any(one.graph is None for one in models):
        cost = next(name for name, rows in GRAPH_ROWS.items() if rows == graph_rows)
        raise InputError(
            f"matching.cost={cost!r} is measured along the edges of a graph, and these networks "
            "take none: take 'correlation' or 'euclidean'"
        )
    at_once = moments and max_inputs is None  # one pass sees all inputs
    spill = (
        spill
        and max_inputs is None
        and models[0].graph is None
        and _rows_are_large(models, data, alignment_samples, matching_rows, most_rows or _MUCH)
    )
    recorders = [
        _Recorder(
            model,
            name,
            alignment_samples,
            matching_rows,
            layer_values,
            at_once,
            seed,
            spill,
            observe,
            graph_rows,
        )
        for model, name in zip(models, called or ["the model"] * len(models), strict=True)
    ]
    waiting: list[tuple[Tensor, ...]] = []
    sizes: list[int] = []
    seen = 0
    key = 0

    def flush() -> None:
        nonlocal seen
        if waiting:
            sizes.extend(one[0].size(0) for one in waiting)
            for recorder in recorders:
                recorder.record(waiting, seen)
            seen += sum(one[0].size(0) for one in waiting)
            waiting.clear()
            if progress is not None:
                progress("profile", seen)

    model = models[0]
    with torch.no_grad():
        for inputs in batches(data, model.example_inputs, model.keywords, device=model.device):
            if max_inputs is not None:
                left = max_inputs - seen - sum(one[0].size(0) for one in waiting)
                if left <= 0:
                    break
                if not any(one.takes_whole_batches for one in models):
                    inputs = tuple(one[:left] for one in inputs)
            key = _data_key(key, inputs)
            waiting.append(inputs)
            # The Gram matrices are over inputs that run side by side.
            if seen or sum(one[0].size(0) for one in waiting) >= alignment_samples:
                flush()
        flush()
    if seen < _LEAST_INPUTS:
        raise InputError(
            f"data has {seen} sample(s), of which nothing can be learnt: give at least "
            f"{_LEAST_INPUTS}, better a few hundred"
        )
    profiles = [recorder.profile(seen, key) for recorder in recorders]
    if moments and not at_once:
        return [_with_moments(one, data) for one in profiles]
    return [replace(one, batch_sizes=tuple(sizes)) for one in profiles] if moments else profiles


def _rows_are_large(
    models: Sequence[TracedModel], data: Data, samples: int, most: int, much: int
) -> bool:
    """Say whether rows of few inputs, which come in one order, would take more than ``much``."""
    points = [point for one in models for layer in one.layers for point in layer.hook_points]

    def are_large(count: int) -> bool:
        rows = (min(count * math.prod(point.positions), most) for point in points)
        sizes = (number * len(point.groups) for number, point in zip(rows, points, strict=True))
        return 4 * sum(sizes) > much

    # Reading data may take long, and most networks are small.
    if not are_large(samples) or not keeps_order(data) or has_rows(data, samples + 1):
        return False
    first = models[0]
    read = batches(data, first.example_inputs, first.keywords)
    return are_large(sum(inputs[0].size(0) for inputs in read))


def _with_moments(profile: ModelProfile, data: Data) -> ModelProfile:
    """Add the moments of all inputs, in a pass of its own."""
    model = profile.traced
    sizes = [one[0].size(0) for one in batches(data, model.example_inputs, model.keywords)]
    observed = tuple(observed_moments(model, data))
    return replace(profile, moments=observed, batch_sizes=tuple(sizes))


class _Recorder:
    """Collect one model's profile batch by batch."""

    def __init__(
        self,
        model: TracedModel,
        called: str,
        alignment_samples: int,
        matching_rows: int,
        layer_values: str,
        moments: bool,
        seed: int,
        spill: bool,
        observe: Observer | None,
        graph_rows: str,
    ) -> None:
        self.model = model
        self.graph_rows = graph_rows
        self.structure: Tensor | None = None
        self.few: Tensor | None = None  # the nodes of the structure
        self.called = called
        self.observe = observe
        self.state = model.state()
        self.alignment_samples = alignment_samples
        self.matching_rows = matching_rows
        self.seed = seed
        before = layer_values == "preactivation"
        self.layers = {
            _preactivation(layer) if before else layer.output: layer.index for layer in model.layers
        }
        self.batch_axes = {
            node.name: batch_axis(node)
            for node in model.module.graph.nodes
            if node.name in self.layers
        }
        self.points: dict[str, list[tuple[tuple[int, int], HookPoint]]] = {}
        for layer in model.layers:
            for i, point in enumerate(layer.hook_points):
                self.points.setdefault(point.pre, []).append(((layer.index, i), point))
                if before:
                    self.points.setdefault(point.post, []).append(((layer.index, ~i), point))
        if before and model.layers:
            self._add_classifier(model.layers[-1])
        self.grams: dict[int, Tensor] = {}
        self.features: dict[int, int] = {}
        self.samplers: dict[tuple[int, bool], _Sampler] = {}  # by positions, and if padded
        self.of_nodes: dict[str, _Sampler] = {}  # in a graph network, by the node of the graph
        self.mask: Tensor | None = None  # of the inputs that are recorded now
        self.at_hand: list[tuple[Tensor, ...]] = []  # the inputs that are recorded now
        self.kinds = {node.name: rows_kind(node) for node in model.module.graph.nodes}
        self.rows: dict[str, Tensor] | Spill = Spill() if spill else {}
        self.axes = moment_axes(model) if moments else {}
        self.moments: list[BatchMoments] | None = [] if moments else None
        watched = {*self.layers, *self.points, *self.axes}
        self.watched = [node.name for node in model.module.graph.nodes if node.name in watched]

    def _add_classifier(self, layer: Layer) -> None:
        """Record the outputs of a last layer whose channels are never moved."""
        last = layer.calibration_points[-1] if layer.calibration_points else None
        if last is not None and last.node == layer.output and bool((last.groups < 0).all()):
            axis, positions = last.axis, layer.output_shape
            point = HookPoint(last.node, last.node, axis, positions, last.groups, last.members)
            place = layer.index, len(layer.hook_points)
            self.points.setdefault(point.post, []).append((place, point))

    def record(self, waiting: Sequence[tuple[Tensor, ...]], start: int) -> None:
        """Run some batches side by side."""
        size = sum(inputs[0].size(0) for inputs in waiting)
        in_parts = [side_by_side(self.model, one) for one in waiting]
        counts = [part[0].size(0) for of_batch in in_parts for part in of_batch]
        masks = [
            mask
            for inputs, of_batch in zip(waiting, in_parts, strict=True)
            for mask in masks_of_parts(kept_positions(self.model, inputs), of_batch)
        ]
        self.at_hand = [part for of_batch in in_parts for part in of_batch]
        self.mask = joined_masks(masks, counts)
        if start == 0 and self.mask is not None:
            self._warn_of_lost_padding()
        for key, sampler in self.samplers.items():
            sampler.advance(start, size, self._counting(key))
        static = self.model.static_batch
        for inputs in waiting:
            if static is not None and inputs[0].size(0) != static:
                raise InputError(
                    f"{self.called} admits only batches of {static}, but one of "
                    f"{inputs[0].size(0)} is given; it fixes the batch size in its code"
                )
        walks = [
            [
                Walk(self.model, part, self.state, set(self.watched), fastest=True)
                for part in of_batch
            ]
            for of_batch in in_parts
        ]
        found: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in waiting]
        for node in self.watched:
            # In a call of its own: what is kept of a node is gone when the next one is computed.
            self._record_node(node, walks, masks, counts, found, start)
            for walk in chain.from_iterable(walks):
                walk.release(node)
        if self.observe is not None:
            of_parts = zip(chain.from_iterable(in_parts), chain.from_iterable(walks), strict=True)
            for part, walk in of_parts:
                self.observe(self.model, part, walk.output_tensors)
        if self.moments is not None:
            self.moments += found

    def _record_node(
        self,
        node: str,
        walks: Sequence[Sequence[Walk]],
        masks: Sequence[Tensor | None],
        counts: Sequence[int],
        found: Sequence[dict[str, tuple[Tensor, Tensor]]],
        start: int,
    ) -> None:
        """Run all parts of all batches up to a node, and record what is asked of it."""
        values = [[walk.reach(node) for walk in of_batch] for of_batch in walks]
        if node in self.axes:
            left = iter(masks)
            for moments, of_batch in zip(found, values, strict=True):
                counting = [
                    counting_values(self.model, node, value, next(left)) for value in of_batch
                ]
                moments[node] = joint_moments(of_batch, self.axes[node], counting)
        every = list(chain.from_iterable(values))
        if start == 0 and node in self.layers:
            layer = self.layers[node]
            flat = self._flat(node, every, counts, masks)
            self.grams[layer] = self._gram(layer, flat)
            self.features[layer] = flat[0].size(1)
        if node in self.points:
            self.rows[node] = self._sampled(node, every, counts, start)

    def _warn_of_lost_padding(self) -> None:
        """Warn where no value has the mask's positions, as where convolutions make fewer."""
        if self.model.padded_axes.keys().isdisjoint(self.watched):
            warn(
                f"padding counts in {self.called}: none of its values has the positions that "
                f"{MASK!r} leaves out, as it makes fewer or others of them. Give inputs of about "
                "equal lengths",
                FusionWarning,
            )

    def _gram(self, layer: int, flat: Sequence[Tensor]) -> Tensor:
        """Return the inner products of a layer's outputs; say which layer's cannot be taken."""
        try:
            return gram_of_parts(flat)
        except InputError as error:
            raise InputError(
                f"layer {self.model.layers[layer].name!r} of {self.called} puts out NaN, infinity "
                "or numbers too large for their squares: check the model, and the scale of the data"
            ) from error

    def _is_padded(self, node: str, positions: int) -> bool:
        """Say whether a node's positions are those of an attention mask."""
        place = mask_place(self.model.keywords)
        if place is None or node not in self.model.padded_axes:
            return False
        return self.model.example_inputs[place].size(1) == positions

    def _counting(self, key: tuple[int, bool]) -> NDArray[np.bool_] | None:
        """Return which pairs of input and position count in this record; None for all."""
        if self.mask is None or not key[1]:
            return None
        return np.asarray(self.mask.flatten().cpu())

    def _flat(
        self,
        node: str,
        values: Sequence[Any],
        counts: Sequence[int],
        masks: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Return a layer's outputs ``(num_inputs, features)``, in parts, up to the last sample.

        Of several outputs (an LSTM's) the first. What stands at padding is zero. The features'
        order is that of the first part in memory: to a Gram matrix it is all one.
        """
        axis = self.batch_axes[node]
        if self.model.graph is not None:
            values = self._by_nodes(node, values)
        rows: list[Tensor] = []
        inner_channels: bool | None = None
        for value, count, mask in zip(values, counts, masks, strict=True):
            one = value[0] if isinstance(value, (tuple, list)) else value
            if one.dim() == 0 or one.size(axis or 0) % count:
                name = self.model.layers[self.layers[node]].name
                raise self._without_rows(f"layer {name!r}", one, count)
            left = self.alignment_samples - sum(len(of_part) for of_part in rows)
            one = zeroed(one, counting_values(self.model, node, one, mask))
            one = one.movedim(axis or 0, 0)
            if inner_channels is None:
                inner_channels = is_channels_last(one)
            one = one.permute(0, 2, 3, 1) if inner_channels else one
            flat = one.reshape(count, -1)[:left]
            rows.append(flat if flat.is_floating_point() else flat.float())
        return [flat for flat in rows if len(flat)]

    def _by_nodes(self, node: str, values: Sequence[Any]) -> list[Tensor]:
        """Return a layer's outputs in a graph network, a sample for each of the inputs' nodes."""
        graph, axis = self.model.graph, self.batch_axes[node] or 0
        assert graph is not None
        found = []
        for value, inputs in zip(values, self.at_hand, strict=True):
            one = value[0] if isinstance(value, (tuple, list)) else value
            rows = samples_of_nodes(one.movedim(axis, 0), self.kinds[node], graph, inputs)
            found.append(rows.movedim(0, axis))
        return found

    def _sampled_rows(self, node: str, values: Sequence[Tensor]) -> Tensor:
        """Return the chosen rows of values of nodes, edges or graphs, and of those before."""
        (_, point), *_ = self.points[node]
        graph = self.model.graph
        assert graph is not None
        of_parts = [one.movedim((point.batch or 0, point.axis), (0, -1)) for one in values]
        of_nodes = self.kinds[node] == "nodes"
        if self.graph_rows == "structure" and of_nodes:
            if node in self.rows:
                return self.rows[node]
            if self.few is None:
                first = self.at_hand[0]
                self.few, self.structure = few_nodes(graph.edges(first), first[0].size(0))
            few = of_parts[0][self.few]
            return few.reshape(len(few), -1, few.size(-1)).mean(1).float()
        if self.graph_rows == "edges" and of_nodes:
            edges = [graph.edges(inputs) for inputs in self.at_hand]
            of_parts = [one[a] - one[b] for one, (a, b) in zip(of_parts, edges, strict=True)]
        last = torch.cat([one.contiguous() for one in of_parts])
        positions = last[0, ..., 0].numel()
        if node not in self.of_nodes:
            self.of_nodes[node] = _Sampler(positions, self.matching_rows, self.seed)
        sampler = self.of_nodes[node]
        sampler.advance(sampler.seen, len(last))
        index = np.unravel_index(sampler.candidates, last.shape[:-1])
        fresh = last[tuple(torch.from_numpy(axis) for axis in index)].float()
        kept = self.rows.get(node)
        both = fresh if kept is None else torch.cat([kept, fresh])
        return both[torch.from_numpy(sampler.keep).to(both.device)]

    def _sampled(
        self, node: str, values: Sequence[Tensor], counts: Sequence[int], start: int
    ) -> Tensor:
        """Return the chosen rows of values, of ``counts`` inputs each, and of those before."""
        if self.model.graph is not None:
            return self._sampled_rows(node, values)
        (_, point), *_ = self.points[node]
        axes = (point.batch or 0, point.axis)
        channels_last = [one.movedim(axes, (0, -1)) for one in values]
        if point.batch is None:
            channels_last = [
                one.unflatten(0, (count, -1)) if len(one) % count == 0 else one
                for one, count in zip(channels_last, counts, strict=True)
            ]
        for one, count in zip(channels_last, counts, strict=True):
            if point.batch is not None and len(one) != count:
                nodes = self.model.module.graph.nodes
                path = module_path(next(one for one in nodes if one.name == node))
                what = f"operation {node!r} in {path or 'the top level'!r}"
                raise self._without_rows(what, one, count)
        positions = channels_last[0][0, ..., 0].numel()
        key = positions, self._is_padded(node, positions)
        if key not in self.samplers:
            self.samplers[key] = _Sampler(positions, self.matching_rows, self.seed)
            self.samplers[key].advance(start, sum(counts), self._counting(key))
        sampler = self.samplers[key]
        ends = np.cumsum([len(one) * positions for one in channels_last])
        chosen = np.split(sampler.candidates, np.searchsorted(sampler.candidates, ends[:-1]))
        kept = self.rows.get(node)
        before = 0 if kept is None else len(kept)
        width = channels_last[0].size(-1)
        both = channels_last[0].new_empty(
            before + len(sampler.candidates), width, dtype=torch.float32
        )
        if kept is not None:
            both[:before] = kept
        fresh = both[before:].split([len(one) for one in chosen])
        for one, end, candidates, made in zip(channels_last, ends, chosen, fresh, strict=True):
            places = candidates - (end - len(one) * positions)
            _take(one, places, made)
        if len(sampler.keep) == len(both):
            return both
        return both[torch.from_numpy(sampler.keep).to(both.device)]

    def profile(self, num_inputs: int, key: int) -> ModelProfile:
        of_places = {place: node for node, places in self.points.items() for place, _ in places}
        rows: Mapping[tuple[int, int], Tensor]
        if isinstance(self.rows, Spill):
            rows = SpilledRows(of_places, self.rows, self.model.device)
        else:
            rows = {place: self.rows[node] for place, node in of_places.items()}
        count = len(self.model.layers)
        return ModelProfile(
            self.model,
            tuple(self.grams[i] for i in range(count)),
            tuple(self.features[i] for i in range(count)),
            rows,
            min(num_inputs, self.alignment_samples),
            num_inputs,
            key,
            moments=None if self.moments is None else tuple(self.moments),
            structure=self.structure,
            of_structure=frozenset(
                place
                for place, node in of_places.items()
                if self.structure is not None and self.kinds[node] == "nodes"
            ),
        )

    def _without_rows(self, name: str, value: Tensor, count: int) -> StructureError:
        """Return the error for a value that does not follow the batch; the caller raises it."""
        return StructureError(
            f"{self.called}: {name} puts out a tensor of shape {tuple(value.shape)} for {count} "
            "inputs, and so none of its own for each: the first axis of the model's inputs must be "
            "the batch"
        )


class _Sampler:
    """Choose pairs of input and position: those with the smallest hash.

    The choice depends on the inputs' numbers and on how many positions there are, but not on the
    model or on how the inputs are batched, so that the rows of two models belong together.
    """

    def __init__(self, positions: int, rows: int, seed: int) -> None:
        self.positions = positions
        self.rows = rows
        self.seed = seed
        self.kept = np.empty(0, dtype=np.uint64)
        self.seen = 0

    def advance(self, start: int, size: int, counting: NDArray[np.bool_] | None = None) -> None:
        """Move on to the next batch: which of its pairs to take, and which rows to keep then.

        ``counting`` says which pairs may be taken; None for all.
        """
        self.seen = start + size
        first = start * self.positions
        hashes = _hash(np.arange(first, first + size * self.positions, dtype=np.uint64), self.seed)
        if len(self.kept) == self.rows:
            self.candidates = np.flatnonzero(hashes < self.kept.max())
        else:
            self.candidates = np.arange(len(hashes))
        if counting is not None:
            self.candidates = self.candidates[counting[self.candidates]]
        hashes = hashes[self.candidates]
        if len(hashes) > self.rows:
            chosen = np.sort(np.argpartition(hashes, self.rows)[: self.rows])
            self.candidates, hashes = self.candidates[chosen], hashes[chosen]
        both = np.concatenate([self.kept, hashes])
        self.keep = np.arange(len(both))
        if len(both) > self.rows:
            self.keep = np.sort(np.argpartition(both, self.rows)[: self.rows])
        self.kept = both[self.keep]


def _take(value: Tensor, places: NDArray[np.int64], made: Tensor) -> None:
    """Copy the channels ``(..., num_channels)`` of a value at some of its positions."""
    if value.is_contiguous() and value.dtype == made.dtype:
        index = torch.from_numpy(places).to(value.device)
        torch.index_select(value.view(-1, value.size(-1)), 0, index, out=made)
    else:
        axes = np.unravel_index(places, value.shape[:-1])
        made.copy_(value[tuple(torch.from_numpy(axis) for axis in axes)])


def _preactivation(layer: Layer) -> str:
    """Return the node that holds a layer's output before its nonlinearity."""
    last = layer.hook_points[-1] if layer.hook_points else None
    return last.pre if last is not None and last.post == layer.output else layer.output


def _hash(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Scramble numbers: another order for each seed."""
    return mix((values + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15))


def _data_key(key: int, inputs: tuple[Tensor, ...]) -> int:
    """Go on with a checksum of each row's sums, which does not depend on the batches."""
    sums = [one.double().reshape(len(one), -1).sum(1) for one in inputs]
    if len({len(one) for one in sums}) > 1:  # of a graph
        return zlib.crc32(torch.cat(sums).cpu().numpy().tobytes(), key)
    return zlib.crc32(torch.stack(sums, 1).cpu().numpy().tobytes(), key)
