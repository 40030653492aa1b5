"""The Gram kernel against float64 NumPy, for every instruction set, and its refusals."""

import numpy as np
import pytest
import torch

from clafusion import InputError, _core, _native, num_threads, set_num_threads

# A chunk sums at most 32 runs of 128 products in float32, 24 bits each: the error of an entry is
# at most (128 + 32) * 2^-24 of the sum of its products' magnitudes, and float64 adds nothing that
# shows.
BLOCK_ERROR = 160 * 2.0**-24
LEVELS = ["baseline", "avx2", "avx512"]
AVAILABLE = range(1, LEVELS.index(_core.simd_level()) + 2)


def gram_ref(x):
    x = np.asarray(x, dtype=np.float64)
    return x @ x.T


def assert_close(found, x):
    bound = BLOCK_ERROR * gram_ref(np.abs(x))
    assert np.all(np.abs(found - gram_ref(x)) <= bound)
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize(
    ("samples", "features"),
    [
        (1, 1),
        (1, 600),
        (7, 3),
        (8, 16),
        (16, 512),
        (17, 513),
        (33, 31),
        (401, 13),
        (50, 20_000),
        (400, 8192),
    ],
)
def test_equals_float64_for_every_instruction_set(level, samples, features):
    x = np.random.default_rng(0).normal(size=(samples, features)).astype(np.float32)
    found = np.zeros((samples, samples))
    _core.add_gram(x, found, level)
    assert_close(found, x)


@pytest.mark.parametrize("level", AVAILABLE)
def test_small_integers_are_exact(level):
    x = np.random.default_rng(1).integers(-8, 9, size=(45, 3000)).astype(np.float32)
    found = np.zeros((45, 45))
    _core.add_gram(x, found, level)
    assert np.array_equal(found, gram_ref(x))


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("leading", [0, 1, 15, 16, 17, 44, 45])
def test_products_with_the_leading_samples_are_the_same_bytes(level, leading):
    x = np.random.default_rng(3).normal(size=(45, 3000)).astype(np.float32)
    whole, found = np.zeros((45, 45)), np.zeros((45, leading))
    _core.add_gram(x, whole, level)
    _core.add_gram(x, found, level)
    assert np.array_equal(found, whole[:, :leading])


def test_reads_any_layout():
    whole = torch.from_numpy(np.random.default_rng(2).normal(size=(60, 700))).float()
    for x in (whole[::2], whole[:, 5:300], whole[:, ::3], whole.T, whole[:1].expand(9, -1)):
        assert_close(_native.gram(x), x.numpy())
    reversed_rows = whole.numpy()[::-1]
    found = np.zeros((60, 60))
    _core.add_gram(reversed_rows, found)
    assert_close(found, reversed_rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_converts_other_precisions(dtype):
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_close(_native.gram(x), x.float().numpy())


def test_features_may_come_block_by_block():
    x = torch.randn(30, 5000, generator=torch.Generator().manual_seed(0))
    found = _native.gram(x[:, :17])
    assert _native.gram(x[:, 17:3000], out=found) is found
    _native.gram(x[:, 3000:3000], out=found)
    _native.gram(x[:, 3000:], out=found)
    assert_close(found, x.numpy())
    for out in (np.zeros((30, 31)), np.zeros((30, 30), dtype=np.float32), np.zeros((60, 60))[::2]):
        with pytest.raises(InputError, match="out must be a contiguous, writeable float64 matrix"):
            _native.gram(x, out=out)


def test_no_features_and_no_samples():
    assert np.array_equal(_native.gram(torch.empty(3, 0)), np.zeros((3, 3)))
    assert _native.gram(torch.empty(0, 3)).shape == (0, 0)
    assert np.array_equal(_native.gram(torch.empty(3, 0), leading=2), np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("samples", "features"),
    [(37, 30_000), (2100, 17_000)],  # the second in rounds, of as many chunks as threads ask for
)
def test_bytes_do_not_depend_on_threads(samples, features):
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(0))
    before = num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            set_num_threads(threads)
            found.append(_native.gram(x).tobytes())
    finally:
        set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_refuses_what_has_no_finite_square(bad):
    x = torch.ones(20, 30)
    x[17, 4] = bad
    with pytest.raises(InputError, match=r"x\[17\] holds NaN, infinity or numbers too large"):
        _native.gram(x)
    with pytest.raises(ValueError, match=r"x\[17\]"):
        _core.add_gram(x.numpy(), np.zeros((20, 20)))


def test_refuses_what_is_not_finite_behind_the_leading_samples():
    x = torch.ones(20, 30)
    x[17, 4] = float("nan")
    with pytest.raises(InputError, match=r"x\[17\] holds NaN"):
        _native.gram(x, leading=5)


@pytest.mark.parametrize("leading", [-1, 4])
def test_refuses_to_lead_with_more_samples_than_there_are(leading):
    with pytest.raises(InputError, match=f"leading must be between 0 and .*, 3; got {leading}"):
        _native.gram(torch.ones(3, 2), leading=leading)


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2).long()])
def test_refuses_what_is_no_matrix(x):
    with pytest.raises(InputError, match="x must be a floating-point matrix"):
        _native.gram(x)


def test_the_compiled_door_refuses_too():
    x = np.ones((4, 6), dtype=np.float32)
    result = np.zeros((4, 4))
    unaligned = np.zeros(4 * 6 * 4 + 1, dtype=np.uint8)[1:].view(np.float32).reshape(4, 6)
    unaligned_result = np.zeros(4 * 4 * 8 + 1, dtype=np.uint8)[1:].view(np.float64).reshape(4, 4)
    read_only = np.empty((4, 4))
    read_only.flags.writeable = False
    for bad, target, level, message in [
        (x.astype(np.float64), result, 0, "x must be float32"),
        (x[0], result, 0, "x must have shape"),
        (x.T, np.empty((6, 6)), 0, "features of a sample one behind the other"),
        (unaligned, result, 0, "x must be aligned"),
        (x, unaligned_result, 0, "result must be aligned"),
        (x, np.empty((4, 5)), 0, "result must have shape"),
        (x, np.empty((3, 3)), 0, "result must have shape"),
        (x, read_only, 0, "not writeable"),
        (x, result, 4, "level 4 is not available"),
        (x, result, -1, "level -1 is not available"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.add_gram(bad, target, level)
    with pytest.raises(TypeError):
        _core.add_gram(x, result.astype(np.float32))
