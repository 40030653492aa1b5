"""Networks that nobody wrote: a seed gives a description, a description gives a network.

A description is plain data, so that it can be printed, and changed by hand to find what of it
matters. ``shrunk`` does that by itself.
"""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.architectures import randomise

Description = dict[str, Any]

CLASSES = 5
FEATURES = 12
SIDE = 8
VOCABULARY = 20
EXAMPLE_LENGTH, LONGER, LONGEST = 5, 8, 10  # tokens: of the examples, of a test, in tables
WITH_LENGTH = ("tokens", "words")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "abs": torch.abs,
}

ORDERS = ["affine norm activation", "affine activation norm", "norm activation affine"]


# --- a seed -> a description --------------------------------------------------------------------


def describe(seed: int) -> Description:
    """Return the description of the network with this number."""
    draw = random.Random(seed)
    inputs = draw.choice(["vectors", "images", "tokens", "words"])
    style = _style(draw)
    blocks: list[Description] = []
    for _ in range(draw.randint(1, 3)):
        block = _block(draw, inputs, style)
        blocks.append(block)
        if block["kind"] not in ("constant", "pool"):
            for _ in range(draw.choice([0, 1, 1, 2])):
                blocks.append(_again(block, draw.random() < (0.7 if _may_go(block) else 0.1)))
        if draw.random() < 0.15:
            style = _style(draw)
    described: Description = {
        "inputs": inputs,
        "stem": {"out": _width(draw)} | style,
        "blocks": blocks,
        "container": draw.choice(["Sequential", "ModuleList"]),
        "skip": draw.choice([None] * 9 + ["cat"]),
        "norm": draw.choice(["none", style["norm"]]),
        "head": draw.choice(_HEADS[inputs]),
    }
    if inputs == "images":
        described["stem"]["kernel"] = draw.choice([1, 3])
    if inputs == "words":
        described["positions"] = draw.choice(["none", "learnt", "sines", "unsaved sines"])
    return described


_HEADS = {
    "vectors": ["linear"],
    "images": ["mean", "flatten", "max"],
    "tokens": ["mean", "first", "each"],
    "words": ["mean", "each", "tied"],
}
_KINDS = {
    "vectors": "layer layer residual residual branches gate squeeze shared constant".split(),
    "images": "layer residual residual branches gate squeeze shared pool pool constant".split(),
    "tokens": "layer residual attention attention branches gate squeeze shared constant".split(),
}
_KINDS["words"] = _KINDS["tokens"]


def _width(draw: random.Random) -> int:
    return draw.choice([8, 9, 10, 12, 16])


def _style(draw: random.Random) -> Description:
    """Return what neighbouring blocks of a network usually have in common."""
    return {
        "norm": draw.choice(["none", "none", "batch", "layer", "group"]),
        "order": draw.choice([ORDERS[0]] * 3 + ORDERS),
        "activation": draw.choice(["relu"] * 5 + [one for one in ACTIVATIONS if one != "none"]),
    }


def _may_go(block: Description) -> bool:
    """Return whether a network can most likely be without a block (or the one before it)."""
    if block["kind"] == "layer":
        return bool(block["activation"] in ("relu", "relu6", "abs"))
    if block["kind"] == "attention":
        return bool(block["way"] != "post")
    return block["kind"] == "residual" or bool(block.get("residual", False))


def _again(block: Description, dropped: bool) -> Description:
    """Return a block as deep again, which perhaps only the deeper one of two networks has."""
    again = copy.deepcopy(block)
    if "out" in again:
        again["out"] = None
    if again["kind"] == "residual":
        again |= {"shortcut": "identity", "stride": 1}
    if again["kind"] == "branches":
        again["join"] = "add"
    return again | ({"dropped": True} if dropped else {})


