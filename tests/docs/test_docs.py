"""The documentation builds without a warning, its examples run, and nothing is left out."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import clafusion
from clafusion.calibration import methods
from clafusion.config import CHANNEL_COSTS, Calibration, FusionConfig, Target, options_of
from clafusion.matching import activation_costs
from clafusion.targets import target
from clafusion.tracing.labels import interpreter

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
EXAMPLES = {
    page.name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for page in PAGES
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registries():
    """Take back what an example registers."""
    known = [
        CHANNEL_COSTS._values,
        Calibration._variants,
        Target._variants,
        target._METHODS,
        activation_costs._MEASURES,
        methods._METHODS,
        interpreter.RULES,
    ]
    before = [dict(one) for one in known]
    yield
    for one, entries in zip(known, before, strict=True):
        one.clear()
        one.update(entries)


@pytest.mark.parametrize("page", [page for page, codes in EXAMPLES.items() if codes])
@pytest.mark.filterwarnings("default")  # of Dask and its event loop
@pytest.mark.usefixtures("registries")
def test_the_examples_of_a_page_run_one_after_another(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for code in EXAMPLES[page]:
        for library in ("distributed", "torch_geometric"):
            if library in code:
                pytest.importorskip(library)
        exec(compile(code, "example", "exec"), names)
        assert capsys.readouterr().out


# --- nothing is left out ------------------------------------------------------------------------


def test_the_reference_has_every_public_name_once():
    pages = read("docs/reference.md") + read("docs/reference-parts.md")
    found = re.findall(r"^::: clafusion\.(\w+)$", pages, re.MULTILINE)
    modules = {"presets", "settings", "shared_trunk"}  # of which all is shown
    assert sorted(set(found) - modules) == sorted(clafusion.__all__)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("page", ["docs/reference.md", "docs/reference-parts.md"])
def test_every_group_of_the_reference_says_what_to_take(page):
    groups = re.split(r"^## ", read(page), flags=re.MULTILINE)[1:]
    assert groups
    for group in groups:
        title, text = group.split("\n", 1)
        assert text.lstrip().startswith("If you are not sure") or "signatures" in title, title


def test_the_table_of_options_has_every_option(hooks):
    page = read("docs/options.md")
    assert hooks.on_page_markdown("nothing") == "nothing"
    page = hooks.on_page_markdown(page)
    for option in options_of(FusionConfig):
        assert f"| `{option.path}`<br>`{option.flag}`" in page
        for value in option.choices:
            assert f"`{value}`: " in page


def test_every_option_of_the_command_line_is_told(hooks):
    import typer

    from clafusion.cli.app import make_app

    page = read("docs/command-line.md")
    told = page + hooks.options() + hooks.merge_options() + hooks.reassembly_options()
    for name, command in typer.main.get_command(make_app()).commands.items():
        assert f"clafusion {name}" in page
        for option in (one for given in command.params for one in given.opts):
            assert f"`{option}`" in told or not option.startswith("--"), option


def test_every_entry_of_a_manifest_is_told():
    from clafusion.cli.entries import DATA_KEYS
    from clafusion.cli.manifest import KEYS

    page = read("docs/many-pairs.md")
    for entry in (*KEYS, *DATA_KEYS):
        assert f"`{entry}`" in page or f"`{{{entry}: " in page, entry


def test_the_packages_are_told_in_the_order_of_the_import_contract():
    contract = re.search(r"^layers = \[(.*?)^\]", read("pyproject.toml"), re.DOTALL | re.MULTILINE)
    lines = re.findall(r'"(.*?)"', contract[1])
    known = [name for line in reversed(lines) for name in re.findall(r"clafusion\.(\w+)", line)]
    table = read("docs/architecture.md").partition("| Package |")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert [name for cell in first for name in re.findall(r"`(\w+)`", cell)] == known


def test_all_pages_count_the_same_architectures():
    suite = re.search(r"(\d+) architectures are verified, (\d+) are", read("docs/architectures.md"))
    verified, refused = map(int, suite.groups())
    assert f"silently wrong | {verified}, {refused}, 0 |" in read("docs/architecture.md")
    told = " ".join(read("README.md").split())
    assert f"{refused} of the {verified + refused} architectures" in told


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_root_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert link.startswith("http") or (ROOT / link).is_file(), link


# --- pages that are made ------------------------------------------------------------------------


def test_the_gallery_shows_title_text_picture_and_code(hooks, tmp_path):
    examples, pictures = tmp_path / "examples", tmp_path / "gallery"
    for folder in (examples, pictures):
        folder.mkdir()
    assert "none" in hooks.gallery(examples, pictures)
    (examples / "two.py").write_text('"""Fuse two.\n\nThat is all.\n"""\n\nprint(2)\n')
    (examples / "_shared.py").write_text('"""Helpers."""\n')
    (pictures / "two.png").touch()
    page = hooks.gallery(examples, pictures)
    assert "## Fuse two\n\n`python examples/two.py --out picture.png`\n\nThat is all." in page
    assert "![Fuse two](gallery/two.png)\n\n~~~~python\nprint(2)\n~~~~" in page
    assert "Helpers" not in page


def test_flags_are_not_broken_at_their_hyphens(hooks):
    made = hooks.on_page_content("<p><code>--quiet</code> <code>-h</code> <code>a - b</code></p>")
    assert made.count('<code class="flag">') == 2
    assert "<code>a - b</code>" in made


def test_figures_in_tables_stay_on_one_line(hooks):
    cells = "<td>92.3 % ± 0.9</td><td style='x'>81.8 ± 5.3 %</td><td>9 of 10 %</td>"
    made = hooks.on_page_content(cells)
    assert "<td>92.3&nbsp;%&nbsp;±&nbsp;0.9</td>" in made
    assert ">81.8&nbsp;±&nbsp;5.3&nbsp;%<" in made
    assert "<td>9 of 10 %</td>" in made


def test_pages_of_the_root_link_to_the_other_pages(hooks):
    page = hooks.page_of_root("CONTRIBUTING.md")
    assert "](architecture.md)" in page
    assert "](changelog.md)" in page
    assert "](docs/" not in page


# --- the recipe of a kernel ---------------------------------------------------------------------

FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-pthread"]
MODULE = """
#include <pybind11/pybind11.h>
namespace clafusion { void register_energy(pybind11::module_& module); }
PYBIND11_MODULE(recipe, module) { clafusion::register_energy(module); }
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Write the recipe's files to a folder, as their first lines say."""
    folder = tmp_path_factory.mktemp("recipe")
    blocks = re.findall(r"```(?:cpp|py)\n(?://|#) (\S+)\n(.*?)```", read("CONTRIBUTING.md"), re.S)
    assert {Path(name).suffix for name, _ in blocks} == {".hpp", ".cpp", ".py"}
    for name, text in blocks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def compiled(recipe, output, sources, *flags):
    includes = [f"-I{recipe / 'csrc'}", f"-I{ROOT / 'csrc'}"]
    command = [os.environ.get("CXX", "c++"), *FLAGS, *includes, *flags, "-shared", "-o", output]
    subprocess.run([*command, *sources], check=True)
    return output


