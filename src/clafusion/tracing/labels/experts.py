"""Experts to which no example input comes."""

from __future__ import annotations

import torch

from clafusion.tracing.labels.interpreter import LabelPropagation

__all__ = ["UNREACHED", "settle_experts"]

UNREACHED = "no example input comes to this expert"


def settle_experts(propagation: LabelPropagation) -> None:
    """Let experts to which no example input comes read and write what all the others do.

    Their own channels keep their places, for nothing could be proved of them.

    Parameters
    ----------
    propagation
        A run on labels that is at its end.
    """
    for node, matrices, reached in propagation.experts:
        known = [one for one, is_reached in zip(matrices, reached, strict=True) if is_reached]
        unknown = [one for one, is_reached in zip(matrices, reached, strict=True) if not is_reached]
        for one in unknown if known else ():
            for axis, inward in ((0, [0]), (1, [])):
                size = one.tensor.size(axis)
                rows = [
                    propagation.weigh(of, "weight", {axis: propagation.fresh(size)}, inward)[axis]
                    for of in known
                ]
                rows = [propagation.roots(ids) for ids in rows]
                is_common = all(torch.equal(ids, rows[0]) for ids in rows)
                ids = rows[0] if is_common else propagation.fresh(size)
                own = propagation.weigh(one, "weight", {axis: ids}, inward)[axis]
                if not is_common:
                    propagation.pin(own)
                    propagation.lose(own, UNREACHED, node=node)