def _block(draw: random.Random, inputs: str, style: Description) -> Description:
    kind = draw.choice(_KINDS[inputs])
    kernel = draw.choice([1, 3]) if inputs == "images" else 1
    if kind == "layer":
        return {
            "kind": kind,
            "out": draw.choice([None, _width(draw)]),
            "kernel": kernel,
            "bias": draw.random() < 0.7,
        } | style
    if kind == "residual":
        return {
            "kind": kind,
            "hidden": _width(draw),
            "out": _width(draw),
            "shortcut": draw.choice(["identity", "identity", "linear", "pad"]),
            "stride": draw.choice([1, 1, 2]) if inputs == "images" else 1,
            "middle": draw.choice(["none"] * 3 + ["depthwise", "grouped"])
            if inputs == "images"
            else "none",
            "way": draw.choice(["pre", "post", "plain"]),
            "scale": draw.choice(["none"] * 4 + ["channels", "one", "buffer"]),
            "kernel": kernel,
        } | style
    if kind == "branches":
        return {
            "kind": kind,
            "out": _width(draw),
            "count": draw.choice([2, 3]),
            "join": draw.choice(["add", "cat", "cat"]),
            "kernel": kernel,
        } | style
    if kind == "gate":
        return {
            "kind": kind,
            "hidden": _width(draw),
            "how": draw.choice(["glu", "chunk", "apart"]),
            "residual": draw.random() < 0.6,
            "norm": style["norm"],
        }
    if kind == "squeeze":
        return {
            "kind": kind,
            "hidden": draw.choice([4, 8]),
            "gate": draw.choice(["sigmoid", "hardsigmoid"]),
        }
    if kind == "shared":
        return {
            "kind": kind,
            "how": draw.choice(["twice", "two names", "transposed"]),
            "hidden": _width(draw),
            "activation": style["activation"],
            "residual": draw.random() < 0.5,
        }
    if kind == "pool":
        return {"kind": kind, "how": draw.choice(["max", "avg"])}
    if kind == "constant":
        return {
            "kind": kind,
            "over": draw.choice(["positions", "positions", "one", "one", "channels"]),
            "stored": draw.choice(["buffer", "unsaved buffer", "attribute"]),
            "how": draw.choice(["add", "multiply"]),
        }
    heads = draw.choice([1, 2, 3, 4])
    return {
        "kind": "attention",
        "heads": heads,
        "kept": draw.choice([heads, heads, 1]),
        "size": draw.choice([3, 4]),
        "fused": draw.random() < 0.5,
        "by": draw.choice(["sdpa", "softmax", "MultiheadAttention"]),
        "mask": draw.choice(["none", "none", "buffer", "unsaved buffer", "made"]),
        "way": draw.choice(["pre", "pre", "post", "plain"]),
        "norm": draw.choice(["layer", style["norm"]]),
        "scale": draw.choice(["none"] * 3 + ["channels", "one"]),
    }


def shallower(description: Description) -> Description:
    """Return the description without the blocks that only the deeper network has."""
    kept = [one for one in description["blocks"] if not one.get("dropped")]
    return description | {"blocks": kept}


# --- a description -> a network -----------------------------------------------------------------


def build(description: Description, seed: int = 0) -> nn.Module:
    """Return the network of a description. The constants are the same whatever the seed."""
    torch.manual_seed(seed)
    model = randomise(Generated(description), seed)
    with torch.no_grad():
        for one in model.parameters():
            if one.dim() > 1:
                one *= 0.7  # so that many layers in a row do not let the values explode
    return model


def examples(description: Description, count: int, seed: int = 0, longer: bool = False) -> Tensor:
    """Return inputs for a network."""
    draw = torch.Generator().manual_seed(seed)
    length = LONGER if longer else EXAMPLE_LENGTH
    inputs = description["inputs"]
    if inputs == "words":
        return torch.randint(0, VOCABULARY, (count, length), generator=draw)
    shape = {
        "vectors": (FEATURES,),
        "images": (3, SIDE, SIDE),
        "tokens": (length, FEATURES),
    }[inputs]
    return torch.randn(count, *shape, generator=draw)


def takes_longer(description: Description) -> bool:
    return description["inputs"] in WITH_LENGTH


