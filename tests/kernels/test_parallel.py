"""The threads of the kernels: shared by callers, safe after fork, the same answer on any number."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clafusion import (
    InputError,
    _core,
    align_layers_batch,
    build_info,
    num_threads,
    set_num_threads,
)


@pytest.fixture(autouse=True)
def _default_threads():
    yield
    set_num_threads(0)


def costs(count, seed=0):
    return list(np.random.default_rng(seed).random((count, 9, 5)))


def solutions(problems):
    return [one.deep_to_shallow for one in align_layers_batch(problems)]


def test_any_number_of_threads_gives_the_same_answer():
    problems = costs(2000)
    set_num_threads(1)
    expected = solutions(problems)
    for count in (2, 3, 8, 31):
        set_num_threads(count)
        assert num_threads() == count
        assert solutions(problems) == expected


def test_several_python_threads_may_call_at_once():
    set_num_threads(4)
    batches = [costs(500, seed) for seed in range(16)]
    expected = [solutions(one) for one in batches]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(5):
            assert list(executor.map(solutions, batches)) == expected


def refused_problem(costs, count):
    """Call the compiled door, which looks at the numbers on its threads."""
    deep_to_shallow = np.empty(9 * count, dtype=np.int64)
    shapes = np.tile(np.array([9, 5]), (count, 1))
    rest = (deep_to_shallow, np.empty(count), np.empty((count, 2), dtype=np.int64))
    _core.align_layers(
        costs.ravel(), np.zeros(9 * count), np.empty(0), shapes, 0, False, False, *rest
    )


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_failure_is_raised_on_the_caller_whoever_met_it(threads):
    set_num_threads(threads)
    batch = np.random.default_rng(0).random((3000, 9, 5))
    batch[[700, 1900, 2999], 3, 2] = np.nan
    for _ in range(20):
        with pytest.raises(ValueError, match=r"in problem 700$"):
            refused_problem(batch, 3000)
    batch = np.nan_to_num(batch)
    refused_problem(batch, 3000)  # the threads live on


def _in_child(problems, queue):
    queue.put(solutions(problems))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    set_num_threads(4)
    problems = costs(2000)
    expected = solutions(problems)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(problems, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert found == expected
    assert solutions(problems) == expected


@pytest.mark.parametrize("count", [-1, 1_000_000])
def test_an_absurd_number_of_threads_is_refused(count):
    with pytest.raises(InputError, match=rf"count must be from 0 .* got {count}"):
        set_num_threads(count)
    with pytest.raises(ValueError, match=rf"count must be 0 .* got {count}"):
        _core.set_num_threads(count)
    with pytest.raises(InputError, match="count must be a whole number"):
        set_num_threads(1.5)
    assert num_threads() >= 1


def test_the_environment_sets_the_number_of_threads():
    def run(value):
        return subprocess.run(
            [sys.executable, "-c", "import clafusion; print(clafusion.num_threads())"],
            env={**os.environ, "CLAFUSION_NUM_THREADS": value},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("3").stdout == "3\n"
    assert "CLAFUSION_NUM_THREADS must be a positive whole number; got 'many'" in run("many").stderr


def test_build_info_tells_what_is_used():
    set_num_threads(3)
    info = build_info()
    assert info["simd"] in {"avx512", "avx2", "baseline"}
    assert info["threads"] == 3
    assert info["compiler"]
    assert bool(info["cuda_architectures"]) == bool(info["cuda_runtime"]) == info["cuda"]
