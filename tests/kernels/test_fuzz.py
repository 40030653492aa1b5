"""Random calls of the compiled doors: each returns or refuses, and writes to its outputs only.

A wrong answer is for the kernels' own tests to find; a crash or a write beyond an output is found
here, and under AddressSanitizer (``tests/sanitize.sh``) a read beyond an input too.
"""

import contextlib
import re

import numpy as np
import pytest

from clafusion import _core, num_threads, set_num_threads

GUARD = 64
SENTINEL = -12345


class Guarded:
    """Output arrays, each inside a larger one that must stay as it is around it."""

    def __init__(self):
        self.whole = []

    def __call__(self, *shape, dtype=np.float64):
        size = int(np.prod(shape))
        whole = np.full(size + 2 * GUARD, SENTINEL, dtype=dtype)
        self.whole.append(whole)
        return whole[GUARD : GUARD + size].reshape(shape)

    def check(self):
        for whole in self.whole:
            assert (whole[:GUARD] == SENTINEL).all()
            assert (whole[-GUARD:] == SENTINEL).all()


def gram_call(rng, out):
    samples, features = rng.integers(0, 70), rng.integers(0, 1100)
    x = rng.normal(size=(samples, features)).astype(np.float32)
    return [x, out(samples, samples), int(rng.integers(0, 4))]


def hsic_call(rng, out):
    samples = rng.integers(2, 40)
    a, b = ([rng.normal(size=(samples,) * 2) for _ in range(rng.integers(1, 4))] for _ in "ab")
    unbiased = bool(rng.integers(2))
    return [a, b, unbiased, out(len(a), len(b)), out(len(a)), out(len(b))]


def align_call(rng, out):
    shapes = rng.integers(1, 12, size=(rng.integers(1, 5), 2))
    cells, layers = int(shapes.prod(1).sum()), int(shapes[:, 0].sum())
    costs, skips = rng.random(cells), rng.random(layers)
    costs[rng.random(cells) < 0.2] = np.inf
    gaps = rng.random(int(shapes[:, 1].sum()) if rng.integers(2) else 0)
    outputs = [out(layers, dtype=np.int64), out(len(shapes)), out(len(shapes), 2, dtype=np.int64)]
    mode = 0 if len(gaps) else int(rng.integers(2))
    flags = [mode, bool(rng.integers(2)), bool(rng.integers(2))]
    return [costs, skips, gaps, shapes, *flags, *outputs]


def assign_call(rng, out):
    sizes = rng.integers(1, 40, size=rng.integers(1, 4))
    rows = int(sizes.sum())
    outputs = [out(rows, dtype=np.int64), out(rows), out(rows), out(len(sizes))]
    return [[rng.random((n, n)) for n in sizes], *outputs]


def sinkhorn_call(rng, out):
    shapes = rng.integers(1, 40, size=(rng.integers(1, 4), 2))
    costs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    sources, targets = shapes.sum(0)
    a = np.concatenate([np.full(n, 1 / n) for n in shapes[:, 0]])
    b = np.concatenate([np.full(m, 1 / m) for m in shapes[:, 1]])
    start = rng.normal(size=targets) if rng.integers(2) else None
    relaxation = [np.inf, 0.5][rng.integers(2)]
    count = len(shapes)
    outputs = [[out(*shape, dtype=np.float32) for shape in shapes], out(sources), out(targets)]
    facts = [out(count), out(count), out(count, dtype=np.int64), out(count, dtype=np.int64)]
    return [costs, a, b, start, 0.1, 1e-3, 50, relaxation, *outputs, *facts]


def damaged(value, rng):
    """Return the value, changed as a careless or hostile caller might."""
    if isinstance(value, list):
        if not value or rng.random() < 0.3:
            return value[1:]
        i = rng.integers(len(value))
        return [damaged(one, rng) if i == j else one for j, one in enumerate(value)]
    if not isinstance(value, np.ndarray):
        return [None, -1, 0, 3, 2**31, 2**63, 1.5, "a", True][rng.integers(9)]
    value = value.copy()
    match rng.integers(12):
        case 0:
            other = [np.float16, np.float32, np.float64, np.int8, object][rng.integers(5)]
            with np.errstate(all="ignore"):
                return value.astype(other)
        case 1:
            return value[: len(value) // 2] if value.ndim else value
        case 2:
            return value.reshape(-1)
        case 3:
            return value[None]
        case 4:
            return value.T
        case 5:
            return value[::-1] if value.ndim else value
        case 6:
            return np.broadcast_to(np.float64(1), value.shape)
        case 7:
            value.flags.writeable = False
            return value
        case 8:
            return value.astype(value.dtype.newbyteorder())
        case 9:
            return np.empty((0,) * value.ndim, value.dtype)
        case 10:
            raw = np.zeros(value.nbytes + 1, np.uint8)[1:]  # not aligned
            unaligned = raw.view(value.dtype).reshape(value.shape)
            unaligned[...] = value
            return unaligned
        case _:
            bad = [0, -1, -(2**40)] if value.dtype.kind == "i" else [np.nan, np.inf, -np.inf, 1e38]
            if value.size:
                value.flat[rng.integers(value.size)] = bad[rng.integers(len(bad))]
            return value


@pytest.mark.parametrize(
    ("door", "call"),
    [
        (_core.add_gram, gram_call),
        (_core.hsic_all_pairs, hsic_call),
        (_core.align_layers, align_call),
        (_core.assign, assign_call),
        (_core.sinkhorn, sinkhorn_call),
    ],
    ids=lambda one: one.__name__,
)
def test_damaged_calls_return_or_refuse(door, call):
    rng = np.random.default_rng(0)
    returned = refused = 0
    for _ in range(3000):
        out = Guarded()
        arguments = call(rng, out)
        for i in rng.integers(len(arguments), size=rng.integers(3)):
            arguments[i] = damaged(arguments[i], rng)
        try:
            door(*arguments)
            returned += 1
        except (TypeError, ValueError):
            refused += 1
        out.check()
    assert min(returned, refused) > 300  # else the calls are too tame or too wild


def junk(rng):
    array = rng.normal(size=rng.integers(0, 5, size=rng.integers(0, 4)))
    dtype = [np.float32, np.float64, np.int64][rng.integers(3)]
    pool = [None, True, 0, -1, 3, 2**40, 0.5, -1.0, np.nan, "a", [array], (1, 2)]
    return pool[rng.integers(len(pool))] if rng.random() < 0.4 else array.astype(dtype)


def test_junk_at_every_door_returns_or_refuses():
    rng = np.random.default_rng(1)
    doors = [one for one in vars(_core).values() if callable(one)]
    before = num_threads()
    try:
        for call in range(3000):
            door = doors[call % len(doors)]
            signature = re.search(r"\((.*)\) ->", door.__doc__.replace("\n", " ")).group(1)
            count = len(re.findall(r"\w+: ", signature))
            with contextlib.suppress(TypeError, ValueError):
                door(*(junk(rng) for _ in range(count)))
    finally:
        set_num_threads(before)
