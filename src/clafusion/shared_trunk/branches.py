"""A parent's branch behind the trunk that it shares, as a fusion problem of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from clafusion.alignment.models import naming
from clafusion.correspondence.correspondence import correspond
from clafusion.correspondence.heads import unite_models
from clafusion.correspondence.inserted import check_inserted, warn_of_other_operations
from clafusion.correspondence.moving import move_state
from clafusion.correspondence.structure import resized_shape
from clafusion.errors import ClafusionError, StructureError
from clafusion.execution.call import State
from clafusion.execution.lazy import overlaid
from clafusion.merging.problem import FusionProblem, MergeWeights, Parent
from clafusion.profiling.profile import ModelProfile
from clafusion.reassembly.blocks import Block, block_module, nodes_between
from clafusion.reassembly.cutting import Cut, cuts_behind_layers
from clafusion.reassembly.network import Reassembled
from clafusion.tracing.layer import HookPoint
from clafusion.tracing.model import TracedModel
from clafusion.tracing.operations import bound_operands, op_name
from clafusion.tracing.trace import trace_like
from clafusion.transport.plan import TransportPlan
from clafusion.weights.build import with_weights

__all__ = ["Branch", "branch_of", "part_of"]

_TRUNK, _BRANCH = "parts.0.", "parts.1."
_ADVICE = "share fewer layers, or end the trunk behind another one (shared)"


@dataclass(frozen=True)
class Branch:
    """The shared trunk with one parent's branch.

    Attributes
    ----------
    problem
        The whole network as target, and the parent alone. What the trunk has is frozen.
    cut
        The value that the branch reads, in the target.
    trunk
        Parameter of the target -> that of the network that gives the trunk, for all in the trunk.
    moved
        The branch's parameters, in the trunk's channels.
    """

    problem: FusionProblem
    cut: Cut
    trunk: Mapping[str, str]
    moved: State

    def with_trunk(self, state: State) -> FusionProblem:
        """Return the problem with the trunk's weights, by the names of who gives the trunk."""
        target = self.problem.target
        of_trunk = {name: state[own] for name, own in self.trunk.items()}
        merged = overlaid(overlaid(target.state(), self.moved), of_trunk)
        return replace(self.problem, merged=merged, frozen=frozenset(self.trunk))


def part_of(model: TracedModel, start: Cut | None, end: Cut | None) -> fx.GraphModule:
    """Return a module that computes a part of a network; see :func:`block_module`."""
    return block_module(model, Block("", 0, start, end, (), 0))


def branch_of(
    trunk: FusionProblem,
    whole: ModelProfile,
    like: TracedModel,
    position: int,
    counts: tuple[int, int],
    cuts: tuple[Cut, Cut],
) -> Branch:
    """Put a parent's branch behind the trunk.

    Parameters
    ----------
    trunk
        The beginnings of all networks, matched.
    whole
        The profile of the parent's whole network.
    like
        The whole network that gives the trunk.
    position
        The parent's position.
    counts, cuts
        How many layers the trunk has in ``like`` and in the parent, and where it ends in both.

    Raises
    ------
    StructureError
        The branch does not run behind the trunk.
    """
    parent = trunk.parents[position]
    own = whole.traced
    with naming(parent.name):
        if own is like:
            target, cut = like, cuts[0]
            inside = nodes_between(like, None, cut)
            names = {one: one for node in inside if (one := like.entries.get(node)) is not None}
        else:
            sizes = _sizes(parent, counts[0])
            target = _target(like, own, counts, cuts, sizes)
            found = cuts_behind_layers(target)[counts[0] - 1]
            assert found is not None, "one value alone passes between the parts"
            cut = found
            names = {
                name: name.removeprefix(_TRUNK).replace("__", ".")
                for name in target.state()
                if name.startswith(_TRUNK)
            }
            names = _by_entries(names, like)
        if parent.head_orders:  # of groups of channels that the branch reads, too
            own = with_weights(own, parent.traced.state())
        behind = range(counts[1], len(own.layers))
        layer_map = (*parent.correspondence.layer_map, *behind)
        view, source = unite_models(target, own, layer_map)
        correspondence = correspond(view, source, layer_map)
        if target is not like:
            check_inserted(correspondence)
            warn_of_other_operations(correspondence, parent.name)
        here = view.layers[counts[0] - 1].hook_points[-1]
        there = parent.correspondence.target.layers[counts[0] - 1].hook_points[-1]
        shared = _plans_at(here, there, parent)
        plans = _plans(view, source, correspondence.groups, shared, names)
    made = Parent(
        parent.name, replace(whole, traced=source), correspondence, plans, MergeWeights(1.0)
    )
    moved = move_state(correspondence, plans)
    of_branch = {
        name: moved[name]
        for name in moved
        if name not in names and correspondence.origins[name] == "matched"
    }
    return Branch(FusionProblem(target, (made,)), cut, names, of_branch)


