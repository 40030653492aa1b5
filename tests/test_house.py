"""The rules of the house that no linter knows."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import clafusion

SOURCE = Path(clafusion.__file__).parent
MODULES = sorted(
    ".".join(("clafusion", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in SOURCE.rglob("*.py")
)
LEAVES = ("matplotlib", "typer", "click", "rich", "yaml", "sklearn", "ot", "transformers")


def imports_of(name):
    """Yield what a module takes from other modules of clafusion: (module, name)."""
    path = Path(importlib.util.find_spec(name).origin)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clafusion"):
            for alias in node.names:
                yield node.module, alias.name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_only_what_others_list(name):
    for module, taken in imports_of(name):
        if module == "clafusion" and taken in ("_native", "_core", "_cuda"):
            continue
        assert not taken.startswith("_"), f"{name} imports {taken} of {module}, which is private"
        found = importlib.import_module(module)
        if hasattr(found, "__all__"):
            is_module = f"{module}.{taken}" in MODULES
            assert taken in found.__all__ or is_module, f"{name}: {module} does not list {taken}"
        else:
            assert module == "clafusion._native", f"{module} has no __all__"


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_is_there_once_and_explained(name):
    module = importlib.import_module(name)
    listed = list(getattr(module, "__all__", []))
    assert len(set(listed)) == len(listed)
    for one in listed:
        assert hasattr(module, one), f"{name} lists {one}, which it does not have"
    assert module.__doc__, f"{name} does not say what it is for"


def test_the_names_that_are_imported_later_are_those_that_type_checkers_see():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == clafusion._MODULE_OF
    assert {*seen, "__version__"} == set(clafusion.__all__)
    assert clafusion.profile is importlib.import_module("clafusion.fusion").profile
    assert clafusion.reports is sys.modules["clafusion.reports"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = clafusion.nothing


def test_importing_clafusion_loads_no_leaf():
    code = f"import sys, clafusion; print([one for one in {LEAVES!r} if one in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.strip() == "[]"