class Generated(nn.Module):
    """The network of a description."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.inputs, self.kind = description["inputs"], description["head"]
        self.skip = description["skip"]
        images = self.inputs == "images"
        stem = description["stem"]
        width = stem["out"]
        if self.inputs == "words":
            self.stem = nn.Embedding(VOCABULARY, width)
            self.positions = Positions(description["positions"], width)
        else:
            into = 3 if images else FEATURES
            self.stem = Layer(into, {"kernel": 1, "bias": True} | stem, self.inputs)
        self.side = SIDE
        blocks = []
        for one in description["blocks"]:
            block = BLOCKS[one["kind"]](width, one, self.inputs)
            width = getattr(block, "out", width)
            blocks.append(block)
        self.blocks = getattr(nn, description["container"])(
            *([blocks] if description["container"] == "ModuleList" else blocks)
        )
        shrunk = any(
            one["kind"] == "pool" or one.get("stride") == 2 for one in description["blocks"]
        )
        if shrunk:
            self.skip = None
        if self.skip:
            width += stem["out"]
        if self.kind == "tied":
            self.last = nn.Linear(width, stem["out"])
        self.norm = Norm(description["norm"], width, self.inputs)
        if self.kind != "tied":
            self.head = nn.Linear(width * (4 if self.kind == "flatten" else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.inputs == "words":
            x = self.positions(x)
        early = x
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        if self.skip:
            x = torch.cat([x, early], 1 if self.inputs == "images" else -1)
        x = self.norm(x)
        if self.kind == "tied":
            return self.last(x) @ self.stem.weight.t()
        if self.kind == "flatten":
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        elif self.kind == "max":
            x = x.amax((2, 3))
        elif self.kind == "mean":
            x = x.mean((2, 3) if self.inputs == "images" else 1)
        elif self.kind == "first":
            x = x[:, 0]
        return self.head(x)


class Norm(nn.Module):
    def __init__(self, kind: str, width: int, inputs: str) -> None:
        super().__init__()
        self.kind, self.images = kind, inputs == "images"
        self.tokens = inputs in WITH_LENGTH
        if kind == "batch":
            self.norm = nn.BatchNorm2d(width) if self.images else nn.BatchNorm1d(width)
        elif kind == "layer":
            self.norm = nn.LayerNorm(width)
        elif kind == "group":
            self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "layer" and self.images:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.kind != "layer" and self.tokens:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(x)


def affine(into: int, out: int, inputs: str, kernel=1, bias=True, stride=1, groups=1) -> nn.Module:
    if inputs == "images":
        return nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=bias, groups=groups)
    return nn.Linear(into, out, bias)


class Layer(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.out = given["out"] or into
        self.order = given["order"].split()
        self.affine = affine(into, self.out, inputs, given["kernel"], given["bias"])
        self.norm = Norm(given["norm"], into if self.order[0] == "norm" else self.out, inputs)
        self.activation = ACTIVATIONS[given["activation"]]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class Scale(nn.Module):
    """Layer scale: how much of a branch is added to the stream."""

    def __init__(self, kind: str, width: int, inputs: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "channels":
            self.scale = nn.Parameter(torch.ones(width, *([1, 1] if inputs == "images" else [])))
        elif kind == "one":
            self.scale = nn.Parameter(torch.ones(()))
        elif kind == "buffer":
            self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.kind == "none" else x * self.scale


class Residual(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.shortcut, self.stride = given["shortcut"], given["stride"]
        if self.stride == 2 and self.shortcut == "identity":
            self.stride = 1
        self.out = out = into if self.shortcut == "identity" else given["out"] or into
        if self.shortcut == "pad":
            self.out = out = max(into, out)
        self.way, self.images = given["way"], inputs == "images"
        hidden, kernel = given["hidden"], given["kernel"]
        before = self.way == "pre"
        self.activation = ACTIVATIONS[given["activation"]]
        self.norm1 = Norm(given["norm"], into if before else hidden, inputs)
        self.affine1 = affine(into, hidden, inputs, kernel, True, self.stride)
        groups = {"none": 0, "depthwise": hidden, "grouped": 1 if hidden % 2 else 2}
        self.middle = groups[given["middle"]]
        if self.middle:
            self.affine3 = affine(hidden, hidden, inputs, 3, True, 1, self.middle)
        self.norm2 = Norm(given["norm"], hidden if before else out, inputs)
        self.affine2 = affine(hidden, out, inputs, kernel)
        self.scale = Scale(given["scale"], out, inputs)
        if self.shortcut == "linear":
            self.short = affine(into, out, inputs, 1, False, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.way == "pre":
            y = self.activation(self.norm1(y))
        y = self.affine1(y)
        if self.way != "pre":
            y = self.activation(self.norm1(y))
        if self.middle:
            y = self.activation(self.affine3(y))
        if self.way == "pre":
            y = self.activation(self.norm2(y))
        y = self.affine2(y)
        if self.way != "pre":
            y = self.norm2(y)
        y = self.scale(y)
        if self.shortcut == "linear":
            x = self.short(x)
        elif self.shortcut == "pad":
            more = y.size(1 if self.images else -1) - x.size(1 if self.images else -1)
            sides = (more // 2, more - more // 2)
            x = x[:, :, :: self.stride, :: self.stride] if self.images else x
            x = F.pad(x, (0, 0, 0, 0, *sides) if self.images else sides)
        return self.activation(x + y) if self.way == "post" else x + y


class Branches(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.join, self.axis = given["join"], 1 if inputs == "images" else -1
        width = given["out"] or into
        widths = [width + (i if self.join == "cat" else 0) for i in range(given["count"])]
        self.out = sum(widths) if self.join == "cat" else width
        self.branches = nn.ModuleList(
            Layer(into, {"kernel": 1, "bias": True} | given | {"out": one}, inputs)
            for one in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [one(x) for one in self.branches]
        return torch.cat(found, self.axis) if self.join == "cat" else sum(found)


class Gate(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        hidden = given["hidden"]
        self.how, self.residual = given["how"], given["residual"]
        self.axis = 1 if inputs == "images" else -1
        self.norm = Norm(given["norm"], into, inputs)
        if self.how == "apart":
            self.gate, self.value = (affine(into, hidden, inputs) for _ in range(2))
        else:
            self.both = affine(into, 2 * hidden, inputs)
        self.down = affine(hidden, into, inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.how == "apart":
            y = F.silu(self.gate(y)) * self.value(y)
        elif self.how == "glu":
            y = F.glu(self.both(y), self.axis)
        else:
            gate, value = self.both(y).chunk(2, self.axis)
            y = torch.sigmoid(gate) * value
        y = self.down(y)
        return x + y if self.residual else y


class Squeeze(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.inputs = inputs
        self.down = affine(into, given["hidden"], inputs)
        self.up = affine(given["hidden"], into, inputs)
        self.gate = getattr(F, given["gate"])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.inputs == "images":
            y = x.mean((2, 3), keepdim=True)
        elif self.inputs != "vectors":
            y = x.mean(1, keepdim=True)
        return x * self.gate(self.up(F.relu(self.down(y))))


class Shared(nn.Module):
    """One weight that is used twice."""

    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.how, self.residual, self.images = given["how"], given["residual"], inputs == "images"
        self.activation = ACTIVATIONS[given["activation"]]
        hidden = given["hidden"] if self.how == "transposed" else into
        self.one = affine(into, hidden, inputs)
        if self.how == "two names":
            self.other = affine(into, into, inputs)
            self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.one(x))
        if self.how == "twice":
            y = self.activation(self.one(y))
        elif self.how == "two names":
            y = self.activation(self.other(y))
        elif self.images:
            y = F.conv2d(y, self.one.weight.transpose(0, 1))
        else:
            y = F.linear(y, self.one.weight.t())
        return x + y if self.residual else y


class Pool(nn.Module):
    def __init__(self, into: int, given: Description, inputs: str) -> None:  # noqa: ARG002
        super().__init__()
        self.how = given["how"]

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) < 4:
            return x
        return F.max_pool2d(x, 2) if self.how == "max" else F.avg_pool2d(x, 2)


class Stored(nn.Module):
    """A module with a constant, stored in one of three ways."""

    def store(self, name: str, value: Tensor, how: str) -> None:
        if how == "attribute":
            setattr(self, name, value)
        else:
            self.register_buffer(name, value, persistent=how == "buffer")


class Constant(Stored):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.over, self.how, self.tokens = given["over"], given["how"], inputs in WITH_LENGTH
        channels = into if self.over == "channels" else 1
        positions = self.over == "positions"
        shape: tuple[int, ...] = (channels,)
        if inputs == "images":
            shape = (channels, SIDE, 1) if positions else (channels, 1, 1)
        elif self.tokens:
            shape = (LONGEST if positions else 1, channels)
        draw = torch.Generator().manual_seed(len(shape))
        self.store("table", torch.rand(shape, generator=draw) + 0.5, given["stored"])

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        if self.over == "positions" and self.tokens:
            table = table[: x.size(1)]
        elif self.over == "positions" and x.dim() == 4:
            table = table[:, : x.size(2)]
        return x + table if self.how == "add" else x * table


class Positions(Stored):
    """Positions of words: more than any example has."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "learnt":
            self.table = nn.Embedding(LONGEST, width)
        elif kind != "none":
            angles = torch.arange(LONGEST)[:, None] / 10 ** torch.linspace(0, 2, width)
            stored = "buffer" if kind == "sines" else "unsaved buffer"
            self.store("table", angles.sin(), stored)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "learnt":
            return x + self.table(torch.arange(x.size(1), device=x.device))
        return x + self.table[: x.size(1)]