def _by_entries(names: Mapping[str, str], like: TracedModel) -> dict[str, str]:
    """Return the entries of a network that a block's names stand for: dots have become ``__``."""
    known = {one.replace(".", "__"): one for one in like.state()}
    return {name: known[own.replace(".", "__")] for name, own in names.items()}


def _sizes(parent: Parent, count: int) -> dict[int, int]:
    """Return how many channels those of the parent's groups get that the trunk has at its end."""
    there = parent.correspondence.target.layers[count - 1].hook_points[-1]
    groups = parent.correspondence.groups
    return {
        groups[one]: parent.correspondence.target.groups[one].size
        for one in there.groups[there.groups >= 0].unique().tolist()
        if groups[one] >= 0
    }


def _target(
    like: TracedModel,
    own: TracedModel,
    counts: tuple[int, int],
    cuts: tuple[Cut, Cut],
    sizes: Mapping[int, int],
) -> TracedModel:
    """Return the network of one's beginning and another one's end."""
    trunk = part_of(like, None, cuts[0])
    branch = part_of(own, cuts[1], None)
    _resize(branch, own, sizes)
    module = Reassembled([trunk, branch]).train(like.model.training)
    try:
        target = trace_like(module, like)
    except ClafusionError as error:
        raise StructureError(
            f"what lies behind {own.layers[counts[1] - 1].name!r} does not run on the "
            f"{cuts[0].channels} channels of the trunk, in place of {cuts[1].channels}: {error}. "
            f"Give networks of equal widths there, {_ADVICE}"
        ) from error
    wanted = [*like.layers[: counts[0]], *own.layers[counts[1] :]]
    if [one.structure for one in target.layers] != [one.structure for one in wanted]:
        raise StructureError(
            f"behind the trunk the layers from {own.layers[counts[1]].name!r} on are others than "
            f"in their own network: {_ADVICE}"
        )
    return target


def _resize(branch: fx.GraphModule, model: TracedModel, sizes: Mapping[int, int]) -> None:
    """Give a branch, in place, the trunk's number of channels; its weights do not matter."""
    names = {one.replace(".", "__"): one for one in model.state()}
    for name, one in [*branch.named_parameters(), *branch.named_buffers()]:
        if name not in names:
            continue
        shape = resized_shape(model, names[name], one.shape, sizes)
        if shape != tuple(one.shape):
            value = torch.ones(shape, dtype=one.dtype, device=one.device)
            if isinstance(one, nn.Parameter):
                setattr(branch, name, nn.Parameter(value, one.requires_grad))
            else:
                setattr(branch, name, value)
    for node in branch.graph.nodes:  # which say the width again
        if node.op == "call_function" and op_name(node) == "layer_norm":
            weight = bound_operands(node).get("weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                shape = tuple(getattr(branch, str(weight.target)).shape)
                node.args = (node.args[0], list(shape), *node.args[2:])
    branch.recompile()


def _plans_at(here: HookPoint, there: HookPoint, parent: Parent) -> dict[int, TransportPlan]:
    """Return the plans of the groups that the trunk has at its end, by the target's groups.

    ``here`` and ``there`` are that value in the target and in the trunk, whose groups may number
    their channels otherwise.
    """
    found: dict[int, TransportPlan] = {}
    for group in here.groups[here.groups >= 0].unique().tolist():
        at = torch.nonzero(here.groups == group).squeeze(1)
        others = there.groups[at].unique().tolist()
        plan = parent.plans[others[0]] if len(others) == 1 and others[0] >= 0 else None
        if plan is None:
            raise StructureError(f"the channels at the end of the trunk are others: {_ADVICE}")
        order = torch.empty(plan.shape[1], dtype=torch.int64)
        order[here.members[at]] = there.members[at].to(order)
        if bool((order == torch.arange(len(order))).all()):
            found[group] = plan
        else:
            found[group] = TransportPlan.from_dense(plan.dense()[:, order])
    return found


def _plans(
    target: TracedModel,
    source: TracedModel,
    groups: tuple[int, ...],
    shared: Mapping[int, TransportPlan],
    trunk: Mapping[str, str],
) -> tuple[TransportPlan | None, ...]:
    """Return the plans of all groups: what is within the branch stays, within the trunk is none."""
    found: list[TransportPlan | None] = []
    for group, other in zip(target.groups, groups, strict=True):
        plan = shared.get(group.index)
        is_read = any(axis.use.parameter not in trunk for axis in group.axes)
        if plan is None and is_read and other >= 0:
            size = source.groups[other].size
            if size != group.size:
                raise StructureError(
                    f"{group.name!r} has {group.size} channels behind the trunk, and {size} in its "
                    f"own network: {_ADVICE}"
                )
            plan = TransportPlan.identity(size)
        found.append(plan)
    return tuple(found)
