"""Checkpoints as people have them: which state dict is taken, what its values may be."""

import json
import pickle
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from clafusion import InputError, ModelFile
from clafusion.errors import FusionWarning
from clafusion.weights.checkpoints import load_state
from clafusion.weights.factories import build_model, load_model
from tests.support import networks

FACTORIES = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

class SharesMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.detach())

class Renames(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "w" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "w").T
        super()._load_from_state_dict(state_dict, prefix, *rest)

def renames():
    return nn.Sequential(Renames(4, 3))

def hooked():
    def rename(module, state_dict, prefix, *_):
        for name in list(state_dict):
            if name.startswith(prefix + "old."):
                state_dict[prefix + "0." + name.removeprefix(prefix + "old.")] = (
                    state_dict.pop(name)
                )
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_load_state_dict_pre_hook(rename)
    return model

# Says nothing of what a file lacks, nor perhaps of what it holds in vain.
class Hiding(nn.Sequential):
    def __init__(self, *layers, also_unexpected=False):
        super().__init__(*layers)
        self.also_unexpected = also_unexpected

    def load_state_dict(self, *given, **options):
        found = super().load_state_dict(*given, **options)
        found.missing_keys.clear()
        if self.also_unexpected:
            found.unexpected_keys.clear()
        return found

def hiding(**options):
    return Hiding(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), **options)

def hiding_by_hook():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model.register_load_state_dict_post_hook(lambda module, found: found.missing_keys.clear())
    return model

# Gives what a file lacks a value of its own, and the rest through ``.data``.
class Initialises(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.weight.data.copy_(state_dict.pop(prefix + "w"))
        nn.init.zeros_(self.bias)

# Makes new parameters of what a file holds.
class Replaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.weight = nn.Parameter(state_dict.pop(prefix + "w"))

def initialises():
    return nn.Sequential(Initialises(4, 3))

def replaces():
    return nn.Sequential(Replaces())

class Versioned(nn.Module):
    _version = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state_dict, prefix, metadata, *rest):
        self.loaded_version = metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("bias", torch.zeros(3))

def spectral():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return model

def half():
    return nn.Linear(4, 3).half()

def lazy():
    return nn.Sequential(nn.LazyLinear(5))

def meta():
    with torch.device("meta"):
        return mlp()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(FACTORIES)
    return tmp_path


def mlp(seed=0):
    return networks.mlp(4, 5, 3, seed=seed)


def states(*seeds):
    return [mlp(seed).state_dict() for seed in seeds]


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def saved(content, name="w.pt"):
    torch.save(content, name)
    return name


def loaded(content, factory="nets.py:mlp", key=None):
    return ModelFile(factory, saved(content), key).load().state_dict()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- where it lies ------------------------------------------------------------------------------

LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.5", "optimizer_states": [{"state": {}}]}


@pytest.mark.parametrize("prefix", ["model.", "net.", "student.backbone.", "model._orig_mod."])
def test_a_lightning_checkpoint_is_read(prefix):
    (state,) = states(1)
    assert_equal(loaded({**LIGHTNING, "state_dict": prefixed(prefix, state)}), state)


def test_what_lies_beside_the_network_is_left_out_with_a_warning():
    (state,) = states(1)
    content = {**prefixed("model.", state), "criterion.weight": torch.ones(3)}
    with pytest.warns(FusionWarning, match=r"'state_dict\.model' was taken; 1 others were left"):
        found = loaded({"state_dict": content})
    assert_equal(found, state)


