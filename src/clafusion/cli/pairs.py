"""``clafusion fuse-pairs``: many pairs of models, as a manifest says."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from clafusion.cli.inputs import AsJson, Device, read_data
from clafusion.cli.manifest import Manifest, read_manifest
from clafusion.cli.options import warnings_by_entries
from clafusion.cli.show import pair_progress, print_json, print_line, typed_command
from clafusion.errors import InputError
from clafusion.execution.call import usable_device
from clafusion.interop.huggingface import ModelDirectory
from clafusion.interop.vocabulary import check_alike
from clafusion.memory import bytes_of
from clafusion.reports.tables import pairs_summary, total_seconds
from clafusion.weights.atomic import check_output

if TYPE_CHECKING:
    from clafusion.batch.results import PairResult

__all__ = ["pairs_command"]


def pairs_command(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="YAML or JSON: models, factory, pairs, data, weights, settings, out. Files in it "
            "are relative to it."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the results; default: the manifest's.", metavar="DIR"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many processes work on it.")] = 1,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What models at hand may take in each process, for example 2GB or 500MB.",
            metavar="SIZE",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep pairs that are done already.")
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the HTML report; default: report.html beside the results.",
            metavar="FILE",
        ),
    ] = None,
    chosen: Annotated[
        str | None,
        typer.Option(
            help="A pair that the report shows in detail, beside the best and the worst.",
            metavar="FIRST,SECOND",
        ),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fuse many pairs of models. If some fail, the others are done, and the exit code is 1."""
    given = read_manifest(manifest)
    folder = out or given.out
    if folder is None:
        raise InputError(f"give --out DIR, or an entry out in {str(manifest)!r}")
    limit = None if memory_limit is None else bytes_of(memory_limit, "--memory-limit")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1; got {jobs}")
    usable_device(device, "--device")
    page = _page(report, folder)
    pair = None if chosen is None else _chosen(chosen, given)
    results = _fused(given, folder, page, jobs, limit, resume, device)
    if not as_json:
        print(pairs_summary(results), flush=True)
    _write_report(results, page, pair, _run_facts(given))
    if as_json:
        print_json({"out": str(folder), "report": str(page), **_facts(results)})
    else:
        print_line("written", folder)
        print_line("report", page)
    if any(one.error is not None for one in results):
        raise typer.Exit(1)


def _page(report: Path | None, folder: Path) -> Path:
    page = report or folder / "report.html"
    if page.resolve().parent != folder.resolve():  # which need not be there yet
        check_output(page, (".html",), "--report")
    return page


def _facts(results: Sequence[PairResult]) -> dict[str, Any]:
    return {
        "pairs": len(results),
        "failed": sum(one.error is not None for one in results),
        "resumed": sum(one.resumed for one in results),
        "seconds": total_seconds(results),
    }


def _fused(
    given: Manifest,
    folder: Path,
    page: Path,
    jobs: int,
    memory_limit: int | None,
    resume: bool,
    device: str,
) -> list[PairResult]:
    from clafusion.batch.run import fuse_pairs

    samples = _data(given)
    with pair_progress() as report, warnings_by_entries():
        run = fuse_pairs(
            given.models,
            samples,
            given.pairs,
            given.weights,
            given.config,
            executor=None if jobs == 1 else jobs,
            out_dir=folder,
            resume=resume,
            memory_limit=memory_limit,
            device=None if device == "cpu" else device,
            progress=report,
        )
        check_output(page, (".html",), "--report")  # now that the folder is there
        return list(run)


def _data(given: Manifest) -> Tensor | list[dict[str, Tensor]]:
    """Read the data; refuse Hugging Face directories of other tokens or labels."""
    folders = {
        name: Path(one.path)
        for name, one in given.models.items()
        if isinstance(one, ModelDirectory)
    }
    check_alike(given.models)
    known = ("limit", "text_column", "max_length")
    return read_data(
        given.data["file"],
        next(iter(folders.values()), None),
        {name: given.data.get(name) for name in ("key", "shape", "scale", "mean", "std")},
        **{name: given.data[name] for name in known if name in given.data},
        called=lambda name: f"data, {name}",
    )


def _run_facts(given: Manifest) -> dict[str, str]:
    """Return what the report says of the run."""
    from clafusion.weights.state_files import file_digest

    file = Path(given.data["file"])
    others = [f"{name} {value}" for name, value in given.data.items() if name != "file"]
    digest = [f"SHA-256 {file_digest(file)}"] if file.is_file() else []
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "command": typed_command() or "",
        "data": ", ".join([str(file), *others, *digest]),
    }


def _write_report(
    results: Sequence[PairResult],
    page: Path,
    chosen: tuple[str, str] | None,
    run: Mapping[str, str],
) -> None:
    from clafusion.reports.page import write_report

    if any((one.first, one.second) == chosen and one.error is not None for one in results):
        assert chosen is not None
        print(
            f"clafusion: warning: --chosen {','.join(chosen)} was not fused, so the report shows "
            "other pairs in detail",
            file=sys.stderr,
        )
        chosen = None
    write_report(results, page, chosen=chosen, run=run)


def _chosen(text: str, manifest: Manifest) -> tuple[str, str]:
    first, _, second = (part.strip() for part in text.partition(","))
    pairs = manifest.pairs
    if isinstance(pairs, str):
        pairs = list(itertools.combinations(manifest.models, 2))
    if (first, second) in pairs:
        return first, second
    hint = f"; it has {second},{first}" if (second, first) in pairs else ""
    raise InputError(f"--chosen {text!r} is none of the manifest's pairs FIRST,SECOND{hint}")
