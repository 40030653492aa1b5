"""Which checkpoints a command takes, and that what it writes comes back."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clafusion.cli.app import main
from clafusion.weights.state_files import save_model
from tests.support import networks

FACTORY = """
import torch
from torch import nn

built = []

def mlp(*widths):
    layers = []
    for into, out in zip(widths, widths[1:]):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

def deep():
    return mlp(12, 9, 8, 5)

def shallow():
    return mlp(12, 6, 5)

class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.net = deep()
        self.register_buffer("scale", torch.full((12,), scale), persistent=False)

    def forward(self, x):
        return self.net(self.scale * x)

def forgetful():  # the third model is another one
    built.append(1)
    return Scaled(1.0 if len(built) < 3 else 2.0)

class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = deep()
        self.factor = {"factor": 1.0}

    def get_extra_state(self):
        return self.factor

    def set_extra_state(self, state):
        self.factor = state

    def forward(self, x):
        return self.net(x) * self.factor["factor"]

def lazy():
    return nn.Sequential(nn.LazyLinear(9), nn.ReLU(), nn.LazyLinear(5))

def meta():
    with torch.device("meta"):
        return deep()
"""
WIDTHS = (12, 9, 8, 5)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32))
    save_model(networks.mlp(12, 6, 5), "shallow.pt")
    return tmp_path


def command(first, second, *archs, out="out.safetensors"):
    given = [f"--arch=nets.py:{arch}" for arch in archs]
    return ["fuse", first, second, *given, "--data=data.npy", f"--out={out}"]


def prefixed(state):
    return {f"net.{name}": value for name, value in state.items()}


@pytest.mark.filterwarnings("default::clafusion.errors.FusionWarning")
def test_the_key_of_a_checkpoint_is_chosen(capsys):
    state, ema = networks.mlp(*WIDTHS).state_dict(), networks.mlp(*WIDTHS, seed=1).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": ema, "epoch": 3}, "both.pt")
    torch.save(ema, "ema.pt")
    fuse = command("both.pt", "shallow.pt", "deep", "shallow")
    assert main([*fuse, "--weights=1,0", "--calibration=none"]) == 0
    shown = capsys.readouterr()
    assert "clafusion: warning: checkpoint 'both.pt': 'state_dict' was taken, not" in shown.err
    assert torch.allclose(load_file("out.safetensors")["0.weight"], state["0.weight"], atol=1e-6)
    chosen = ["--checkpoint-key=state_dict_ema", "--checkpoint-key="]
    assert main([*fuse, *chosen, "--weights=1,0", "--calibration=none"]) == 0
    assert capsys.readouterr().err == ""
    assert torch.allclose(load_file("out.safetensors")["0.weight"], ema["0.weight"], atol=1e-6)
    assert main([*fuse, *chosen, "--checkpoint-key=x"]) == 2
    told = capsys.readouterr().err
    assert "--checkpoint-key once, or once for each of the 2 models (first, second); got 3" in told
    assert main([*fuse, "--checkpoint-key=ema", "--checkpoint-key="]) == 2
    told = capsys.readouterr().err
    assert "has no state dict 'ema'; it has 'state_dict', 'state_dict_ema'" in told
    inspect = ["inspect", "both.pt", "--arch=nets.py:deep", "--data=data.npy"]
    assert main([*inspect, "--checkpoint-key=state_dict_ema"]) == 0
    assert capsys.readouterr().err == ""
    align = [one for one in fuse[1:] if not one.startswith("--out")]
    assert main(["align", *align, *chosen]) == 0
    assert capsys.readouterr().err == ""


def test_a_key_in_a_manifest(files, capsys):
    state, ema = networks.mlp(*WIDTHS).state_dict(), networks.mlp(*WIDTHS, seed=1).state_dict()
    torch.save({"model": state, "model_ema": ema}, "both.pt")
    models = {
        "a": {"factory": "nets.py:deep", "weights": "both.pt", "key": "model_ema"},
        "b": {"factory": "nets.py:shallow", "weights": "shallow.pt"},
    }
    manifest = {"models": models, "data": "data.npy", "weights": [1, 0], "out": "fused"}
    (files / "pairs.json").write_text(json.dumps({**manifest, "settings": {"calibration": "none"}}))
    assert main(["fuse-pairs", "pairs.json"]) == 0
    found = load_file("fused/a+b.safetensors")
    assert torch.allclose(found["0.weight"], ema["0.weight"], atol=1e-6)
    capsys.readouterr()
    models["a"]["key"] = 3
    (files / "pairs.json").write_text(json.dumps(manifest))
    assert main(["fuse-pairs", "pairs.json"]) == 2
    assert "models, a: key must be a text; got 3" in capsys.readouterr().err


def test_weights_that_would_not_come_back_are_not_written(files, capsys):
    for seed in (0, 1):
        torch.save(prefixed(networks.mlp(*WIDTHS, seed=seed).state_dict()), f"{seed}.pt")
    (files / "out.safetensors").write_bytes(b"the old one")
    before = sorted(os.listdir())
    assert main(command("0.pt", "1.pt", "forgetful")) == 2
    told = capsys.readouterr().err
    assert "into a new model of 'nets.py:forgetful', compute something else" in told
    assert "non-persistent buffer 'scale' differs from a fresh model's" in told
    assert told.count("\n") == 1
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before
    assert (files / "out.safetensors").read_bytes() == b"the old one"


def test_extra_state_is_written_where_the_ending_allows_it(capsys):
    for seed in (0, 1):
        state = prefixed(networks.mlp(*WIDTHS, seed=seed).state_dict())
        torch.save({**state, "_extra_state": {"factor": 3.0}}, f"{seed}.pt")
    assert main(command("0.pt", "1.pt", "Extra")) == 2
    assert "'_extra_state' is a dict" in capsys.readouterr().err
    assert main(command("0.pt", "1.pt", "Extra", out="out.pt")) == 0
    assert torch.load("out.pt")["_extra_state"] == {"factor": 3.0}


@pytest.mark.parametrize(
    ("arch", "message"), [("lazy", "'0.weight' has no shape yet"), ("meta", "on the meta device")]
)
def test_models_without_values_are_refused_in_one_line(capsys, arch, message):
    torch.save(networks.mlp(12, 9, 5).state_dict(), "w.pt")
    assert main(command("w.pt", "shallow.pt", arch, "shallow")) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    inspect = ["inspect", f"--arch=nets.py:{arch}", "--input-shape=12"]
    code = main(inspect)
    told = capsys.readouterr().err
    assert (code, told) == (0, "") if arch == "lazy" else (code, told.count("\n")) == (2, 1)


def test_out_is_no_part_of_a_checkpoint_in_several_files(files, capsys):
    state = networks.mlp(*WIDTHS).state_dict()
    save_file(state, "part.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = (files / "part.safetensors").read_bytes()
    given = ("model.safetensors.index.json", "shallow.pt", "deep", "shallow")
    assert main(command(*given, out="part.safetensors")) == 2
    assert "--out 'part.safetensors' is an input, which would be lost" in capsys.readouterr().err
    assert (files / "part.safetensors").read_bytes() == whole