class Attention(Stored):
    def __init__(self, into: int, given: Description, inputs: str) -> None:
        super().__init__()
        self.by, self.way, self.mask_kind = given["by"], given["way"], given["mask"]
        self.heads, self.kept, self.size = given["heads"], given["kept"], given["size"]
        self.norm = Norm(given["norm"], into, inputs)
        if self.by == "MultiheadAttention":
            heads = max(one for one in range(1, self.heads + 1) if into % one == 0)
            self.attention = nn.MultiheadAttention(into, heads, batch_first=True)
        else:
            inner, kept = self.heads * self.size, self.kept * self.size
            self.sizes = [inner, kept, kept]
            self.fused = given["fused"]
            if self.fused:
                self.all = nn.Linear(into, sum(self.sizes))
            else:
                self.queries, self.keys, self.values = (nn.Linear(into, one) for one in self.sizes)
            self.last = nn.Linear(inner, into)
        self.scale = Scale(given["scale"], into, inputs)
        if self.mask_kind in ("buffer", "unsaved buffer"):
            self.store("mask", torch.ones(LONGEST, LONGEST).triu(1).bool(), self.mask_kind)

    def hidden(self, length: int) -> Tensor | None:
        """Return which keys no query may see."""
        if self.mask_kind == "none":
            return None
        if self.mask_kind == "made":
            return torch.ones(length, length).triu(1).bool()
        return self.mask[:length, :length]

    def mixed(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x.size(1))
        if self.by == "MultiheadAttention":
            return self.attention(x, x, x, need_weights=False, attn_mask=hidden)[0]
        if self.fused:
            found = self.all(x).split(self.sizes, -1)
        else:
            found = (self.queries(x), self.keys(x), self.values(x))
        queries, keys, values = (one.unflatten(2, (-1, self.size)).transpose(1, 2) for one in found)
        if self.kept < self.heads:
            keys = keys.repeat_interleave(self.heads // self.kept, 1)
            values = values.repeat_interleave(self.heads // self.kept, 1)
        if self.by == "sdpa":
            seen = None if hidden is None else ~hidden
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        else:
            scores = queries @ keys.transpose(2, 3) / self.size**0.5
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            y = scores.softmax(-1) @ values
        return self.last(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "pre":
            return x + self.scale(self.mixed(self.norm(x)))
        if self.way == "post":
            return self.norm(x + self.scale(self.mixed(x)))
        return x + self.scale(self.mixed(x))


BLOCKS: dict[str, Callable[[int, Description, str], nn.Module]] = {
    "layer": Layer,
    "residual": Residual,
    "branches": Branches,
    "gate": Gate,
    "squeeze": Squeeze,
    "shared": Shared,
    "pool": Pool,
    "constant": Constant,
    "attention": Attention,
}


# --- a description that fails -> the smallest that still does -----------------------------------

_PLAIN = {
    "norm": "none",
    "scale": "none",
    "mask": "none",
    "middle": "none",
    "positions": "none",
    "kernel": 1,
    "stride": 1,
    "heads": 1,
    "kept": 1,
    "count": 2,
    "skip": None,
    "fused": False,
    "by": "softmax",
    "way": "plain",
    "order": ORDERS[0],
    "activation": "relu",
    "shortcut": "identity",
    "join": "add",
    "residual": False,
    "bias": True,
    "stored": "buffer",
    "how": "add",
    "container": "Sequential",
    "dropped": False,
    "hidden": 8,
    "out": 8,
}


def simpler(description: Description) -> Iterator[Description]:
    """Yield descriptions with one block less, or with one plainer choice."""
    blocks = description["blocks"]
    for i in range(len(blocks)):
        yield description | {"blocks": blocks[:i] + blocks[i + 1 :]}
    parts: list[int | str | None] = [None, "stem", *range(len(blocks))]
    for part in parts:
        for choice in _PLAIN:
            changed = copy.deepcopy(description)
            place = changed
            if part is not None:
                place = changed["stem"] if part == "stem" else changed["blocks"][part]
            plain = _PLAIN[choice]
            if choice not in place or place[choice] in (plain, None):
                continue
            if choice == "how" and place["kind"] != "constant":
                continue
            if choice == "fused" or choice == "kept" or choice == "heads":
                place["kept"] = place["kept"] if choice == "fused" else 1
            place[choice] = plain
            yield changed


def shrunk(description: Description, fails: Callable[[Description], bool]) -> Description:
    """Return a description that fails still, and of which nothing simpler does."""
    while True:
        found = next((one for one in simpler(description) if fails(one)), None)
        if found is None:
            return description
        description = found
