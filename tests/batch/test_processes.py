"""Executors of many pairs: the same bytes, and what is left when processes die."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import active_children, get_context

import pytest
from safetensors.torch import load_file

from clafusion import ClafusionError, InputError
from clafusion.batch.run import fuse_pairs
from clafusion.batch.tasks import fuse_pairs_task
from tests.support import networks
from tests.support.many_pairs import DATA, SETTINGS, WIDTHS, assert_as_fused, lines, modules


def test_processes_and_threads_give_the_same_bytes(files, expected, tmp_path):
    assert_as_fused(fuse_pairs(files, DATA, executor=2, out_dir=tmp_path, **SETTINGS), expected)
    assert len(lines(tmp_path)) == 6
    with ThreadPoolExecutor(2) as executor:
        results = fuse_pairs(modules(), list(DATA.split(256)), executor=executor, **SETTINGS)
        assert_as_fused(results, expected)


def test_no_process_is_left_when_results_are_not_taken(files):
    run = fuse_pairs(files, DATA, executor=2, **SETTINGS)
    next(run)
    run.close()
    end = time.monotonic() + 60
    while active_children():
        assert time.monotonic() < end
        time.sleep(0.02)


class Failing(ThreadPoolExecutor):
    """An executor that loses what it is to do."""

    def submit(self, *_):
        if self._max_workers == 1:
            raise RuntimeError("cannot schedule new futures")
        future = Future()
        future.set_exception(RuntimeError("lost"))
        return future


@pytest.mark.parametrize(("workers", "message"), [(1, "cannot schedule new futures"), (2, "lost")])
def test_an_executor_that_fails_is_told(workers, message):
    with pytest.raises(ClafusionError, match=f"executor failed .*{message}.* 0 of 6 pairs"):
        list(fuse_pairs(modules(), DATA, executor=Failing(workers), **SETTINGS))


def test_a_model_that_cannot_be_sent_is_refused():
    models = {**modules(), "local": networks.mlp(12, 6, 5)}
    models["local"].register_forward_hook(lambda *_: None)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(InputError, match=r"models\['local'\] cannot be sent .*clafusion\.ModelFile"),
    ):
        list(fuse_pairs(models, DATA, executor=executor, **SETTINGS))


def _kill_once(flag, function, *arguments):
    if function is fuse_pairs_task and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)


class _Killing(ProcessPoolExecutor):
    """Its first pairs end by the death of its worker."""

    def __init__(self, flag):
        super().__init__(1, mp_context=get_context("spawn"))
        self.flag = flag

    def submit(self, function, *arguments):
        return super().submit(_kill_once, self.flag, function, *arguments)


def test_a_worker_that_dies_is_told_and_the_next_run_goes_on(files, expected, tmp_path):
    with (
        _Killing(tmp_path / "flag") as executor,
        pytest.raises(ClafusionError, match=r"a worker process died.*0 of 6 pairs are done"),
    ):
        list(fuse_pairs(files, DATA, executor=executor, out_dir=tmp_path / "out", **SETTINGS))
    assert_as_fused(fuse_pairs(files, DATA, out_dir=tmp_path / "out", **SETTINGS), expected)
    assert len(lines(tmp_path / "out")) == 6


SCRIPT = """
import sys, torch
from pathlib import Path
from clafusion import ModelFile, Profiling
from clafusion.batch.run import fuse_pairs
folder = Path(sys.argv[1])
widths = {widths}
models = {{
    name: ModelFile(f"{{folder}}/nets.py:mlp{{one}}", folder / f"{{name}}.safetensors")
    for name, one in widths.items()
}}
data = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
settings = {{"profiling": Profiling(alignment_samples=100, matching_rows=200)}}
for one in fuse_pairs(models, data, out_dir=folder / "out", **settings):
    print(one.first, one.second, flush=True)
"""


@pytest.mark.parametrize("seen", [0, 2])
def test_a_run_that_is_killed_goes_on_where_it_was(files, expected, tmp_path, seen):
    command = [sys.executable, "-c", SCRIPT.format(widths=WIDTHS), str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(seen):
        run.stdout.readline()
    if not seen:
        time.sleep(1)
    run.kill()
    run.communicate()
    results = list(fuse_pairs(files, DATA, out_dir=tmp_path / "out", **SETTINGS))
    assert sum(one.resumed for one in results) >= seen
    assert_as_fused(results, expected)
    done = lines(tmp_path / "out")
    assert sorted((one["first"], one["second"]) for one in done) == list(expected)
    for one in done:
        load_file(tmp_path / "out" / one["file"])
