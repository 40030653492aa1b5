"""Whether the streams of two networks correspond, and what they look like where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from clafusion.errors import StructureError
from clafusion.tracing.layer import Layer, Stream, streams_of

__all__ = ["check_streams"]


def check_streams(names: tuple[str, str], ones: Sequence[Layer], others: Sequence[Layer]) -> None:
    """Refuse two networks whose streams are wired differently, given their layers.

    Streams correspond in order. Each must read what its partner reads: the same streams, and the
    same inputs of the model. ``names`` are what errors call the networks.

    Raises
    ------
    StructureError
        The message draws the streams of both, side by side, and marks those that differ.
    """
    of_ones, of_others = streams_of(ones), streams_of(others)
    wired, wired_others = ([stream.inputs for stream in of] for of in (of_ones, of_others))
    if wired == wired_others:
        return
    columns = [
        [name, *(_shown(of, i, layers) for i in range(len(of)))]
        for name, of, layers in (
            (names[0], of_ones, ones),
            (names[1], of_others, others),
        )
    ]
    rows = max(map(len, columns))
    left, right = (column + [""] * (rows - len(column)) for column in columns)
    width = max(map(len, left))
    pairs = zip_longest(wired, wired_others)
    marks = ["  ", *("  " if one == other else "> " for one, other in pairs)]
    drawn = "\n".join(
        f"{mark}{one:{width}}  |  {other}".rstrip()
        for mark, one, other in zip(marks, left, right, strict=True)
    )
    raise StructureError(
        f"the layers of {names[0]} lie on {len(of_ones)} stream(s), those of {names[1]} on "
        f"{len(of_others)}, and these are wired differently (at > they read other things, or only "
        f"one network has such a stream):\n{drawn}\nLayers are matched and "
        "inserted within a stream (an encoder, a decoder, a level of a U-Net). Give networks whose "
        "streams read the same, in the same order; clafusion.explain compares all layers"
    )


def _shown(streams: Sequence[Stream], index: int, layers: Sequence[Layer]) -> str:
    """Describe a stream in a line: its name, layers and channels, and what it reads."""
    stream = streams[index]
    own = [layer for layer in layers if layer.index in stream.layers]
    kinds = Counter(layer.kind.replace("_", " ") for layer in own)
    counts = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in kinds.items())
    widths = dict.fromkeys(len(one.hook_points[-1].groups) for one in own if one.hook_points)
    channels = f", {'/'.join(map(str, widths))} channels" if widths else ""
    reads = ", ".join(one if isinstance(one, str) else streams[one].name for one in stream.inputs)
    return f"{stream.name}: {counts}{channels}" + (f"; reads {reads}" if reads else "")