def test_an_averaged_model_is_read():
    averaged = AveragedModel(mlp(1))
    averaged.update_parameters(mlp(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loaded(averaged.state_dict())
        stored = load_state(saved(averaged.state_dict()))
    assert_equal(found, averaged.module.state_dict())
    assert_equal(stored, averaged.module.state_dict())


def test_of_several_the_known_one_is_taken_and_the_others_are_named():
    state, ema = states(1, 2)
    content = {
        "model": state,
        "model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.", ema)},
        "optimizer": torch.optim.Adam(mlp().parameters()).state_dict(),
        "epoch": 3,
    }
    with pytest.warns(FusionWarning, match=r"'model' was taken, not 'model_ema\.module'"):
        assert_equal(loaded(content), state)
    with pytest.warns(FusionWarning, match="'model' was taken, not 'model_ema'"):
        assert_equal(load_state(saved(content)), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(loaded(content, key="model_ema"), ema)
        assert_equal(loaded(content, key="model_ema.module"), ema)
        assert_equal(load_state(saved(content), "model_ema"), ema)


def test_only_one_that_fits_counts():
    (state,) = states(1)
    wider = networks.mlp(4, 6, 3).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(loaded({"model": wider, "generator": state}), state)


def test_of_several_in_unknown_places_the_user_chooses():
    student, teacher = states(1, 2)
    content = {"state_dict": {**prefixed("student.", student), **prefixed("teacher.", teacher)}}
    with pytest.raises(InputError, match=r"'state_dict\.student', 'state_dict\.teacher'\): choose"):
        loaded(content)
    assert_equal(loaded(content, key="state_dict.teacher"), teacher)
    with pytest.raises(InputError, match=r"no state dict 'ema'; it has 'state_dict'"):
        loaded(content, key="ema")
    save_file(content["state_dict"], "w.safetensors")
    assert_equal(load_state("w.safetensors", "student"), student)
    with pytest.raises(InputError, match="no state dict 'model'; it has 'student', 'teacher'"):
        load_state("w.safetensors", "model")


def test_the_file_may_be_that_of_the_network_inside_the_model():
    (state,) = states(1)
    assert_equal(loaded(state, "nets.py:Wrapper"), prefixed("net.", state))


def test_parts_of_a_checkpoint_are_read_by_their_index(here):
    (state,) = states(1)
    names = list(state)
    files = {"m-00001-of-00002.safetensors": names[:2], "m-00002-of-00002.safetensors": names[2:]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (here / "m.safetensors.index.json").write_text(json.dumps(index))
    model = ModelFile("nets.py:mlp", "m.safetensors.index.json")
    assert_equal(model.load().state_dict(), state)
    before = model.digest()
    save_file({name: state[name] + 1 for name in names[2:]}, "m-00002-of-00002.safetensors")
    assert model.digest() != before
    with pytest.raises(InputError, match=r"part 2 of 2.*give its index 'm\.safetensors\.index"):
        load_state("m-00002-of-00002.safetensors")
    save_file({names[2]: state[names[2]]}, "m-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=f"lacks '{names[3]}'"):
        model.load()
    (here / "m-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"m-00001.*git lfs pull"):
        model.load()


def test_what_does_not_fit_is_told_by_the_models_names():
    (state,) = states(1)
    for prefix in ("model.", "a.b."):
        for left in state:
            rest = {name: value for name, value in state.items() if name != left}
            with pytest.raises(InputError, match=f"fit 'nets.py:mlp': 1 missing.*'{left}'$"):
                loaded({"state_dict": prefixed(prefix, rest)})
    with pytest.raises(InputError, match=r"key must be a text, the place of a state dict; got 3"):
        loaded(state, key=3)


def test_one_state_dict_under_two_keys_is_one():
    (state,) = states(1)
    content = {"state_dict": state, "best": state}
    content["self"] = content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(loaded(content), state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript_is_named():
    torch.jit.script(nn.Linear(4, 3)).save("w.pt")
    with pytest.raises(InputError, match=r"is a TorchScript archive; in the program that made"):
        load_state("w.pt")


# --- hooks --------------------------------------------------------------------------------------


def test_a_modules_own_hooks_decide():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    found = loaded({"0.w": weight.T.contiguous(), "0.bias": bias}, "nets.py:renames")
    assert_equal(found, {"0.weight": weight, "0.bias": bias})
    found = loaded({"old.weight": weight, "old.bias": bias}, "nets.py:hooked")
    assert_equal(found, {"0.weight": weight, "0.bias": bias})


def test_hooks_go_with_prefixes_and_values_that_mean_something_else():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    state = {"0.w": weight.T.contiguous(), "0.bias": bias}
    found = loaded({"state_dict": prefixed("model.", state)}, "nets.py:renames")
    assert_equal(found, {"0.weight": weight, "0.bias": bias})
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(InputError, match=r"'0\.w' is (int8|complex64) in the file and float32"):
            loaded({**state, "0.w": state["0.w"].to(dtype)}, "nets.py:renames")


@pytest.mark.parametrize("factory", ["nets.py:hiding", "nets.py:hiding_by_hook"])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_what_a_hook_says_nothing_of_is_told(factory, prefix):
    whole = build_model(factory).state_dict()
    whole = {name: torch.randn(one.shape) for name, one in whole.items() if one.dim()}
    lost = ["1.running_mean", "2.weight"]
    state = {name: value for name, value in whole.items() if name not in lost}
    lacks = r"checkpoint 'w\.pt' lacks '2\.weight', '1\.running_mean', .* they keep the values"
    with pytest.warns(FusionWarning, match=lacks):
        found = loaded(prefixed(prefix, state), factory)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.warns(FusionWarning, match=r"lacks '1\.bias', .* it keeps the value that"):
        loaded({name: one for name, one in whole.items() if name != "1.bias"}, factory)
    assert_equal(loaded(whole, factory), {**found, **whole})  # lacking a counter of batches only


@pytest.mark.parametrize("factory", ["nets.py:hiding", "nets.py:hiding_by_hook"])
def test_it_is_told_once_of_a_model_whose_weights_stay_in_their_file(factory):
    whole = build_model(factory).state_dict()
    for lost in ("2.weight", "1.running_mean"):
        saved({name: one for name, one in whole.items() if name != lost})
        with pytest.warns(FusionWarning, match=f"lacks '{lost}'") as told:
            model, _ = ModelFile(factory, "w.pt").open()
        assert len(told) == 1
        assert not any(one.is_meta for one in model.state_dict().values())


def test_names_are_found_though_a_hook_says_nothing_of_any():
    factory = "nets.py:hiding(also_unexpected=True)"
    state = {name: one + 1 for name, one in build_model(factory).state_dict().items()}
    del state["2.bias"]
    with pytest.warns(FusionWarning, match=r"lacks '2\.bias'"):
        found = loaded(prefixed("net.", state), factory)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(InputError, match="the model's own loading takes nothing from it"):
        loaded({"other.weight": torch.ones(3)}, factory)


def test_values_that_hooks_give_are_no_lost_ones():
    weight = torch.randn(3, 4)
    found = loaded({"0.w": weight}, "nets.py:initialises")
    assert_equal(found, {"0.weight": weight, "0.bias": torch.zeros(3)})
    for weight in (torch.randn(3, 4), torch.zeros(3, 4)):
        assert_equal(loaded({"0.w": weight}, "nets.py:replaces"), {"0.weight": weight})


def test_the_versions_of_modules_reach_their_hooks():
    state = OrderedDict({"module.weight": torch.ones(3)})
    state._metadata = OrderedDict({"": {"version": 1}, "module": {"version": 2}})
    model = load_model("nets.py:Versioned", saved({"state_dict": state}))
    assert model.loaded_version == 2


# --- values -------------------------------------------------------------------------------------

VALUES = {
    "int8": (torch.ones(5, 4, dtype=torch.int8), "is int8 in the file and float32.*dequantise it"),
    "uint8": (torch.ones(5, 4, dtype=torch.uint8), "is uint8 in the file.*dequantise it first"),
    "float8": (torch.ones(5, 4).to(torch.float8_e4m3fn), "is float8_e4m3fn in the.*dequantise it"),
    "bool": (torch.ones(5, 4, dtype=torch.bool), r"is bool in the file.*\.float\(\)"),
    "complex": (torch.ones(5, 4, dtype=torch.complex64), "is complex64.*imaginary parts would be"),
    "NaN": (torch.full((5, 4), torch.nan), "holds 20 NaN or infinite values: take a checkpoint"),
    "infinite": (torch.full((5, 4), torch.inf), "holds 20 NaN or infinite values"),
    "sparse": (
        lambda: torch.eye(5, 4).to_sparse(),
        r"is sparse \(torch\.sparse_coo\): make it dense",
    ),
    "csr": (
        lambda: torch.eye(5, 4).to_sparse_csr(),
        r"is sparse \(torch\.sparse_csr\): make it dense",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(5, 4)]), "is a nested tensor"),
    "meta": (torch.ones(5, 4, device="meta"), "is on the meta device and has no values"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(5, 4), 0.1, 0, torch.qint8),
        r"is quantised \(qint8\): dequantise it first \(\.dequantize\(\)\)",
    ),
}


@pytest.mark.filterwarnings("ignore")  # that torch's sparse and nested tensors may change
@pytest.mark.parametrize("kind", VALUES)
def test_values_that_would_mean_something_else_are_refused_by_name(kind):
    value, message = VALUES[kind]
    value = value() if callable(value) else value
    (state,) = states(1)
    with pytest.raises(InputError, match=f"'w.pt' does not fit.*'0.weight' {message}") as caught:
        loaded({**state, "0.weight": value})
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "nested", "meta", "quantised"])
def test_values_that_no_model_could_take_are_refused_without_a_model(kind):
    value, message = VALUES[kind]
    value = value() if callable(value) else value
    with pytest.raises(InputError, match=f"'w' {message}"):
        load_state(saved({"w": value}))


