"""What a run writes comes back: names, extra state, and what no state dict holds."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clafusion import ModelFile, fuse_pairs
from clafusion.weights.state_files import save_model
from tests.support import networks

FACTORY = """
import torch
from torch import nn

built = []

def deep():
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))

class Wrapper(nn.Module):  # its own names begin with "module."
    def __init__(self, scale=1.0):
        super().__init__()
        self.module = deep()
        self.register_buffer("scale", torch.full((12,), scale), persistent=False)

    def forward(self, x):
        return self.module(self.scale * x)

def forgetful():  # the third model is another one
    built.append(1)
    return Wrapper(1.0 if len(built) < 3 else 2.0)

class Extra(Wrapper):
    def __init__(self):
        super().__init__()
        self.factor = {"factor": 1.0}

    def get_extra_state(self):
        return self.factor

    def set_extra_state(self, state):
        self.factor = state

    def forward(self, x):
        return super().forward(x) * self.factor["factor"]
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(FACTORY)
    return tmp_path


@pytest.fixture
def data():
    return torch.randn(60, 12, generator=torch.Generator().manual_seed(0))


def files(nets, factory, **extra):
    found = {}
    for seed, name in enumerate("ab"):
        state = networks.mlp(12, 9, 5, seed=seed).state_dict()
        named = {f"module.{one}": value for one, value in state.items()}
        torch.save({**named, **extra}, nets / f"{name}.pt")
        found[name] = ModelFile(f"{nets}/nets.py:{factory}", nets / f"{name}.pt")
    return found


def test_names_that_begin_with_module_are_kept(nets, data):
    models = files(nets, "Wrapper")
    (kept,) = fuse_pairs(models, data)
    (written,) = fuse_pairs(models, data, out_dir=nets / "out")
    assert written.state.keys() == kept.state.keys() >= {"module.0.weight"}
    assert torch.equal(written.model(data), kept.model(data))
    assert torch.equal(written.model.module[0].weight, kept.state["module.0.weight"])


def test_a_result_that_would_not_come_back_fails(nets, data):
    (result,) = fuse_pairs(files(nets, "forgetful"), data, out_dir=nets / "out")
    assert "non-persistent buffer 'scale' differs from a fresh model's" in result.error
    assert not list((nets / "out").glob("*.safetensors"))


def test_extra_state_is_kept_and_resumed(nets, data):
    models = files(nets, "Extra", _extra_state={"factor": 3.0})
    (written,) = fuse_pairs(models, data, out_dir=nets / "out")
    assert written.error is None
    assert written.path.name == "a+b.pt"
    assert written.model.factor == {"factor": 3.0}
    (again,) = fuse_pairs(models, data, out_dir=nets / "out")
    assert again.resumed
    assert torch.equal(again.model(data), written.model(data))
    (kept,) = fuse_pairs(models, data)
    assert torch.equal(kept.model(data), written.model(data))


class Kept(nn.Sequential):
    def get_extra_state(self):
        return object()

    def set_extra_state(self, state):
        pass


def test_extra_state_that_no_file_can_give_back_fails_the_pair(tmp_path, data):
    models = {name: Kept(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)) for name in "ab"}
    (kept,) = fuse_pairs(models, data)
    assert kept.error is None
    (result,) = fuse_pairs(models, data, out_dir=tmp_path)
    assert "'_extra_state' is a object" in result.error
    assert result.deep is None
    assert not list(tmp_path.glob("a+b*"))


def test_a_result_would_not_replace_a_models_own_file(nets, data):
    models = files(nets, "Wrapper")
    save_model(models["a"].load(), nets / "a+b.pt")
    models["a"] = ModelFile(models["a"].factory, nets / "a+b.pt")
    with pytest.raises(ValueError, match="would be written over"):
        fuse_pairs(models, data, out_dir=nets)
    part = nets / "a+b.safetensors"  # of a checkpoint in several files
    state = models["a"].load().state_dict()
    save_file(state, part)
    index = nets / "several.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, part.name)}))
    models["a"] = ModelFile(models["a"].factory, index)
    with pytest.raises(ValueError, match=r"a\+b.safetensors' would be written over"):
        fuse_pairs(models, data, out_dir=nets)
