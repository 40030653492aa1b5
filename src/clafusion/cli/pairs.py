"""``clafusion fuse-pairs``: many pairs of models, as a manifest says."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clafusion.cli.options import warnings_by_entries
from clafusion.cli.parameters import AsJson, Device, Labels
from clafusion.cli.show import pair_progress, print_json, print_line, print_text, typed_command
from clafusion.errors import InputError

if TYPE_CHECKING:
    from clafusion.batch.named_tasks import NamedResult, TaskStore
    from clafusion.batch.results import PairResult
    from clafusion.cli.manifest import Manifest

__all__ = ["pairs_command"]

_PATIENCE = 20  # seconds that a scheduler has to answer


def pairs_command(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="YAML or JSON: models, factory, pairs, merges, reassemblies, data, weights, "
            "settings, out. Files in it are relative to it."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the results; default: the manifest's.", metavar="DIR"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many processes work on it.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Let the workers of this Dask scheduler work on it, for example "
            "tcp://10.0.0.1:8786.",
            metavar="ADDRESS",
        ),
    ] = None,
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
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where profiles and proofs are kept between runs; default: profiles in --out.",
            metavar="DIR",
        ),
    ] = None,
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
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write a row for each pair (.csv).", metavar="FILE")
    ] = None,
    labels: Labels = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fuse many pairs of models, and do the merges and reassemblies that the manifest lists.

    If some fail, the others are done, and the exit code is 1.
    """
    from clafusion.batch.named_tasks import TaskStore
    from clafusion.batch.results import pairs_table
    from clafusion.cli.manifest import read_manifest
    from clafusion.execution.call import usable_device
    from clafusion.memory import bytes_of
    from clafusion.reports.tables import pairs_summary, tasks_summary
    from clafusion.weights.atomic import check_output

    given = read_manifest(manifest)
    of_pairs = {"--csv": csv, "--labels": labels, "--chosen": chosen}
    unused = next((flag for flag, value in of_pairs.items() if value is not None), None)
    if not given.pairs and unused is not None:
        raise InputError(f"{unused} is for pairs, and {str(manifest)!r} has none")
    if labels is not None:
        given = replace(given, data={**given.data, "labels": labels})
    folder = out or given.out
    if folder is None:
        raise InputError(f"give --out DIR, or an entry out in {str(manifest)!r}")
    limit = None if memory_limit is None else bytes_of(memory_limit, "--memory-limit")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1; got {jobs}")
    if dask is not None and jobs != 1:
        raise InputError("--jobs is for this machine, --dask for others: give one of them")
    if csv is not None:
        check_output(csv, (".csv",), "--csv")
    usable_device(device, "--device")
    page = _page(report, folder)
    pair = None if chosen is None else _chosen(chosen, given)
    _make(folder)
    check_output(page, (".html",), "--report")
    how = _How(folder, limit, resume, device, cache_dir)
    store = TaskStore(
        folder, given.models, device=None if device == "cpu" else device, resume=resume
    )
    results: list[PairResult] = []
    if given.pairs:
        with _executor(jobs, dask) as executor:
            results = _fused(given, how, executor)
    if csv is not None:
        pairs_table(results).to_csv(csv)
    if given.pairs and not as_json:
        print_text(pairs_summary(results))
    run = _run_facts(given)
    if results:
        _write_reports(results, page, pair, run)
    tasks = _done(given, store)
    if tasks:
        _write_reports(results, page, pair, run, tasks)
    shown_page = page if results or tasks else None
    if as_json:
        facts = {"out": str(folder), "report": shown_page and str(shown_page), **_facts(results)}
        if given.tasks:
            facts["tasks"] = [one.to_dict() for one in tasks]
        print_json(facts)
    else:
        if tasks:
            print_text(("\n" if given.pairs else "") + tasks_summary(tasks))
        print_line("written", folder)
        print_line("table", csv)
        print_line("report", shown_page)
    errors = [*(one.error for one in results), *(one.error for one in tasks)]
    if any(one is not None for one in errors):
        raise typer.Exit(1)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {str(folder)!r} cannot be made a directory: {error.strerror or error}"
        ) from error


def _page(report: Path | None, folder: Path) -> Path:
    from clafusion.weights.atomic import check_output

    page = report or folder / "report.html"
    if page.resolve().parent != folder.resolve():  # which need not be there yet
        check_output(page, (".html",), "--report")
    return page


