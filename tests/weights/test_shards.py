"""Checkpoints in several files: written as a whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from clafusion import InputError, ModelFile, save_model
from clafusion.weights.checkpoints import load_state
from clafusion.weights.shards import shards_of, write_shards
from clafusion.weights.state_files import check_weights_output
from tests.support.in_files import TOKENS, made

INDEX = "model.safetensors.index.json"


def state_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}.weight": torch.randn(8, 8, generator=generator) for i in range(6)}


def assert_holds(path, state):
    found = load_state(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_tensors_come_back_from_several_files(tmp_path):
    state = state_of(0)
    write_shards(state, tmp_path / INDEX, size=600)
    shards = sorted(one for one in tmp_path.iterdir() if one.suffix == ".safetensors")
    assert len(shards) == 3
    assert_holds(tmp_path / INDEX, state)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 256


def test_a_tensor_that_is_larger_than_a_file_has_one_of_its_own(tmp_path):
    write_shards(state_of(0), tmp_path / INDEX, size=10)
    assert_holds(tmp_path / INDEX, state_of(0))
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


def test_the_same_tensors_give_the_same_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shards(state_of(0), tmp_path / name / INDEX, size=600)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_files_of_an_earlier_index_go(tmp_path):
    write_shards(state_of(0), tmp_path / INDEX, size=300)
    kept = tmp_path / "other-00001-of-00001-0123abcd.safetensors"
    kept.write_bytes(b"somebody else's")
    write_shards(state_of(1), tmp_path / INDEX, size=600)
    assert_holds(tmp_path / INDEX, state_of(1))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert kept.exists()


def test_what_a_check_refuses_leaves_the_old_files(tmp_path):
    write_shards(state_of(0), tmp_path / INDEX, size=600)
    before = sorted(tmp_path.iterdir())

    def refuse(_):
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        write_shards(state_of(1), tmp_path / INDEX, refuse, size=600)
    assert sorted(tmp_path.iterdir()) == before
    assert_holds(tmp_path / INDEX, state_of(0))


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    write_shards(state_of(0), tmp_path / INDEX, size=600)
    before = sorted(tmp_path.iterdir())
    replace, calls = os.replace, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_shards(state_of(1), tmp_path / INDEX, size=600)
    assert sorted(tmp_path.iterdir()) == before
    assert_holds(tmp_path / INDEX, state_of(0))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_kill_while_files_are_written_leaves_the_old_result_whole(at, tmp_path):
    write_shards(state_of(0), tmp_path / INDEX, size=600)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from clafusion.weights.shards import write_shards\n"
        "from tests.weights.test_shards import state_of\n"
        "replace, left = os.replace, [int(sys.argv[2])]\n"
        "def killed(*arguments):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*arguments)\n"
        "os.replace = killed\n"
        "write_shards(state_of(1), Path(sys.argv[1]), size=600)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / INDEX), str(at)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert_holds(tmp_path / INDEX, state_of(0))
    write_shards(state_of(1), tmp_path / INDEX, size=600)  # and clears up
    assert_holds(tmp_path / INDEX, state_of(1))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_model_is_written_in_shards_and_comes_back(tmp_path):
    model = made("Language(2)", 3)
    save_model(model, tmp_path / INDEX)
    again = ModelFile("tests.support.in_files:Language(2)", tmp_path / INDEX).load()
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_no_output_takes_the_place_of_a_part_that_an_inputs_index_names(tmp_path):
    index = tmp_path / INDEX
    write_shards(state_of(0), index, size=600)
    copied = tmp_path / "copy.safetensors.index.json"
    copied.write_text(index.read_text())
    linked = tmp_path / "link.safetensors"
    (shard, *_) = shards_of(index, "checkpoint")
    linked.symlink_to(shard)
    for path, inputs in [(shard, [index]), (linked, [copied]), (index, [index]), (shard, [shard])]:
        with pytest.raises(InputError, match=r"--out .* is an input, which would be lost"):
            check_weights_output(path, "--out", inputs)
    for inputs in ([copied], [shard]):  # of which the parts have the names of the output's
        with pytest.raises(InputError, match="called as the parts of that checkpoint"):
            check_weights_output(index, "--out", inputs)
    for path in ("other.safetensors", "other.safetensors.index.json"):
        assert check_weights_output(tmp_path / path, "--out", [index, copied, "gone.index.json"])


def test_an_index_that_is_a_link_is_written_where_it_points(tmp_path):
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    write_shards(state_of(0), real / INDEX, size=600)
    (links / INDEX).symlink_to(real / INDEX)
    write_shards(state_of(1), links / INDEX, size=600)
    assert_holds(real / INDEX, state_of(1))
    assert [one.name for one in links.iterdir()] == [INDEX]
    assert len(list(real.glob("*.safetensors"))) == 3
