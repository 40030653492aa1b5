"""The tutorials run and print what they say; figures on pages are the measured ones."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
NEEDS = {"mnist": (), "cifar": (), "hugging-face": ("transformers",), "zoo": ("sklearn",)}
DATA = {
    "mnist": "mnist.npz",
    "cifar": "checkpoints/resnet20-12fca82f.th",
    "hugging-face": "sst2_train.tsv.xz",
}


@pytest.fixture(scope="module")
def run_page():
    spec = importlib.util.spec_from_file_location("run_page", ROOT / "docs" / "run_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_page"] = module  # a dataclass asks for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_page"]


def results(name):
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the libraries that a tutorial uses
@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.nightly) if one == "cifar" else one for one in NEEDS],
)
def test_the_tutorial_prints_what_it_says(name, run_page, tmp_path):
    for needed in NEEDS[name]:
        pytest.importorskip(needed)
    if name in DATA and not (Path(os.environ.get("CLAFUSION_DATA", ".")) / DATA[name]).is_file():
        pytest.skip(f"CLAFUSION_DATA names no folder with {DATA[name]}")
    blocks = run_page.blocks((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"))
    assert any(block.said for block in blocks)
    printed = run_page.outputs(blocks, tmp_path)
    for block, text in zip(blocks, printed, strict=True):
        assert not run_page.differences(block, text), block.code


def test_outputs_are_compared_by_words_and_about_by_numbers(run_page):
    def differences(said, printed, behind="print()"):
        page = f"```python\n{behind}\n```\n\n{said}"
        (block,) = run_page.blocks(page)
        return run_page.differences(block, printed)

    def text(said):
        return f"```text\n{said}\n```\n"

    assert not differences(
        text("fused 91.9 %, cost 0.50, took 3 s"), "fused 93.0 %, cost 0.55, took 9 s"
    )
    assert differences(text("fused 91.9 %"), "fused 80.0 %")
    assert differences(text("5 layers"), "6 layers")
    assert differences(text("cost 0.50"), "cost 0.80")
    assert differences(text("a parent"), "no parent")
    assert differences(text("one"), "one\ntwo")
    assert differences("", "something")
    assert not differences("<!-- may differ -->\n" + text("a parent"), "no parent")
    assert differences("<!-- may differ -->\n" + text("one"), "one\ntwo")


def test_a_block_may_be_a_file_a_command_or_left_out(run_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = """
```python title="two_of_a_page.py"
TWO = 2
```

```python
from two_of_a_page import TWO
print(TWO)
```

<!-- not run -->
```sh
rm everything
```

```sh
clafusion doctor --json
```
"""
    blocks = run_page.blocks(page)
    assert [block.language for block in blocks] == ["python", "python", "sh"]
    printed = run_page.outputs(blocks, tmp_path)
    assert printed[:2] == ["", "2"]
    assert "clafusion" in json.loads(printed[2])
    with pytest.raises(ValueError, match="only commands of clafusion"):
        run_page.outputs(run_page.blocks("```sh\nls\n```\n"), tmp_path)
    refused = "```sh\nclafusion check none.yaml{}\n```\n"
    assert run_page.outputs(run_page.blocks(refused.format("  # exit code 2")), tmp_path) == [""]
    with pytest.raises(RuntimeError, match="exit code 2"):
        run_page.outputs(run_page.blocks(refused.format("")), tmp_path)


def test_the_first_page_has_the_measured_numbers():
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pair = results("cifar_pair")
    half = pair["weights"].index(0.5)
    curves = ("naive average", "matched, REPAIR", "matched, least squares")
    told = [
        *(pair["parents"][name] for name in ("ResNet-20", "ResNet-32", "ensemble")),
        *(pair["curves"][name][half] for name in curves),
    ]
    for value in told:
        assert f"{100 * value:.2f} %" in page


def test_the_settings_guide_has_the_measured_numbers():
    page = (ROOT / "docs/which-settings.md").read_text(encoding="utf-8")
    pair = results("cifar_pair")
    half = pair["weights"].index(0.5)
    ways = {
        "least_squares": "matched, least squares",
        "repair": "matched, REPAIR",
        "batchnorm": "matched, BatchNorm reset",
        "none": "matched",
    }
    for name, curve in ways.items():
        assert f'| `"{name}"` | {100 * pair["curves"][curve][half]:.2f} % |' in page


def test_the_paper_s_table_is_that_of_the_file():
    page = (TUTORIALS / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`(?:, by `(\w+)`)? \| (.*) \|$", page, re.MULTILINE)
    table = results("mlp_ablation_quick")["table"]
    assert 3 * len(rows) + 2 == len(table)

    def cell(row):
        return f"{100 * table[row]['mean']:.1f} ± {100 * table[row]['stdev']:.1f} %"

    for mode, cost, cells in rows:
        ways = [
            f"{mode}, {cost or 'no cost'}, {one}" for one in ("none", "repair", "least_squares")
        ]
        assert cells == " | ".join(map(cell, ways))
    assert cell("deep parent") in page
    assert cell("shallow parent") in page


def test_every_figure_of_a_benchmark_is_shown():
    page = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks/results").glob("*.png"):
        assert f"](../benchmarks/results/{path.name})" in page


def test_the_citation_is_that_of_the_package():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{cited["version"]}"' in pyproject
    assert f'license = "{cited["license"]}"' in pyproject
    page = (ROOT / "docs/cite.md").read_text(encoding="utf-8")
    assert f"version = {{{cited['version']}}}" in page
    for paper in cited["references"]:
        assert paper["url"] in page
        assert paper["title"] in page


def test_the_presets_have_the_measured_numbers():
    page = (ROOT / "docs/which-settings.md").read_text(encoding="utf-8")
    pairs = results("presets")["pairs"]
    for pair in pairs.values():
        assert f"{100 * max(pair['parents']):.2f} %" in page
        for row in pair["presets"].values():
            told = f"{100 * row['accuracy']:.2f} % | {row['times the defaults']:.2f} x |"
            assert told in page