def _facts(results: Sequence[PairResult]) -> dict[str, Any]:
    from clafusion.reports.tables import total_seconds

    return {
        "pairs": len(results),
        "failed": sum(one.error is not None for one in results),
        "resumed": sum(one.resumed for one in results),
        "seconds": total_seconds(results),
    }


@dataclass(frozen=True)
class _How:
    """Options of :func:`clafusion.fuse_pairs`, as typed."""

    folder: Path
    memory_limit: int | None
    resume: bool
    device: str
    cache_dir: Path | None


@contextmanager
def _executor(jobs: int, dask: str | None) -> Iterator[Executor | int | None]:
    """Yield what fuses the pairs: this process, several, or the workers of a Dask scheduler."""
    if dask is None:
        yield None if jobs == 1 else jobs
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError('--dask needs Dask: pip install "clafusion[dask]"') from error
    try:
        client = Client(dask, timeout=_PATIENCE)
    except (OSError, ValueError) as error:
        raise InputError(f"--dask {dask}: there is no scheduler: {error}") from error
    with client:
        yield client.get_executor(pure=False)


def _fused(given: Manifest, how: _How, executor: Executor | int | None) -> list[PairResult]:
    from clafusion.batch.run import fuse_pairs
    from clafusion.cli.inputs import labels_of
    from clafusion.cli.manifest_data import data_of_manifest, models_of_pairs

    samples = data_of_manifest(models_of_pairs(given), given.data)
    data = given.data
    labels = labels_of(data["file"], data.get("labels"), data.get("limit"))
    results: list[PairResult] = []
    for config in given.configs:
        with pair_progress() as report, warnings_by_entries():
            run = fuse_pairs(
                given.models,
                samples,
                given.pairs,
                given.weights,
                config,
                executor=executor,
                out_dir=how.folder,
                resume=how.resume,
                cache_dir=how.cache_dir,
                memory_limit=how.memory_limit,
                device=None if how.device == "cpu" else how.device,
                labels=labels,
                progress=report,
            )
            results += run
    return results


def _done(given: Manifest, store: TaskStore) -> list[NamedResult]:
    """Do the merges and reassemblies, one after another in this process."""
    from clafusion.cli.manifest_data import DataReader

    results: list[NamedResult] = []
    read = DataReader(given.models)
    with pair_progress("results") as report, warnings_by_entries():
        for i, task in enumerate(given.tasks):
            if report is not None:
                report(i, len(given.tasks))
            results.append(store.run(read.filled(task)))
    return results


def _write_reports(
    results: Sequence[PairResult],
    page: Path,
    chosen: tuple[str, str] | None,
    run: Mapping[str, str],
    tasks: Sequence[NamedResult] = (),
) -> None:
    """Write a page; of several settings one each, whose names have numbers.

    Merges and reassemblies stand in the first.
    """
    by_settings: dict[str, list[PairResult]] = {}
    for one in results:
        by_settings.setdefault(json.dumps(one.settings, sort_keys=True), []).append(one)
    for i, same in enumerate(by_settings.values() or ([],)):
        own = page if i == 0 else page.with_name(f"{page.stem}-{i + 1}{page.suffix}")
        _write_report(same, own, chosen, run, tasks if i == 0 else ())


def _run_facts(given: Manifest) -> dict[str, str]:
    """Return what the report says of the run."""
    from clafusion.weights.state_files import file_digest

    told = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "command": typed_command() or "",
    }
    if given.data:
        file = Path(given.data["file"])
        others = [f"{name} {value}" for name, value in given.data.items() if name != "file"]
        digest = [f"SHA-256 {file_digest(file)}"] if file.is_file() else []
        told["data"] = ", ".join([str(file), *others, *digest])
    return told


def _write_report(
    results: Sequence[PairResult],
    page: Path,
    chosen: tuple[str, str] | None,
    run: Mapping[str, str],
    tasks: Sequence[NamedResult],
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
    write_report(results, page, chosen=chosen, run=run, tasks=tasks)


def _chosen(text: str, manifest: Manifest) -> tuple[str, str]:
    first, _, second = (part.strip() for part in text.partition(","))
    pairs = manifest.pairs
    if isinstance(pairs, str):
        pairs = list(itertools.combinations(manifest.models, 2))
    if (first, second) in pairs:
        return first, second
    hint = f"; it has {second},{first}" if (second, first) in pairs else ""
    raise InputError(f"--chosen {text!r} is none of the manifest's pairs FIRST,SECOND{hint}")
