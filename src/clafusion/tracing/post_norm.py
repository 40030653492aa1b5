"""Blocks of post-norm networks as layers that can be inserted."""

from __future__ import annotations

from collections.abc import Sequence

from clafusion.tracing.drafts import Draft
from clafusion.tracing.flow import Flow
from clafusion.tracing.insertion import insertion
from clafusion.tracing.operations import SAME_VALUES, op_name

__all__ = ["with_norms_before"]

# Without gain and bias, norm(norm(x)) = norm(x), but for what eps does.
_IDEMPOTENT = frozenset(["layer_norm", "rms_norm"])


def with_norms_before(flow: Flow, drafts: Sequence[Draft]) -> list[Draft]:
    """Return the drafts with blocks and the norms before them as one, where a norm follows again.

    A post-norm block ``norm(x + f(x))`` is no layer that could be inserted, for a norm is not the
    identity. What lies between the sums of two such blocks can: a norm without gain and bias, and a
    block that writes zero, change nothing for the norm behind them.
    """
    found: list[Draft] = []
    for i, draft in enumerate(drafts):
        following = drafts[i + 1] if i + 1 < len(drafts) else None
        previous = found[-1] if found else None
        if (
            previous is not None
            and following is not None
            and previous.kind == "norm"
            and _is_between_norms(flow, previous, draft, following)
            and insertion(flow, draft).insertable == "zero"
        ):
            norm, *same_values = previous.nodes
            found[-1] = Draft(
                "residual_block",
                [norm, *draft.nodes],
                previous.entry,
                [*previous.leading, *same_values, *draft.leading],
                stream=draft.stream,
                norm=norm,
                shortcut=draft.entry,
            )
        else:
            found.append(draft)
    return found


def _is_between_norms(flow: Flow, norm: Draft, block: Draft, following: Draft) -> bool:
    """Return whether only a norm's block reads it, and only an equal norm reads the block."""
    (first, *rest), sums = norm.nodes, block.nodes[-1]
    inside = {*norm.nodes, *block.leading, *block.nodes}
    again = following.nodes[0]
    return (
        op_name(first) in _IDEMPOTENT
        and block.kind == "residual_block"
        and op_name(sums) == "add"
        and all(op_name(one) in SAME_VALUES for one in (*rest, *block.leading, *following.leading))
        and all(user in inside for one in norm.nodes for user in one.users)
        and all(len(one.users) == 1 for one in (sums, *following.leading))
        and (op_name(again), flow.settings(again)) == (op_name(first), flow.settings(first))
        and again.all_input_nodes[0] in (sums, *following.leading)
    )
