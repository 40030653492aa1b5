"""The command line as a person uses it: good input, bad input, and what is left behind."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clafusion
from clafusion import Merging, fuse
from clafusion.cli.app import main
from clafusion.cli.models import loaded_files
from clafusion.weights.state_files import save_model
from tests.support import networks

FACTORY = """
from torch import nn

def deep():
    return nn.Sequential(
        nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(),
        nn.Linear(7, 5),
    )

def middle():
    return nn.Sequential(
        nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5),
    )

def shallow():
    return nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5))

def tanh():
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(FACTORY)
    save_model(networks.mlp(12, 9, 8, 7, 5), "deep.safetensors")
    shallow = networks.mlp(12, 6, 5, seed=1)
    wrapped = {f"module.{name}": tensor for name, tensor in shallow.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, "shallow.th")
    save_model(networks.mlp(12, 8, 8, 5, seed=2), "middle.pt")
    np.save("data.npy", np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32))
    return tmp_path


FUSE = [
    "fuse",
    "deep.safetensors",
    "shallow.th",
    "--arch=models.py:deep",
    "--arch=models.py:shallow",
    "--data=data.npy",
    "--out=fused.safetensors",
]

STAGES = """
from torch import nn

def net(first, second):
    layers, into = [], 3
    for width, count in ((8, first), (12, second)):
        for _ in range(count):
            layers += [nn.Conv2d(into, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            into = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * into, 5)]
    return nn.Sequential(*layers, *head)
"""


