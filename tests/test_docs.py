"""The documentation builds without a warning, and its examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from clafusion.cli.app import app
from clafusion.cli.manifest import _DATA_KEYS, _KEYS

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for i, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("code", EXAMPLES)
@pytest.mark.filterwarnings("default")  # of Dask and its event loop
def test_the_example_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "distributed" in code:
        pytest.importorskip("distributed")
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_every_option_of_the_command_line_is_told():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        assert f"clafusion {name}" in page
        for option in (one for given in command.params for one in given.opts):
            assert f"`{option}`" in page or not option.startswith("--"), option


def test_every_entry_of_a_manifest_is_told():
    page = (ROOT / "docs" / "many-pairs.md").read_text(encoding="utf-8")
    for entry in (*_KEYS, *_DATA_KEYS):
        assert f"`{entry}`" in page or f"`{{{entry}: " in page, entry


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--calibration point-dir",
        str(tmp_path),
    ]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("fuse_many", "LayerAlignment", "sinkhorn", "GraphVerificationError"):
        assert name in reference
