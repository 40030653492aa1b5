"""The README is short, its example prints what it says, its numbers are the measured ones."""

import json
import re
from pathlib import Path

import pytest

from tests.support.hugging_face import directory, network, tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def results(name):
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


def percent(values):
    values = values if isinstance(values, list) else [values]
    return f"{100 * sum(values) / len(values):.2f} %"


def numbers(text):
    return {name: float(x) for name, x in re.findall(r"^(\w+) +([\d.]+)%$", text, re.MULTILINE)}


def test_the_example_prints_about_what_it_says(capsys):
    code, _ = EXAMPLES
    exec(compile(code, "README example", "exec"), {"__name__": "example"})
    printed = numbers(capsys.readouterr().out)
    said = numbers(README.partition("It prints:")[2].partition("## ")[0])
    assert list(printed) == list(said)
    assert printed == pytest.approx(said, abs=5.0)  # training differs a little between machines
    assert printed["fused"] > printed["mean"] + 20


def test_the_example_of_hugging_face_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name, layers, seed in (("gpt2-12", 3, 0), ("gpt2-6", 2, 1)):
        directory(tmp_path / name, network("GPT-2", layers, seed), tokenizer())
    _, code = EXAMPLES
    found = {"__name__": "example"}
    exec(compile(code, "README example", "exec"), found)
    assert isinstance(found["fused"], transformers.GPT2LMHeadModel)
    assert found["fused"].config.n_layer == 3


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_the_numbers_are_those_of_the_benchmarks():
    pair = results("cifar_pair")
    half = pair["weights"].index(0.5)
    told = [
        *(pair["parents"][name] for name in ("ResNet-20", "ResNet-32", "ensemble")),
        *(
            pair["curves"][name][half]
            for name in ("naive average", "matched, REPAIR", "matched, least squares")
        ),
        *(
            results("vits")["accuracies"]["four and four"][name]
            for name in ("three layers", "two layers", "least squares")
        ),
        results("three_models")["accuracies"]["many_to_one, least_squares, weights (2, 2, 1)"],
    ]
    for value in told:
        assert percent(value) in README, value
    clock = results("many")["throughput"]["clock"]
    assert f"{clock['fuse_pairs_seconds']:.0f} s on two cores" in README
    assert f"{clock['beside_fuse']:.1f} times as fast as 45 single calls" in README
    bare = clock["torch_export_seconds"] + clock["fused_networks_forward_seconds"]
    assert f"{clock['fuse_pairs_seconds'] / bare:.1f} times as long as to export them" in README


def test_the_two_commands_are_there():
    dev = (ROOT / "dev").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"./dev {command}" in README
        assert f"  {command})" in dev
