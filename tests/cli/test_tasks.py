"""Merges and reassemblies in a manifest: done, kept, refused early, and told by `check`."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml

import clafusion
from clafusion.cli.app import main
from clafusion.profiling.samples import load_samples
from clafusion.weights.checkpoints import load_state
from clafusion.weights.state_files import save_model
from tests.support.many_pairs import FACTORY
from tests.support.networks import mlp

BASE = (12, 20, 16, 5)
OTHER = (12, 14, 10, 8, 5)


def changed(seed):
    base = mlp(*BASE, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in base.parameters():
            one.add_(0.05 * torch.randn(one.shape, generator=generator) * one.abs().mean())
    return base


MODELS = {
    "base": mlp(*BASE, seed=0),
    "maths": changed(1),
    "code": changed(2),
    "other": mlp(*OTHER, seed=5),
    "stranger": mlp(*BASE, seed=7),
}
MANIFEST = {
    "factory": f"nets.py:mlp{BASE}",
    "models": {
        **{name: f"{name}.safetensors" for name in MODELS},
        "other": {"factory": f"nets.py:mlp{OTHER}", "weights": "other.safetensors"},
    },
    "data": "data.npy",
    "merges": {
        "both": {"base": "base", "models": ["maths", "code"], "weights": [3, 1], "data": None},
        "tuned": {
            "base": "base",
            "models": ["maths", "code"],
            "data": {"maths": "a.npy", "code": {"file": "b.npy", "limit": 60}},
            "settings": {"method": "sensitivity", "calibration": "repair"},
        },
    },
    "reassemblies": {
        "stitched": {"models": ["base", "other"], "settings": {"blocks": 2, "candidates": 2}}
    },
    "out": "results",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(FACTORY)
    for name, model in MODELS.items():
        save_model(model, tmp_path / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    for name in ("data", "a", "b"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(150, 12)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(folder, **changes):
    (folder / "zoo.yaml").write_text(yaml.safe_dump(copy.deepcopy(MANIFEST) | changes))
    return str(folder / "zoo.yaml")


def lines(folder):
    return [json.loads(one) for one in (folder / "results/tasks.jsonl").read_text().splitlines()]


def test_merges_and_reassemblies_of_a_manifest(folder, capsys):
    path = manifest(folder)
    assert main(["check", path]) == 0
    assert capsys.readouterr().out == "can be done  3 of 3 merges and reassemblies\n"
    assert main(["fuse-pairs", path]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "both      merge       maths 0.75, code 0.25" in shown.out
    assert "stitched.pt2" in shown.out
    own = {name: MODELS[name] for name in ("maths", "code")}
    wanted = clafusion.merge(MODELS["base"], own, weights=[3, 1]).model.state_dict()
    found = load_state(folder / "results/both.safetensors")
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
    data = {
        name: load_samples(folder / f"{file}.npy") for name, file in zip(own, "ab", strict=True)
    }
    data["code"] = load_samples(folder / "b.npy", limit=60, seed=0)
    tuned = clafusion.merge(
        MODELS["base"], own, data, method="sensitivity", calibration="repair"
    ).model.state_dict()
    found = load_state(folder / "results/tuned.safetensors")
    assert all(torch.equal(found[name], one) for name, one in tuned.items())
    stitched = clafusion.load(folder / "results/stitched.pt2")
    inputs = torch.from_numpy(np.load(folder / "data.npy"))
    again = clafusion.reassemble(
        {name: MODELS[name] for name in ("base", "other")}, inputs, blocks=2, candidates=2
    )
    assert torch.allclose(stitched(inputs), again.model(inputs), atol=1e-6)
    assert [one["assessment"] is None for one in lines(folder)] == [True, False, False]
    page = (folder / "results/report.html").read_text()
    assert "<h1>2 merges and 1 reassembly of 4 models</h1>" in page
    assert page.count("<td>done</td>") == 3


def test_what_is_done_is_kept_and_what_is_stale_is_done_again(folder, capsys):
    path = manifest(folder)
    assert main(["fuse-pairs", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pairs"] == 0
    assert facts["report"] == str(folder / "results/report.html")
    assert [one["resumed"] for one in facts["tasks"]] == [False] * 3
    save_model(changed(9), folder / "code.safetensors")
    (folder / "results/stitched.pt2").write_bytes(b"cut short")
    merges = {**MANIFEST["merges"]}
    merges["both"] = {**merges["both"], "models": ["maths"], "weights": [1]}
    assert main(["fuse-pairs", manifest(folder, merges=merges), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["resumed"] for one in facts["tasks"]] == [False] * 3
    (file,) = folder.glob("results/both.*.safetensors")  # of other models: the first one is kept
    assert len(lines(folder)) == 4
    assert main(["fuse-pairs", manifest(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["resumed"] for one in facts["tasks"]] == [False, True, True]
    assert file.exists()


def test_lists_of_settings_are_results_each(folder, capsys):
    both = {**MANIFEST["merges"]["both"], "settings": {"method": ["average", "ties"]}}
    path = manifest(folder, merges={"both": both}, reassemblies=None, pairs=[["base", "stranger"]])
    assert main(["fuse-pairs", path, "--csv=table.csv"]) == 0
    shown = capsys.readouterr().out
    assert "1, 0 failed" in shown
    for method in ("average", "ties"):
        assert f"both  merge  method {method}" in shown
    assert len(list(folder.glob("results/both*.safetensors"))) == 2
    page = (folder / "results/report.html").read_text()
    assert "<h1>1 pair, 2 merges of 4 models</h1>" in page
    assert page.count(">method average</td>") == 1
    assert main(["fuse-pairs", path]) == 0
    assert capsys.readouterr().out.count("done before") == 2


def test_of_several_settings_one_that_cannot_be_done_is_told(folder, capsys):
    both = {**MANIFEST["merges"]["both"], "settings": {"furthest": [1e-6, 0.5]}}
    assert main(["check", manifest(folder, merges={"both": both}, reassemblies=None)]) == 1
    assert "can be done  0 of 1 merges" in capsys.readouterr().out


def test_what_fails_leaves_the_others(folder, capsys):
    merges = {
        "bad": {"base": "base", "models": ["stranger"], "data": None},
        **MANIFEST["merges"],
    }
    again = {"many": {"settings": {"blocks": 9}}, **MANIFEST["reassemblies"]}
    path = manifest(folder, merges=merges, reassemblies=again)
    assert main(["check", path]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "can be done  3 of 5 merges and reassemblies"
    assert shown[1].startswith("cannot       merge bad: models['stranger'] does not come from")
    assert "9 blocks need 8" in shown[2]
    assert main(["check", path, "--json"]) == 1
    reasons = [one["reason"] for one in json.loads(capsys.readouterr().out)["tasks"]]
    assert [one is None for one in reasons] == [False, True, True, False, True]
    assert main(["fuse-pairs", path]) == 1
    shown = capsys.readouterr().out
    assert "does not come from this base" in shown
    assert (folder / "results/both.safetensors").exists()
    assert (folder / "results/stitched.pt2").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"merges": {"x": {"models": ["maths"]}}}, "merges, x, base must name a model"),
        ({"merges": {"x": {"base": "b"}}}, "merges, x, base must name a model"),
        ({"merges": {"x": {"base": "base", "bas": 1}}}, "merges, x has an unknown entry 'bas'"),
        ({"merges": {"x": {"base": "base", "models": ["a"]}}}, "models names 'a', which models"),
        ({"merges": {"x": {"base": "base", "models": "maths"}}}, "must be a list of names"),
        ({"merges": {"x": {"base": "base", "models": []}}}, "no model besides its base"),
        ({"merges": {"x": {"base": "base", "models": ["base"]}}}, "among its models, too"),
        ({"merges": {"x": {"base": "base", "models": ["code", "code"]}}}, "names 'code' twice"),
        ({"merges": {"x": {"base": "base", "weights": [1]}}}, "one entry for each model, 4; got 1"),
        ({"merges": {"x": {"base": "base", "weights": 1}}}, "weights must be a list"),
        ({"merges": {"x": {"base": "base", "data": "no.npy"}}}, "no.npy' does not exist"),
        (
            {"merges": {"x": {"base": "base", "data": {"maths": "a.npy"}}}},
            "data must have an entry for each model",
        ),
        (
            {"merges": {"x": {"base": "base", "data": {"file": "a.npy", "labels": "y"}}}},
            "labels is for pairs",
        ),
        ({"merges": {"x": {"base": "base", "settings": {"blocks": 3}}}}, "blocks"),
        ({"merges": {"x": {"base": "base", "settings": ["ties"]}}}, "must be a mapping"),
        ({"merges": {"x": {"base": "base", "memory_limit": "much"}}}, "memory_limit"),
        (
            {
                "merges": {
                    "x": {"base": "base", "data": None, "settings": {"calibration": "repair"}}
                }
            },
            "calibration='repair' needs data",
        ),
        (
            {"merges": {"x": {"base": "base", "settings": {"method": "sensitivity"}}}},
            "needs data of each model's own task",
        ),
        ({"merges": {"../x": {"base": "base"}}}, "the name '../x' is not possible"),
        ({"merges": {".x": {"base": "base"}}}, "the name '.x' is not possible"),
        ({"merges": {"profiles": {"base": "base"}}}, "the name 'profiles' is not possible"),
        ({"merges": {"stitched": {"base": "base"}}}, "'stitched' is the name of a merge, too"),
        ({"merges": ["x"]}, "merges must map names"),
        ({"merges": {"x": None}}, "merges, x must be a mapping"),
        ({"reassemblies": {"x": {"models": ["base"]}}}, "needs two models at least"),
        ({"reassemblies": {"x": {}}, "data": None}, "the reassembly 'x' needs data"),
        ({"reassemblies": {"x": {"weights": [1, 1]}}}, "unknown entry 'weights'"),
        ({"settings": {"calibration": "repair"}}, "settings are those of pairs"),
        ({"weights": [1, 2]}, "weights are those of pairs"),
        ({"pairs": "all", "data": None, "reassemblies": None}, "data must name a file of inputs"),
    ],
)
def test_bad_entries_are_told_before_anything_runs(folder, capsys, changes, told):
    changes = {"merges": None, "reassemblies": MANIFEST["reassemblies"]} | changes
    assert main(["fuse-pairs", manifest(folder, **changes)]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not (folder / "results").exists()


def test_flags_of_pairs_are_refused_without_pairs(folder, capsys):
    for flag in ("--csv=a.csv", "--labels=y", "--chosen=base,other"):
        assert main(["fuse-pairs", manifest(folder), flag]) == 2
        assert "is for pairs" in capsys.readouterr().err


def test_a_result_replaces_no_model(folder, capsys):
    merges = {"code": MANIFEST["merges"]["both"]}
    assert main(["fuse-pairs", manifest(folder, merges=merges, reassemblies=None, out=".")]) == 1
    assert "would be written over model 'code'" in capsys.readouterr().out


def test_merged_directories_are_directories(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from tests.support.hugging_face import directory, network, tokenizer

    monkeypatch.chdir(tmp_path)
    base = network("Llama", 1)
    for seed, name in enumerate(("base", "maths", "code")):
        with torch.no_grad():
            base.lm_head.weight.add_(0.01 * seed)
        directory(tmp_path / name, base, tokenizer())
    facts = {
        "models": {"b": "base", "m": "maths", "c": "code"},
        "merges": {"both": {"base": "b", "settings": {"method": "average"}, "memory_limit": "4GB"}},
        "out": "results",
    }
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(facts))
    assert main(["check", "zoo.yaml"]) == 0, capsys.readouterr()
    assert main(["fuse-pairs", "zoo.yaml"]) == 0, capsys.readouterr()
    models = [clafusion.load(name) for name in ("base", "maths", "code")]
    wanted = clafusion.merge(models[0], models[1:], method="average").model.state_dict()
    found = clafusion.load("results/both").state_dict()
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
    capsys.readouterr()
    assert main(["fuse-pairs", "zoo.yaml"]) == 0
    assert "done before" in capsys.readouterr().out
    (tmp_path / "results/both/config.json").unlink()
    assert main(["fuse-pairs", "zoo.yaml"]) == 0, capsys.readouterr()
    assert (tmp_path / "results/both/config.json").is_file()