def test_a_scale_beside_quantised_weights_is_named_too():
    (state,) = states(1)
    quantised = {"0.weight": state["0.weight"].to(torch.int8), "0.scale": torch.ones(5)}
    with pytest.raises(InputError, match=r"'0\.weight' is int8.*1 not in the model: '0\.scale'"):
        loaded({**state, **quantised})


def test_other_precisions_are_taken_as_long_as_the_values_fit():
    (state,) = states(1)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = loaded({name: value.to(dtype) for name, value in state.items()})
        assert_equal(found, {name: value.to(dtype).float() for name, value in state.items()})
    large = {"weight": torch.full((3, 4), 1e6), "bias": torch.zeros(3)}
    with pytest.raises(InputError, match=r"float32 in the file and float16.*12 of its values"):
        loaded(large, "nets.py:half")
    real = {"weight": torch.ones(3)}
    assert loaded(real, "nets.py:spectral")["weight"].dtype == torch.complex64


def test_buffers_keep_their_kind():
    state = {
        "weight": torch.ones(3),
        "mask": torch.tensor([1, 0, 1], dtype=torch.uint8),
        "count": torch.tensor(4.0),
        "bias": torch.tensor([0, -torch.inf, 0]),
    }
    found = loaded(state, "nets.py:Buffers")
    assert found["mask"].tolist() == [True, False, True]
    assert (found["count"].dtype, found["count"].item()) == (torch.int64, 4)
    with pytest.raises(InputError, match=r"'count' is float32 in the file and int64.*cannot hold"):
        loaded({**state, "count": torch.tensor(4.5)}, "nets.py:Buffers")
    with pytest.raises(InputError, match=r"'mask' is uint8 in the file and bool in the model"):
        loaded({**state, "mask": torch.full((3,), 7, dtype=torch.uint8)}, "nets.py:Buffers")
    with pytest.raises(InputError, match=r"'bias' is bool in the file and float32"):
        loaded({**state, "bias": torch.ones(3, dtype=torch.bool)}, "nets.py:Buffers")


