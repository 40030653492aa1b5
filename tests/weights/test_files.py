"""Files of weights and factories: what is read, what is refused, what a failed write leaves."""

import argparse
import os
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import clafusion
from clafusion import InputError
from clafusion.weights.atomic import making_directory, removed_on_error
from clafusion.weights.checkpoints import load_state
from clafusion.weights.factories import build_model, load_model
from clafusion.weights.state_files import save_model, save_state
from tests.support import networks

FACTORIES = """
import torch
from torch import nn

from neighbour import WIDTH

class Net(nn.Sequential):
    def __init__(self, depth=1, *, width=WIDTH):
        super().__init__(*[nn.Linear(width, width) for _ in range(depth)])

class Wrapper(nn.Module):  # its own names begin with "module."
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

class Space:
    make = Net

def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

def fails():
    raise RuntimeError("no such luck,\\nin two lines")

def text():
    return "text"

ready = Net()
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "lacks.py").write_text("import there_is_no_such_package\n")
    (tmp_path / "wrong.py").write_text("def (\n")
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) or "":
            where = str(sys.modules[name].__file__)
            if where.startswith(str(tmp_path)):
                del sys.modules[name]


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".pth", ".th", ".bin", ".ckpt"])
@pytest.mark.parametrize(
    "wrapping", [None, "state_dict", "model_state_dict", "model", "net", "anything"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappings_and_prefixes_are_taken_off(tmp_path, ending, wrapping, prefix):
    state = networks.mlp(3, 4, 2).state_dict()
    stored = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / f"weights{ending}"
    torch.save(stored if wrapping is None else {"epoch": 3, wrapping: stored}, path)
    assert_equal(load_state(path), state)


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    save_file({"module.a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    assert load_state(tmp_path / "w.safetensors").keys() == {"module.a", "b"}


UNREADABLE = {
    "missing": ("missing.pt", None, "does not exist"),
    "a directory": (".", None, "is no file"),
    "another ending": ("weights.zip", b"PK", "unknown ending"),
    "empty": ("weights.pt", b"", "is empty"),
    "a broken archive": ("weights.pt", b"PK\x03\x04broken", "corrupt"),
    "text": (
        "weights.th",
        b"e some text",
        "is corrupt or not what its ending says: it does not begin as a file of torch.save. Copy",
    ),
    "another format": (
        "weights.pt",
        save({"a": torch.ones(2)}),
        "begins as a file of safetensors, not of torch.save: give it the ending of that",
    ),
    "a pointer": (
        "weights.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "a web page": ("weights.pt", b"\n<!DOCTYPE html><html>", "is a web page.*download it again"),
    "a part": (
        "model-00001-of-00003.safetensors",
        b"\xff" * 64,
        "is part 1 of 3 of a checkpoint: fetch its index 'model.safetensors.index.json'",
    ),
    "no index": ("model.safetensors.index.json", b"{}", "no index of a checkpoint.*'weight_map'"),
    "no JSON": ("model.safetensors.index.json", b"{", "cannot be read"),
    "an index without files": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "names files that are not beside it: 'model-00001-of-00002.safetensors'; fetch them",
    ),
    "an index of a file elsewhere": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "../a.safetensors"}}',
        "the file of 'a' must be a name in the same folder",
    ),
    "no safetensors": ("weights.safetensors", b"\xff" * 64, "corrupt"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_named(here, name):
    path, content, message = UNREADABLE[name]
    if content is not None:
        (here / path).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_state(here / path)
    assert str(here / path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_off_file_is_corrupt(tmp_path):
    model = networks.mlp(30, 40, 20)
    for ending in (".pt", ".safetensors"):
        path = tmp_path / f"weights{ending}"
        save_model(model, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match="corrupt"):
            load_state(path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ([torch.ones(2)], "holds a list, not a state dict"),
        ({}, "it has no entries"),
        ({"state_dict": {"a": torch.ones(2), "b": 3}}, "not tensors: 'b'"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=message):
        load_state(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        (nn.Linear(3, 2), r"a whole module \(torch\.nn\.modules\.linear\.Linear\)"),
        ({"args": argparse.Namespace(lr=1)}, r"a program's arguments \(argparse\.Namespace\)"),
        ({"o": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, "a whole optimizer"),
        ({"best": np.float64(0.9)}, "NumPy values"),
        (nn.LazyLinear(3).state_dict(), "the weights of a lazy module that never ran"),
    ],
)
@pytest.mark.parametrize("is_old", [False, True])
def test_what_is_no_tensor_is_named_and_told_what_to_do(tmp_path, stored, named, is_old):
    path = tmp_path / "weights.pt"
    torch.save(stored, path, _use_new_zipfile_serialization=not is_old)
    with pytest.raises(InputError, match=f"holds more than tensors: {named}") as caught:
        load_state(path)
    assert "save the state dict alone: torch.save(model.state_dict()" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "In PyTorch 2.6" not in str(caught.value)


# --- factories ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("factory", "depth", "width"),
    [
        ("factories.py:Net", 1, 4),
        ("factories:Net", 1, 4),
        ("factories.py:Net(3)", 3, 4),
        ("factories.py:Net(depth=2, width=5)", 2, 5),
        ("factories.py:Space.make", 1, 4),
    ],
)
def test_a_factory_makes_a_model_in_eval_mode(factory, depth, width):
    model = build_model(factory)
    assert len(model) == depth
    assert model[0].in_features == width
    assert not model.training


@pytest.mark.usefixtures("here")
def test_two_factories_of_one_file_share_their_classes():
    assert type(build_model("factories.py:Net")) is type(build_model("factories.py:Net(2)"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("factories.py", "write MODULE:FACTORY"),
        ("factories.py:", "write MODULE:FACTORY"),
        (":Net", "write MODULE:FACTORY"),
        ("missing.py:Net", "the file 'missing.py' does not exist"),
        ("missing.package:Net", "there is no module 'missing'"),
        ("factories.py:Nett", r"has no 'Nett'; it has Net"),
        ("factories.py:Space.nothing", "has no 'nothing'"),
        ("factories.py:number", "is a int; it must be a function"),
        ("factories.py:ready", "is a Net; it must be a function"),
        ("factories.py:fails", "failed: RuntimeError: no such luck, in two lines"),
        ("factories.py:text", "must return a torch.nn.Module; it returned str"),
        ("factories.py:Net(nothing=1)", "failed: TypeError"),
        ("factories.py:Net(number)", "must be literals"),
        ("factories.py:Net(**{})", "must be literals"),
        ("factories.py:Net(", "write MODULE:FACTORY"),
        ("factories.py:Net(1))", "must be literals"),
        ("raises.py:Net", "importing 'raises.py' failed: ZeroDivisionError"),
        ("leaves.py:Net", "importing 'leaves.py' failed: SystemExit: 3"),
        ("lacks.py:Net", "failed: ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        ("lacks:Net", "failed: ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        ("wrong.py:Net", "importing 'wrong.py' failed: SyntaxError"),
    ],
)
def test_a_bad_factory_is_refused_in_one_line(factory, message):
    with pytest.raises(InputError, match=message) as caught:
        build_model(factory)
    assert "\n" not in str(caught.value)


def test_arguments_are_never_run(here):
    with pytest.raises(InputError, match="must be literals"):
        build_model("factories.py:Net(__import__('os').mkdir('ran'))")
    assert not (here / "ran").exists()


# --- fitting ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_model_holds_the_weights_in_the_file():
    expected = build_model("factories.py:Net(2)").state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in expected.items()}}, "w.th")
    model = load_model("factories.py:Net(2)", "w.th")
    assert_equal(model.state_dict(), expected)
    assert not model.training


@pytest.mark.usefixtures("here")
def test_a_submodule_that_is_called_module_keeps_its_name():
    expected = build_model("factories.py:Wrapper").state_dict()
    torch.save(dict(expected), "w.pt")
    assert_equal(load_model("factories.py:Wrapper", "w.pt").state_dict(), expected)


@pytest.mark.usefixtures("here")
def test_missing_unexpected_and_reshaped_entries_are_all_listed():
    state = {f"{i}.extra": torch.ones(1) for i in range(7)}
    state["0.weight"] = torch.ones(4, 9)
    save_file(state, "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_model("factories.py:Net(2)", "w.safetensors")
    message = str(caught.value)
    assert "3 missing from the file: '0.bias', '1.weight', '1.bias'" in message
    assert "7 not in the model: '0.extra', '1.extra', " in message
    assert "and 2 more" in message
    assert "'0.weight' is 4x9 in the file and 4x4 in the model" in message


@pytest.mark.usefixtures("here")
def test_a_file_may_lack_what_eval_mode_does_not_need():
    state = build_model("factories.py:normed").state_dict()
    del state["1.num_batches_tracked"]
    torch.save(dict(state), "w.pt")
    assert "1.running_var" in load_model("factories.py:normed", "w.pt").state_dict()
    del state["1.running_var"]
    torch.save(dict(state), "w.pt")
    with pytest.raises(InputError, match=r"1 missing from the file: '1\.running_var'"):
        load_model("factories.py:normed", "w.pt")


@pytest.mark.usefixtures("here")
def test_a_tied_weight_may_be_in_the_file_once():
    weight = torch.randn(6, 4)
    save_file({"embed.weight": weight}, "w.safetensors")
    model = load_model("factories.py:Tied", "w.safetensors")
    assert torch.equal(model.head.weight, weight)


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
def test_what_is_written_loads_back(tmp_path, ending):
    model = networks.vgg(1, 2)
    save_model(model, tmp_path / f"w{ending}")
    found = load_state(tmp_path / f"w{ending}")
    state = model.state_dict()
    assert found.keys() == state.keys()
    assert_equal(found, {name: state[name] for name in found})  # safetensors has its own order
    assert [one.name for one in tmp_path.iterdir()] == [f"w{ending}"]


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".safetensors.index.json"])
def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path, ending):
    model = networks.vgg(1, 2)
    save_model(model, tmp_path / f"w{ending}", dtype="bfloat16")
    found, state = load_state(tmp_path / f"w{ending}"), model.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        wanted = value.bfloat16() if value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    assert all(one.dtype != torch.bfloat16 for one in model.state_dict().values())


def test_a_type_that_cannot_hold_the_weights_is_refused_and_nothing_is_written(tmp_path):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    with pytest.raises(InputError, match=r"'weight' has values up to 1e\+06.*bfloat16"):
        save_model(model, tmp_path / "w.pt", dtype=torch.float16)
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16; got"):
        save_model(model, tmp_path / "w.pt", dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_tied_and_overlapping_weights_are_written_under_every_name():
    model = build_model("factories.py:Tied")
    save_model(model, "w.safetensors")
    assert load_file("w.safetensors").keys() == {"embed.weight", "head.weight"}
    build_model("factories.py:Tied").load_state_dict(load_file("w.safetensors"))

    class Overlapping(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(12.0)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[3:7])
            self.register_buffer("transposed", whole.view(3, 4).T)

    save_model(Overlapping(), "w.safetensors")
    assert_equal(
        dict(sorted(load_file("w.safetensors").items())),
        dict(sorted(Overlapping().state_dict().items())),
    )


def test_same_weights_same_bytes(tmp_path):
    for ending in (".safetensors", ".pt"):
        first, second = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
        save_model(networks.mlp(5, 4, 3), first)
        save_model(networks.mlp(5, 4, 3), second)
        if ending == ".safetensors":  # torch's archive holds the file's own name
            assert first.read_bytes() == second.read_bytes()
        assert_equal(load_state(first), load_state(second))


def test_a_new_file_obeys_the_umask_and_an_old_one_keeps_its_mode(tmp_path):
    path = tmp_path / "w.safetensors"
    before = os.umask(0o027)
    try:
        save_model(networks.mlp(3, 2), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    save_model(networks.mlp(3, 2), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "target.pt")
    save_model(networks.mlp(3, 2), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert load_state(tmp_path / "target.pt").keys() == {"0.weight", "0.bias"}


def test_where_nothing_can_be_written_is_refused(tmp_path):
    model = networks.mlp(3, 2)
    with pytest.raises(InputError, match=r"must end with one of \.safetensors"):
        save_model(model, tmp_path / "w.onnx")
    with pytest.raises(InputError, match="does not exist"):
        save_model(model, tmp_path / "none" / "w.pt")
    (tmp_path / "w.pt").mkdir()
    with pytest.raises(InputError, match="exists and is no file"):
        save_model(model, tmp_path / "w.pt")


FULL_DISK = textwrap.dedent(
    """
    import resource, sys
    from torch import nn
    from clafusion import InputError
    from clafusion.weights.state_files import save_model

    model = nn.Linear(300, 300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails
    for path in sys.argv[1:]:
        try:
            save_model(model, path)
        except InputError as error:
            print(error)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_write_that_the_system_refuses_leaves_the_old_file_whole(tmp_path):
    paths = [tmp_path / f"w{ending}" for ending in (".safetensors", ".pt")]
    for path in paths:
        path.write_bytes(b"the old one")
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = found.stdout.splitlines()
    assert len(lines) == 2, found
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith(f"cannot write path {str(path)!r}: ")
        assert path.read_bytes() == b"the old one"
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_full_disk_is_named(tmp_path, ending):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write path .*File too large"):
            save_state({"weight": torch.zeros(100, 100)}, tmp_path / f"weights{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_has_the_name_of_its_argument(tmp_path):
    with (
        pytest.raises(InputError, match=r"cannot write out_dir .*nothing is left behind"),
        making_directory(tmp_path / "made", "out_dir") as made,
    ):
        (made / "no folder" / "file").write_text("")
    assert not list(tmp_path.iterdir())


def test_a_file_made_on_the_way_goes_after_an_error_unless_it_was_there(tmp_path):
    def fail(path):
        with removed_on_error(path):
            path.write_bytes(b"made")
            raise ValueError("late")

    old, new = tmp_path / "old.pt2", tmp_path / "new.pt2"
    old.write_bytes(b"old")
    for path in (old, new):
        with pytest.raises(ValueError, match="late"):
            fail(path)
    assert [*tmp_path.iterdir()] == [old]


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_refused_by_its_argument(path):
    model = networks.mlp(4, 5, 3)
    results = [
        clafusion.fuse([model, networks.mlp(4, 5, 3)], torch.randn(60, 4), calibration="none"),
        clafusion.merge(model, [model]),
    ]
    writers = [one.save for one in results]
    for write in (*writers, lambda one: save_model(model, one)):
        with pytest.raises(InputError, match="path must be a path, as text"):
            write(path)