@pytest.mark.slow
def test_the_kernel_of_the_recipe_compiles_without_a_warning(recipe):
    compiled(recipe, recipe / "kernel.so", [recipe / "csrc/energy/energy.cpp"])


@pytest.mark.slow
def test_the_recipe_of_a_kernel_runs(recipe, monkeypatch):
    pybind11 = pytest.importorskip("pybind11")
    import sysconfig

    (recipe / "module.cpp").write_text(MODULE, encoding="utf-8")
    sources = [
        recipe / "module.cpp",
        *recipe.glob("csrc/*/energy.cpp"),
        ROOT / "csrc/common/parallel.cpp",
    ]
    # pybind11's own headers come as the system's: their warnings are not ours.
    headers = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*(f"-isystem{one}" for one in headers), "-fvisibility=hidden"]
    compiled(recipe, recipe / f"recipe{sysconfig.get_config_var('EXT_SUFFIX')}", sources, *flags)
    monkeypatch.syspath_prepend(str(recipe))
    names = {"_core": importlib.import_module("recipe"), "np": np}
    names |= {"NDArray": np.ndarray, "InputError": clafusion.InputError}
    code = "from __future__ import annotations\n" + read(recipe / "src/clafusion/_native/energy.py")
    exec(code, names)
    x = np.random.default_rng(0).normal(size=(131, 17)).astype(np.float32)
    np.testing.assert_allclose(names["row_energies"](x), (x.astype(float) ** 2).sum(1))
    with pytest.raises(clafusion.InputError, match="must be a matrix"):
        names["row_energies"](x[0])
