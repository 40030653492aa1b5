"""Every example runs, draws its picture, and what it prints is what its text says."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
EXTENDING = "own_parts"  # adds options, which the other tests' process must not get
ROW = re.compile(r"^(.+?) +(\d+\.\d) %", re.MULTILINE)


def permuted_copy(rows):
    assert rows["matched"] == rows["network"] == rows["shuffled copy"]
    assert rows["averaged as they are"] < rows["network"] - 10


def two_depths(rows):
    assert rows["matched, least squares"] > rows["shallow parent"] - 5
    assert rows["averaged as they are"] + 30 < rows["matched"] < rows["matched, least squares"]


def layer_alignment(rows):
    assert rows == {}


def three_parents(rows):
    parents = [value for name, value in rows.items() if name.startswith("mostly")]
    assert len(parents) == 3
    assert rows["fused"] > max(parents) + 5
    assert rows["fused"] > rows["averaged as they are"] + 40


def compress(rows):
    assert rows["layers left out, least squares"] > rows["shallow parent"] + 2
    assert rows["layers left out, least squares"] > rows["layers left out"] + 15


def widths(rows):
    parents = [value for name, value in rows.items() if name.endswith("parent")]
    fused = [value for name, value in rows.items() if "least squares" in name]
    assert len(fused) == 3
    assert min(fused) > max(parents) - 5


def own_parts(rows):
    for cost in ("correlation", "disagreement"):
        assert rows[f"output_moments, {cost}"] > rows[f"none, {cost}"] + 3


def attention_heads(rows):
    assert rows["matched, least squares"] > rows["two layers, two heads"] - 5
    assert rows["averaged as they are"] + 10 < rows["matched, least squares"]


CLAIMS = [
    permuted_copy,
    two_depths,
    layer_alignment,
    three_parents,
    compress,
    widths,
    own_parts,
    attention_heads,
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_example(claim, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "made" / f"{claim.__name__}.png"
    script = EXAMPLES / f"{claim.__name__}.py"
    options = ["--quick", "--out", str(picture)]
    if claim.__name__ == EXTENDING:
        done = subprocess.run(
            [sys.executable, script, *options],
            env={**os.environ, "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", [str(script), *options])
        plt.switch_backend("Agg")
        runpy.run_path(str(script), run_name="__main__")
        plt.close("all")
        printed = capsys.readouterr().out
    claim({name: float(value) for name, value in ROW.findall(printed)})
    if claim is layer_alignment:
        assert "9 of 14 layers have a partner: all 9 of the other" in printed
    drawn = imread(picture)
    assert min(drawn.shape[:2]) > 300
    assert drawn[..., :3].std() > 0.05


def test_no_example_is_left_out():
    assert {claim.__name__ for claim in CLAIMS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_text(name):
    """A title and two sentences, of which the page of all examples is made."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    title, empty, *body = text.splitlines()
    assert title.endswith(".")
    assert empty == ""
    assert len(re.findall(r"\.(?:\s|$)", "\n".join(body))) == 2
