"""What killed processes leave behind goes with the next save, and what living ones write stays."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import clafusion
from clafusion.weights import atomic
from tests.support.networks import mlp

MODEL = mlp(6, 5, 3)

WRITER = textwrap.dedent(
    """
    import sys, time
    from torch import nn
    import clafusion.weights.atomic as atomic
    from clafusion.weights.state_files import save_model

    def wait(*_):
        print("written", flush=True)
        time.sleep(120)

    atomic.os.replace = wait
    save_model(nn.Linear(6, 5), sys.argv[1])
    """
)


def hidden(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir() if one.name.startswith(".")}


@pytest.fixture
def writer(tmp_path):
    """Yield a function that starts processes which have written a file, but not renamed it."""
    started = []

    def start(name: str, count: int) -> list[subprocess.Popen[str]]:
        for _ in range(count):
            command = [sys.executable, "-c", WRITER, str(tmp_path / name)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_a_killed_writers_file_goes_with_the_next_save_and_a_living_ones_stays(
    writer, tmp_path, name
):
    dead, living = writer(name, 2)
    dead.kill()
    dead.wait(timeout=30)
    before = hidden(tmp_path)
    assert len(before) == 2
    clafusion.save_model(MODEL, tmp_path / name)
    left = hidden(tmp_path)
    assert left < before
    assert len(left) == 1
    living.kill()
    living.wait(timeout=30)
    clafusion.save_model(MODEL, tmp_path / name)
    assert hidden(tmp_path) == set()
    loaded = clafusion.load(mlp(6, 5, 3, seed=1), tmp_path / name)
    assert torch.equal(loaded[0].weight, MODEL[0].weight)


def test_what_another_machine_or_something_else_has_written_stays(tmp_path):
    other = "0000" if atomic._machine() != "0000" else "1111"
    for name in (f".a.pt.{other}0123.tmp", ".a.pt.tmp", ".a.pt.0123.tmp", ".b.pt.01234567.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / f".a.pt.{atomic._machine()}0123.tmp").mkdir()
    before = hidden(tmp_path)
    clafusion.save_model(MODEL, tmp_path / "a.pt")
    assert hidden(tmp_path) == before - {f".a.pt.{atomic._machine()}0123.tmp"}


def test_without_locks_nothing_is_removed_and_all_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    (tmp_path / f".a.pt.{atomic._machine()}0123.tmp").mkdir()
    clafusion.save_model(MODEL, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").is_file()
    assert len(hidden(tmp_path)) == 1


def test_a_directory_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, met = atomic._lock, []

    def removed_first(folder):
        met.append(folder)
        if len(met) == 1:
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(atomic, "_lock", removed_first)
    with atomic.replacing(tmp_path / "a.txt", "path") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "a.txt").read_text() == "a"
    assert len(met) == 2
    assert hidden(tmp_path) == set()


def test_permissions_are_those_of_a_new_file_or_of_the_old_one(tmp_path):
    (tmp_path / "plain.txt").write_text("")
    with atomic.replacing(tmp_path / "new.txt", "path") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    (tmp_path / "new.txt").chmod(0o600)
    with atomic.replacing(tmp_path / "new.txt", "path") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "new.txt").stat().st_mode & 0o777 == 0o600
    with atomic.making_directory(tmp_path / "folder", "path") as made:
        (made / "inner").write_text("")
    assert (tmp_path / "folder" / "inner").is_file()
    (tmp_path / "other").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert hidden(tmp_path) == set()