def test_two_models_go_into_a_third_ones_architecture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(STAGES)
    save_model(networks.vgg(3, 1), "left.safetensors")
    save_model(networks.vgg(1, 3, seed=1), "right.safetensors")
    np.save("data.npy", np.random.default_rng(0).normal(size=(200, 3, 8, 8)).astype(np.float32))
    command = ["fuse", "left.safetensors", "right.safetensors", "--arch=nets.py:net(3, 1)"]
    command += ["--arch=nets.py:net(1, 3)", "--data=data.npy", "--out=out.safetensors"]
    assert main(command) == 0
    assert "out.safetensors, weights of out.pt2" in capsys.readouterr().out
    images = torch.from_numpy(np.load("data.npy"))
    assert clafusion.load("out.safetensors")(images).shape == (200, 5)
    command += ["--target=like"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told == "clafusion: --target like needs --target-template MODULE:FACTORY\n"
    assert main([*command, "--target-template=nets.py:net(2, 3)"]) == 2
    assert "--target-template has 6 layers" in capsys.readouterr().err
    assert main([*command, "--target-template=nets.py:net(3, 4)"]) == 0
    assert "out.safetensors, weights of nets.py:net(3, 4)" in capsys.readouterr().out
    networks.vgg(3, 4).load_state_dict(load_file("out.safetensors"))
    assert main([*command, "--target-template=nets.py:net(3, 3)", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "nets.py:net(3, 3)"
    (alignment,) = facts["alignments"]
    assert alignment["deep_to_shallow"].count(None) == 2
    assert len(facts["target"]) == 7


def replaced(option, value, place=0):
    """Return the command with another value where the option comes the n-th time."""
    command = list(FUSE)
    places = [i for i, one in enumerate(command) if one.startswith(f"{option}=")]
    command[places[place]] = f"{option}={value}"
    return command


def test_fuse_writes_weights_that_load_and_a_picture(files, capsys):
    assert main([*FUSE, "--plot=alignment.png", "--calibration=least_squares"]) == 0
    shown = capsys.readouterr()
    assert "(inserted)" in shown.out
    assert "fused.safetensors" in shown.out
    assert shown.err == ""  # no progress bar where nobody watches
    model = networks.mlp(12, 9, 8, 7, 5)
    model.load_state_dict(load_file("fused.safetensors"))
    assert (files / "alignment.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(one.name for one in files.iterdir() if one.name.startswith(".")) == []


@pytest.mark.usefixtures("files")
def test_quiet_prints_errors_and_json_only(capsys):
    assert main([*FUSE, "--calibration=none", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*FUSE, "--calibration=none", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "fused.safetensors"
    assert main([*replaced("--data", "none.npy"), "-q"]) == 2
    assert "'none.npy' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "fuse", "fuse-pairs", "align", "inspect", "explain"])
def test_help_needs_nothing_that_takes_long_to_import(command):
    code = (
        "import sys; from clafusion.cli.app import main; main(sys.argv[1:]); "
        "print([one for one in ('torch', 'numpy', 'rich', 'yaml') if one in sys.modules])"
    )
    given = [one for one in (command, "-h") if one]
    found = subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.startswith(f"Usage: clafusion {command}".rstrip())
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_an_interruption_while_modules_are_imported_is_one_line(module):
    code = textwrap.dedent(
        f"""
        import os, signal, sys

        class Interrupt:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupt())
        from clafusion.cli import main

        sys.exit(main({FUSE!r}))
        """
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 130
    assert found.stderr == "clafusion: interrupted; no output was written\n"


def test_data_without_an_axis_are_refused_with_the_shape_that_fits(files, capsys):
    (files / "nets.py").write_text(STAGES)
    save_model(networks.vgg(1, 1), "a.pt")
    np.save("last.npy", np.zeros((30, 8, 8, 3), np.float32))
    command = ["fuse", "a.pt", "a.pt", "--arch=nets.py:net(1, 1)", "--out=out.pt"]
    assert main([*command, "--data=last.npy"]) == 2
    assert "channels come first" in capsys.readouterr().err
    np.save("data.npy", np.zeros((300, 3, 4), np.float32))
    assert main(FUSE) == 2
    assert "It runs with --shape 12\n" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_shows_before_anything_is_fused(files, capsys):
    (files / "fused.safetensors.json").mkdir()
    assert main(FUSE) == 2
    told = capsys.readouterr().err
    assert "'fused.safetensors.json' exists and is no file: choose another name" in told
    assert not (files / "fused.safetensors").exists()


def test_options_stand_in_groups(capsys):
    assert main(["fuse", "-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [one for one in lines if one and not one.startswith((" ", "Usage"))]
    assert titles[:4] == ["Arguments:", "Models:", "Data:", "Output:"]
    assert any(one.startswith("Calibration: ") for one in titles)


def test_choices_are_completed():
    words = {"COMP_WORDS": "clafusion fuse --calibration re", "COMP_CWORD": "3"}
    found = subprocess.run(
        [sys.executable, "-m", "clafusion.cli.app"],
        env={**os.environ, **words, "_CLAFUSION_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.stdout.split() == ["repair"]


@pytest.mark.usefixtures("files")
def test_json_is_one_object(capsys):
    assert main([*FUSE, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (alignment,) = facts["alignments"]
    assert (alignment["deep"], alignment["shallow"]) == ("first", "second")
    assert alignment["deep_to_shallow"] == [0, None, None, 1]
    assert facts["weights"] == [0.5, 0.5]
    assert facts["config"]["calibration"] == {"name": "auto"}
    assert facts["assessment"]["parents"].keys() == {"first", "second"}
    assert facts["assessment"]["verdict"]
    assert facts["architecture"] == "models.py:deep"
    assert [one["layer_map"] for one in facts["parents"]] == [[0, 1, 2, 3], [0, None, None, 1]]
    stages = {"trace", "profile", "align", "target", "match", "merge", "calibrate", "assess"}
    assert facts["seconds"].keys() >= stages


@pytest.mark.usefixtures("files")
def test_layer_weights_are_shown(capsys):
    other = networks.mlp(12, 9, 8, 7, 5, seed=1)
    save_model(other, "other.safetensors")
    command = ["fuse", "deep.safetensors", "other.safetensors", *FUSE[3:4], *FUSE[5:]]
    own = "--merging-layer-weights=sensitivity"
    assert main([*command, own]) == 0
    shown = capsys.readouterr().out
    assert "weights in  first  second" in shown
    assert "first 0.50, second 0.50, of each matched layer by sensitivity" in shown
    assert main([*command, own, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    models = {"first": networks.mlp(12, 9, 8, 7, 5), "second": other}
    merging = Merging(layer_weights="sensitivity")
    result = fuse(models, torch.from_numpy(np.load("data.npy")), merging=merging)
    assert facts["layer_weights"] == [list(one) for one in result.layer_weights]
    assert len({tuple(one) for one in facts["layer_weights"]}) > 1
    fused = load_file("fused.safetensors")
    assert all(torch.equal(one, fused[name]) for name, one in result.model.state_dict().items())
    assert main(command) == 0
    assert "weights in" not in capsys.readouterr().out


THREE = ["fuse", "deep=deep.safetensors", "shallow.th", "mid=middle.pt", *FUSE[3:5]]
THREE += ["--arch=models.py:middle", *FUSE[5:]]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("weights", ["2,1,1", "2:1:1"])
def test_three_models_become_one(capsys, weights):
    command = [*THREE, f"--weights={weights}", "--calibration=least_squares", "--plot=all.svg"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "deep 0.50, second 0.25, mid 0.25" in shown.out
    models = {
        "deep": networks.mlp(12, 9, 8, 7, 5),
        "second": networks.mlp(12, 6, 5, seed=1),
        "mid": networks.mlp(12, 8, 8, 5, seed=2),
    }
    data = torch.from_numpy(np.load("data.npy"))
    wanted = fuse(models, data, [2, 1, 1], calibration="least_squares").model.state_dict()
    fused = load_file("fused.safetensors")
    assert fused.keys() == wanted.keys()
    assert all(torch.equal(one, fused[name]) for name, one in wanted.items())
    assert "deep (4 layers) and mid (3 layers)" in Path("all.svg").read_text()


@pytest.mark.usefixtures("files")
def test_three_models_one_after_another(capsys):
    assert main([*THREE, "--merging-strategy=iterative", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = [[one["name"] for one in step["models"]] for step in facts["steps"]]
    assert names == [["deep", "second"], ["deep+second", "mid"]]
    assert facts["weights"] == pytest.approx([1 / 3] * 3)
    assert facts["architecture"] == "models.py:deep"
    assert main([*THREE, "--merging-strategy=iterative"]) == 0
    shown = capsys.readouterr().out
    assert "Step 2: deep+second and mid" in shown
    assert "deep 0.33, second 0.33, mid 0.33" in shown


@pytest.mark.usefixtures("files")
def test_models_are_aligned_in_any_number(capsys):
    command = ["align", *(one for one in THREE[1:] if not one.startswith("--out"))]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reference"] == "deep"
    assert [one["shallow"] for one in facts["alignments"]] == ["second", "mid"]
    assert [one["deep_to_shallow"].count(None) for one in facts["alignments"]] == [2, 1]
    assert main([*command, "--alignment-mode=chain"]) == 0
    assert "by chain" in capsys.readouterr().out
    assert main([*command, "--calibration=none"]) == 2
    assert "--calibration" in capsys.readouterr().err


@pytest.mark.usefixtures("files")
def test_a_file_with_an_equals_sign_is_a_file(capsys):
    os.rename("deep.safetensors", "lr=0.1.safetensors")
    assert main(["align", "lr=0.1.safetensors", *FUSE[2:-1]]) == 0
    assert capsys.readouterr().out.startswith("first  second")


@pytest.mark.usefixtures("files")
def test_align_and_inspect(capsys):
    assert main(["align", *FUSE[1:-1]]) == 0
    assert "cost" in capsys.readouterr().out
    assert main(["inspect", "deep.safetensors", "--arch=models.py:deep", "--data=data.npy"]) == 0
    assert "0.weight" in capsys.readouterr().out
    assert main(["inspect", "--arch=models.py:deep", "--input-shape=12", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["insertable"] for layer in facts["layers"]] == [
        None,
        "identity",
        "identity",
        None,
    ]


@pytest.mark.usefixtures("files")
def test_inspect_tells_how_a_result_was_made(capsys):
    assert main([*FUSE, "--calibration=least_squares"]) == 0
    capsys.readouterr()
    assert main(["inspect", "fused.safetensors"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["first"].startswith("weight 0.5, models.py:deep, deep.safetensors, SHA-256 ")
    assert told["options"] == "calibration least_squares"
    assert told["calibration"].startswith("least_squares, anchor ")
    assert told["together"].startswith("the parents put out the mean of their ")
    assert told["strategy"] == "many_to_one, rounds 1"
    assert "clafusion" in told["versions"]
    assert main(["inspect", "fused.safetensors", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert record == json.loads(Path("fused.safetensors.json").read_text())
    of_model = ["--arch=models.py:deep", "--data=data.npy"]
    assert main(["inspect", "fused.safetensors", *of_model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"]
    assert facts["record"] == record
    assert main(["inspect", "absent.safetensors"]) == 2
    assert "'absent.safetensors' does not exist" in capsys.readouterr().err
    assert main(["inspect", "deep.safetensors"]) == 2
    error = capsys.readouterr().err
    assert "no record of how 'deep.safetensors' was made. To see a model give either" in error
    assert main(["inspect", "fused.safetensors", "--plot=layers.png"]) == 2
    assert "--plot needs inputs to run the model with: give --data" in capsys.readouterr().err
    Path("fused.safetensors.json").write_text('{"architecture": {}, "taken": 3}')
    assert main(["inspect", "fused.safetensors"]) == 2
    assert "the record says nothing that this version knows" in capsys.readouterr().err


BAD = {
    "no weights": (["fuse", "none.pt", *FUSE[2:]], "'none.pt' does not exist"),
    "no named weights": (["fuse", "a=none.pt", *FUSE[2:]], "'none.pt' does not exist"),
    "one model": ([*FUSE[:2], *FUSE[3:]], "at least two models; got 1"),
    "one name": (["fuse", "a=shallow.th", "a=shallow.th", *FUSE[3:]], "two models are called 'a'"),
    "three factories": ([*FUSE, "--arch=models.py:deep"], "each of the 2 models (first, second)"),
    "no factory": (replaced("--arch", "models.py:missing"), "missing"),
    "no module": (replaced("--arch", "nowhere.module:deep"), "nowhere"),
    "unfitting weights": (replaced("--arch", "models.py:deep", 1), "does not fit"),
    "no data": (replaced("--data", "none.npy"), "none.npy"),
    "no directory": (replaced("--out", "none/fused.safetensors"), "does not exist"),
    "no files there": (
        replaced("--out", "/proc/fused.pt"),
        "--out '/proc/fused.pt': nothing can be written to '/proc'"
        if os.path.isdir("/proc") and os.access("/proc", os.W_OK)
        else "--out '/proc/fused.pt': ",
    ),
    "unknown ending": (replaced("--out", "fused.weights"), "must end with one of"),
    "unknown picture": ([*FUSE, "--plot=a.gif"], "must end with one of"),
    "one weight": (
        [*FUSE, "--weights=2"],
        "--weights must have one entry for each model, 2;",
    ),
    "negative": (
        [*FUSE, "--weights=2,-1"],
        "--weights[1] must be a number of at least 0",
    ),
    "nothing": ([*FUSE, "--weights=0:0"], "--weights must not be all 0"),
    "no weight": ([*FUSE, "--weights=a,b"], "--weights takes numbers between commas"),
    "solver": ([*FUSE, "--matching-solver=magic"], "--matching-solver must be one of"),
    "calibration": ([*FUSE, "--calibration=training"], "--calibration must be one of"),
    "layer weights": ([*FUSE, "--merging-layer-weights=fisher"], "--merging-layer-weights must be"),
    "zip": (
        [*FUSE, "--merging-layer-weights=sensitivity", "--matching-solver=zip"],
        "--matching-solver zip needs --merging-layer-weights uniform",
    ),
    "device": ([*FUSE, "--device=nowhere"], "--device 'nowhere'"),
    "no number": ([*FUSE, "--limit=many"], "--limit"),
    "no samples": ([*FUSE, "--limit=0"], "--limit must be at least 1; got 0"),
    "no seed": ([*FUSE, "--seed=many"], "--seed must be a whole number"),
    "unknown option": ([*FUSE, "--colour=red"], "--colour"),
    "short option": ([*FUSE, "--epsilon=1"], "Did you mean --matching-solver-epsilon?"),
    "no place": (
        [*FUSE, "--calibration=repair", "--calibration-anchor=0.5"],
        "--calibration-anchor is for --calibration least_squares; this is repair: give that, or",
    ),
    "no place for two": (
        [*FUSE, "--matching-solver-epsilon=1"],
        "--matching-solver-epsilon is for --matching-solver sinkhorn or unbalanced; this is auto: "
        "add --matching-solver sinkhorn or unbalanced",
    ),
    "anchor": (
        [*FUSE, "--calibration=least_squares", "--calibration-anchor=2"],
        "--calibration-anchor must be 'auto' or in [0, 1]; got 2.0",
    ),
    "template": (
        [*FUSE, "--target=deeper", "--target-template=models.py:deep"],
        "is for --target like; this is deeper: give that, or leave --target-template out",
    ),
    "no config": ([*FUSE, "--config=none.yaml"], "--config 'none.yaml' does not exist"),
    "other structure": (replaced("--arch", "models.py:tanh", 1), "no counterpart"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, name):
    arguments, message = BAD[name]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (files / "fused.safetensors").exists()


@pytest.mark.parametrize("taken", ["deep.safetensors", "./deep.safetensors", "link.pt"])
def test_an_input_is_not_written_over(files, capsys, taken):
    (files / "link.pt").symlink_to("shallow.th")
    before = {one: one.read_bytes() for one in files.iterdir() if one.is_file()}
    assert main(replaced("--out", taken)) == 2
    shown = capsys.readouterr()
    assert f"--out {str(Path(taken))!r} is an input" in shown.err
    assert shown.err.count("\n") == 1
    assert all(one.read_bytes() == content for one, content in before.items())


def test_a_corrupt_file_is_refused(files, capsys):
    for name, content in (("a.safetensors", b"\xff" * 50), ("a.pt", b"PK\x03\x04broken")):
        (files / name).write_bytes(content)
        assert main(["fuse", name, *FUSE[2:]]) == 2
        assert name in capsys.readouterr().err
    (files / "data.npy").write_bytes(b"\x93NUMPY broken")
    assert main(FUSE) == 2
    assert "data.npy" in capsys.readouterr().err


def test_pickled_code_in_a_checkpoint_does_not_run(files, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch ran",)

    torch.save({"state_dict": Evil()}, "evil.pt")
    assert main(["fuse", "evil.pt", *FUSE[2:]]) == 2
    assert "evil.pt" in capsys.readouterr().err
    assert not (files / "ran").exists()


def test_a_full_disk_leaves_the_old_output_whole(files, capsys, monkeypatch):
    (files / "fused.safetensors").write_bytes(b"the old one")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(FUSE) == 2
    assert (
        "cannot write --out 'fused.safetensors': No space left on device" in capsys.readouterr().err
    )
    assert (files / "fused.safetensors").read_bytes() == b"the old one"
    assert not [one for one in files.iterdir() if one.name.endswith(".tmp")]


@pytest.mark.parametrize("lost", ["fused.safetensors", "fused.safetensors.json"])
def test_neither_weights_nor_their_record_are_there_without_the_other(files, monkeypatch, lost):
    before = {*files.iterdir()}
    write = os.open

    def full(path, *more, **others):
        if re.fullmatch(rf"\.{re.escape(lost)}\.[0-9a-f]+\.tmp", Path(path).name):
            raise OSError(28, "No space left on device")
        return write(path, *more, **others)

    monkeypatch.setattr(os, "open", full)
    assert main(FUSE) == 2
    assert {one for one in files.iterdir() if one.name != "__pycache__"} <= before


SLOW_SAVE = textwrap.dedent(
    """
    import signal, sys, time
    import clafusion.weights.atomic as output

    # A shell that started the tests in the background may have had the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from clafusion.cli.app import main

    real = output.os.replace
    def slow(*arguments):
        print("about to rename", flush=True)
        time.sleep(60)
        real(*arguments)
    output.os.replace = slow
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_old_output_whole(files, kind):
    (files / "fused.safetensors").write_bytes(b"the old one")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, *FUSE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "about to rename\n"
    process.send_signal(kind)
    _, errors = process.communicate(timeout=30)
    assert (files / "fused.safetensors").read_bytes() == b"the old one"
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "clafusion: interrupted; no output was written\n"
        assert not [one for one in files.iterdir() if one.name.endswith(".tmp")]


def test_the_demo_tells_its_story(tmp_path, capsys):
    assert main(["demo", f"--out-dir={tmp_path}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (tmp_path / "alignment.png").exists()
    assert (tmp_path / "fused.safetensors").exists()
    found = facts["accuracies"]
    fused = found["fused: matched, least squares"]
    assert fused > found["fused: averaged without matching"] + 0.3
    assert fused > 0.85


def test_doctor_tells_why_a_gpu_is_used_or_not(capsys, monkeypatch):
    monkeypatch.setattr("clafusion._native.cuda_devices", lambda: (["a GPU"], ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "GPUs         a GPU\n" in shown
    assert "device=cuda  works\n" in shown
    monkeypatch.setattr(
        "clafusion._native.cuda_devices", lambda: ([], "no CUDA kernels in this build")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "PyTorch finds no GPU" in shown
    assert "clafusion's kernels: no CUDA kernels in this build" in shown
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not facts["cuda_usable"]
    assert facts["cuda_reasons"][0].startswith("PyTorch is built without CUDA")
    assert facts["torch"] == torch.__version__


@pytest.mark.usefixtures("files")
def test_a_merged_and_narrow_model_is_written(capsys):
    assert main([*FUSE, "--target=shallower", "--calibration=least_squares"]) == 0
    shown = capsys.readouterr().out
    assert "merged away  2 of first" in shown
    assert "weights of models.py:shallow\n" in shown
    assert main([*FUSE, "--target-width=narrow"]) == 0
    assert "written      fused.safetensors, weights of models.py:deep with other" in (
        capsys.readouterr().out
    )
    assert main([*FUSE, "--target-width=second"]) == 0
    assert load_file("fused.safetensors")["0.weight"].shape == (6, 12)
    capsys.readouterr()
    assert main([*FUSE, "--target-width=other"]) == 2
    assert "--target-width must be 'own', 'narrow', 'wide' or a model's name" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("files")
def test_an_error_says_where_it_arose_if_asked(capsys):
    assert main([*FUSE, "--seed=-1", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.splitlines()[-1].startswith("clafusion: --seed must be")


def test_a_fault_of_our_own_is_one_line_that_asks_for_a_report(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("shape mismatch\nin some kernel")

    monkeypatch.setattr("clafusion.cli.app.make_app", broken)
    assert main(["doctor"]) == 3
    assert capsys.readouterr().err == (
        "clafusion: internal error: RuntimeError: shape mismatch in some kernel. Please report "
        "it, with what the same command prints with --debug\n"
    )


@pytest.mark.usefixtures("files")
def test_explain_compares_and_fuses_nothing(capsys):
    assert main(["explain", *[one for one in FUSE[1:-1] if "limit" not in one]]) == 0
    assert capsys.readouterr().out.endswith("verdict: they can be fused\n")


def test_the_version_is_that_of_the_installed_package(capsys):
    assert clafusion.__version__ == importlib.metadata.version("clafusion")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clafusion {clafusion.__version__}\n"
    with pytest.raises(AttributeError, match="module 'clafusion' has no attribute 'version'"):
        _ = clafusion.version


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_stdout_that_takes_nothing_is_one_line(files):
    command = [sys.executable, "-m", "clafusion.cli.app", *FUSE, "--calibration=none"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("clafusion: cannot print: No space left on device; the written")
    assert done.stderr.count("\n") == 1
    assert (files / "fused.safetensors").exists()


@pytest.mark.usefixtures("files")
def test_a_reader_of_stdout_that_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "clafusion.cli.app", *FUSE, "--calibration=none"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("-8", "--input-shape takes numbers of at least 1; got '-8'"),
        ("3,0", "--input-shape takes numbers of at least 1; got '3,0'"),
        ("99999999999", "--input-shape 99999999999: 8 samples of 99999999999 numbers would take"),
        ("300000,300000", "--input-shape 300000,300000: 8 samples of 90000000000 numbers"),
    ],
)
def test_shapes_of_which_no_sample_can_be_made_are_refused(capsys, shape, message):
    assert main(["inspect", "--arch=models.py:deep", f"--input-shape={shape}"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_one_factory_for_all_is_that_of_files_of_weights():
    found = loaded_files(["stitched.pt2", "a.pt"], ["nets.py:make"])
    assert [one.factory for one in found.values()] == [None, "nets.py:make"]
