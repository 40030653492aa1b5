"""``clafusion fuse`` within a limit of memory, and what it says of itself before."""

import json

import numpy as np
import pytest
import torch

from clafusion.cli.app import main
from clafusion.weights.checkpoints import load_state
from tests.support.in_files import VECTORS, in_file

FUSE = [
    "fuse",
    "one.safetensors",
    "two.pt",
    "--arch=tests.support.in_files:perceptron(20, 16)",
    "--arch=tests.support.in_files:perceptron(16, 12, 10)",
    "--data=data.npy",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_file("perceptron(20, 16)", tmp_path / "one.safetensors", 0)
    in_file("perceptron(16, 12, 10)", tmp_path / "two.pt", 1)
    np.save("data.npy", VECTORS.numpy())
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_limit_gives_the_same_weights_in_one_file_or_several(capsys):
    assert main([*FUSE, "--out=free.safetensors"]) == 0
    for out in ("within.safetensors", "within.safetensors.index.json"):
        assert main([*FUSE, f"--out={out}", "--memory-limit=4GB"]) == 0
        assert out in capsys.readouterr().out
        found, expected = load_state(out), load_state("free.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("limit", [[], ["--memory-limit=4GB"]])
def test_weights_are_written_in_another_type_and_compute_the_same_again(limit):
    assert main([*FUSE, "--out=free.safetensors"]) == 0
    assert main([*FUSE, "--out=half.safetensors", "--out-dtype=bfloat16", *limit]) == 0
    found, free = load_state("half.safetensors"), load_state("free.safetensors")
    assert found.keys() == free.keys()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in free.items())


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    assert main([*FUSE, "--out=out.safetensors", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("time     about 0 min ")
    assert "memory   about " in told
    assert "written  0.1 MB of fused weights" in told
    assert main([*FUSE, "--out=out.safetensors", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_inputs"] == len(VECTORS)
    assert sorted(folder.iterdir()) == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--memory-limit=1MB"], "--memory-limit '1 MB' is too little"),
        (["--out-dtype=int8"], "--out-dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (["--memory-limit=1MB", "--dry-run"], "is too little"),
        (["--memory-limit=much"], "--memory-limit must be an amount of memory"),
        (["--memory-limit=4GB", "--device=meta"], "--memory-limit is for the CPU"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_one_line(options, told, capsys):
    assert main([*FUSE, "--out=out.safetensors", *options]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1