def test_statistics_must_be_finite():
    state = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).state_dict()
    state["1.running_var"] = torch.full((5,), torch.nan)
    with pytest.raises(InputError, match=r"'1\.running_var' holds 5 NaN"):
        loaded(state, "nets.py:normed")


@pytest.mark.parametrize("factory", ["nets.py:Tied", "nets.py:SharesMemory"])
def test_two_tensors_for_one_parameter_must_be_equal(factory):
    weight = torch.randn(6, 4)
    found = loaded({"embed.weight": weight, "head.weight": weight.clone()}, factory)
    assert torch.equal(found["head.weight"], weight)
    assert torch.equal(loaded({"head.weight": weight}, factory)["embed.weight"], weight)
    with pytest.raises(InputError, match="are tied in the model and differ in the file: remove"):
        loaded({"embed.weight": weight, "head.weight": weight + 1}, factory)


# --- models without values ----------------------------------------------------------------------


def test_a_lazy_model_and_one_without_values_are_refused_in_one_line():
    (state,) = states(1)
    with pytest.raises(InputError, match=r"factory 'nets\.py:lazy': '0\.weight' has no shape yet"):
        loaded(state, "nets.py:lazy")
    with pytest.raises(InputError, match=r"'0\.weight' is on the meta device, which holds no"):
        loaded(state, "nets.py:meta")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_ends_too_early_is_called_so(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(99, 9).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (12, 60, 200, 400, 1000, len(whole) - 3):  # also within the name of a function
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"corrupt: it is cut short, at {size} bytes"):
            load_state(path)
    path.write_bytes(pickle.dumps({"weight": [1.0]}))  # whole, but not of torch
    with pytest.raises(InputError) as told:
        load_state(path)
    assert "cut short" not in str(told.value)


def test_tensors_beside_the_state_dict_that_is_taken_are_told(tmp_path):
    path, state = tmp_path / "weights.pt", nn.Linear(3, 2).state_dict()
    others = {name: value + 1 for name, value in state.items()}
    torch.save({**others, "epoch": torch.tensor(3), "state_dict": state}, path)
    with pytest.warns(FusionWarning, match="was taken; 2 others were left out: 'weight'"):
        found = load_state(path)
    assert all(torch.equal(found[name], state[name]) for name in state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_state(path, key="state_dict")
        torch.save({"state_dict": state, "epoch": torch.tensor(3)}, path)
        load_state(path)
