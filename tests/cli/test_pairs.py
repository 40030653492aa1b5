"""`clafusion fuse-pairs`: manifests good and bad, the table, the exit code and the report."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import clafusion
from clafusion import InputError, Matching, Merging, Profiling, Sinkhorn, Zip, fuse
from clafusion.cli.app import main
from clafusion.cli.manifest import read_manifest
from clafusion.memory import bytes_of
from clafusion.profiling.samples import load_samples
from clafusion.weights.checkpoints import load_state
from clafusion.weights.state_files import file_digest, save_model
from tests.support import networks
from tests.support.many_pairs import FACTORY, WIDTHS, modules

MANIFEST = """
factory: nets.py:mlp(12, 9, 5)
models:
  a: weights/a.safetensors
  b: {factory: "nets.py:mlp(12, 9, 8, 5)", weights: weights/b.safetensors}
  c: {factory: "nets.py:mlp(12, 7, 8, 6, 5)", weights: weights/c.safetensors}
  d: {factory: "nets.py:mlp(12, 9, 8, 7, 6, 5)", weights: weights/d.safetensors}
data: {file: data.npy, limit: 200}
weights: [3, 1]
settings:
  profiling: {alignment_samples: 100, matching_rows: 200}
  merging: {layer_weights: sensitivity}
  matching: {solver: {name: sinkhorn, epsilon: 1e-2}}
out: fused
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The manifest's directory, which is not the current one."""
    root = tmp_path / "project"
    (root / "weights").mkdir(parents=True)
    (root / "nets.py").write_text(FACTORY)
    for name, model in modules().items():
        save_model(model, root / "weights" / f"{name}.safetensors")
    np.save(root / "data.npy", np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32))
    (root / "pairs.yaml").write_text(MANIFEST)
    monkeypatch.chdir(tmp_path)
    return root


def run(folder, *more):
    return main(["fuse-pairs", str(folder / "pairs.yaml"), *more])


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, value) for name, value in attrs if name in ("src", "href", "srcset")]


def test_all_pairs_of_a_manifest(folder, capsys):
    assert run(folder) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "6, 0 failed, 0 taken over" in shown.out
    data = load_samples(folder / "data.npy", limit=200, seed=0)
    settings = {
        "profiling": Profiling(alignment_samples=100, matching_rows=200),
        "merging": Merging(layer_weights="sensitivity"),
        "matching": Matching(solver=Sinkhorn(epsilon=1e-2)),
    }
    models = {name: modules()[name] for name in "bc"}
    wanted = fuse(models, data, [3, 1], **settings).model.state_dict()
    found = load_state(folder / "fused" / "b+c.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert run(folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["pairs"], facts["failed"], facts["resumed"]) == (6, 0, 6)


def test_the_report_is_one_file_without_links(folder):
    assert run(folder, "--chosen=a,d", "--report=page.html") == 0
    page = (folder.parent / "page.html").read_text()
    links = Links()
    links.feed(page)
    assert {tag for tag, _ in links.found} == {"a"}
    assert all(re.fullmatch(r"#pair-\d", value) for _, value in links.found)
    assert not re.search(r"url\(|@import|https?://(?!www.w3.org/2000/svg)", page)
    assert "Chosen pair: a and d" in page
    assert "clafusion fuse-pairs" in page
    assert f"data.npy, limit 200, SHA-256 {file_digest(folder / 'data.npy')}" in page
    line = re.search(r"clafusion\.load\(.+\)", html.unescape(page)).group()
    model = eval(line, {"clafusion": clafusion})
    name = re.search(r"fused/([a-d]\+[a-d]\.safetensors)", line)[1]
    kept = load_state(folder / "fused" / name)
    assert all(torch.equal(kept[one], value) for one, value in model.state_dict().items())
    assert not (folder / "fused" / "report.html").exists()
    assert run(folder) == 0
    assert "Best pair: " in (folder / "fused" / "report.html").read_text()


def test_the_report_may_lie_where_the_results_will(folder, capsys):
    assert run(folder, f"--report={folder}/fused/r.html", "--chosen=a, d") == 0
    assert "Chosen pair: a and d" in (folder / "fused" / "r.html").read_text()
    (folder / "fused" / "report.html").mkdir()
    capsys.readouterr()
    assert run(folder, "--no-resume") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "report.html' exists and is no file" in shown.err


def test_a_report_that_cannot_be_written_leaves_the_table(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise InputError("the disk is full")

    monkeypatch.setattr("clafusion.reports.page.write_report", full)
    assert run(folder) == 2
    shown = capsys.readouterr()
    assert "6, 0 failed" in shown.out
    assert shown.err == "clafusion: the disk is full\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2gb", 2 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 GiB", 3 << 29),
        ("2T", 2 * 10**12),
        ("1e9", 10**9),
        ("7", 7),
        ("3kib", 3072),
    ],
)
def test_sizes_of_memory(text, size):
    assert bytes_of(text, "--memory-limit") == size


def test_a_failed_pair_gives_exit_code_1_and_the_rest_is_done(folder, capsys):
    (folder / "weights" / "c.safetensors").write_bytes(b"broken")
    assert run(folder, "--chosen=a,c") == 1
    shown, told = capsys.readouterr()
    assert "--chosen a,c was not fused" in told
    assert "6, 3 failed" in shown
    assert "is corrupt" in shown
    assert len(list((folder / "fused").glob("*.safetensors"))) == 3
    assert "is corrupt" in (folder / "fused" / "report.html").read_text()
    save_model(networks.mlp(*WIDTHS["c"], seed=2), folder / "weights" / "c.safetensors")
    assert run(folder, "--jobs=2", "--memory-limit=1GB") == 0
    assert "6, 0 failed, 3 taken over" in capsys.readouterr().out


def test_pairs_with_a_base_and_json(folder, capsys):
    text = {
        "models": {
            name: {
                "factory": f"nets.py:mlp{WIDTHS[name]}",
                "weights": f"weights/{name}.safetensors",
            }
            for name in "abc"
        },
        "pairs": {"base": "c"},
        "data": "data.npy",
    }
    (folder / "pairs.json").write_text(json.dumps(text), encoding="utf-8-sig")
    assert main(["fuse-pairs", str(folder / "pairs.json"), "--out=here"]) == 0
    capsys.readouterr()
    names = sorted(one.name for one in (folder.parent / "here").glob("*.safetensors"))
    assert names == ["c+a.safetensors", "c+b.safetensors"]


def test_names_of_json_are_not_taken_twice_either(folder, capsys):
    (folder / "pairs.json").write_text('{"models": {"a": 1, "a": 2}}')
    assert main(["fuse-pairs", str(folder / "pairs.json")]) == 2
    assert "the entry 'a' is there twice" in capsys.readouterr().err


def test_numbers_that_yaml_takes_for_text(folder):
    text = MANIFEST.replace("limit: 200", "limit: 200, scale: 1e1, mean: 1e-1, std: [1e0]")
    text = text.replace("name: sinkhorn, epsilon: 1e-2", "name: zip, budget: 1e-1")
    text = text.replace("[3, 1]", "[3e-1, 7e-1]").replace("sensitivity", "uniform")
    (folder / "pairs.yaml").write_text(text)
    found = read_manifest(folder / "pairs.yaml")
    assert found.data["scale"] == 10.0
    assert (found.data["mean"], found.data["std"]) == ([0.1], [1.0])
    assert found.weights == (0.3, 0.7)
    assert found.configs[0].matching.solver == Zip(budget=0.1)


def test_lists_of_settings_are_a_grid_whose_results_are_all_kept(folder, capsys):
    text = MANIFEST.replace("settings:", "pairs: [[a, b], [a, c]]\nsettings:")
    text = text.replace("name: sinkhorn, epsilon: 1e-2", "name: sinkhorn, epsilon: [1e-2, 1e-1]")
    (folder / "pairs.yaml").write_text(text)
    assert run(folder, "--csv=table.csv") == 0
    shown = capsys.readouterr().out
    for value in ("0.01", "0.1"):
        assert shown.count(f"matching.solver.epsilon {value}  ") == 2
    lines = (folder / "fused" / "results.jsonl").read_text().splitlines()
    facts = [json.loads(one) for one in lines]
    assert [one["settings"]["matching"]["solver"]["epsilon"] for one in facts] == [
        *(0.01, 0.01, 0.1, 0.1)
    ]
    assert all(one["assessment"] is not None for one in facts)
    files = [one["file"] for one in facts]
    assert len(set(files)) == 4
    assert files[:2] == ["a+b.safetensors", "a+c.safetensors"]
    assert re.fullmatch(r"a\+b\.[0-9a-f]{8}\.safetensors", files[2])
    assert Path("table.csv").read_text().count("epsilon 0.1,") == 2
    assert {"report.html", "report-2.html"} <= {one.name for one in (folder / "fused").iterdir()}
    assert run(folder) == 0
    assert "4 taken over from an earlier run" in capsys.readouterr().out
    (folder / "pairs.yaml").write_text(text.replace("[1e-2, 1e-1]", "1e-3"))
    assert run(folder) == 0
    kept = (folder / "fused" / "results.jsonl").read_text().splitlines()
    assert kept[:4] == lines
    assert all((folder / "fused" / name).is_file() for name in files)


def test_check_tells_each_cause_once(folder, capsys):
    (folder / "nets.py").write_text(
        FACTORY + "\ndef tanh():\n    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), "
        "nn.Linear(6, 5))\n\ndef other():\n    return nn.Linear(7, 5)\n"
    )
    tanh = torch.nn.Sequential(torch.nn.Linear(12, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))
    save_model(tanh, folder / "t.pt")
    save_model(torch.nn.Linear(7, 5), folder / "o.pt")
    more = (
        'models:\n  t: {factory: "nets.py:tanh", weights: t.pt}\n'
        '  o: {factory: "nets.py:other", weights: o.pt}'
    )
    (folder / "pairs.yaml").write_text(MANIFEST.replace("models:", more))
    assert main(["check", str(folder / "pairs.yaml")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "can be fused 6 of 15 pairs"
    assert len(shown) == 4
    assert shown[2].startswith("cannot       o: incompatible with 5 models (t, a, b, c, d): ")
    assert shown[3].startswith("cannot       t: incompatible with 4 models (a, b, c, d): ")
    assert not (folder / "fused").exists()
    (folder / "pairs.yaml").write_text(MANIFEST)
    assert main(["check", str(folder / "pairs.yaml"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["fusible"]) == 6


@pytest.mark.filterwarnings("default")  # of Dask and its event loop
def test_workers_of_a_dask_scheduler_fuse_the_pairs(folder, capsys):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        assert run(folder, f"--dask={cluster.scheduler_address}") == 0
        assert "6, 0 failed" in capsys.readouterr().out
        assert run(folder, f"--dask={cluster.scheduler_address}", "--jobs=2") == 2
    assert "--jobs is for this machine, --dask for others" in capsys.readouterr().err


BAD = {
    "no file": ("gone.yaml", None, [], "'gone.yaml' does not exist"),
    "no yaml": (None, "models: [", [], "cannot be read"),
    "no mapping": (None, "- a", [], "it must be a mapping"),
    "no models": (None, "data: data.npy", [], "models must map"),
    "unknown": (None, MANIFEST + "colour: red", [], "unknown entry 'colour'"),
    "setting": (
        None,
        MANIFEST.replace("epsilon", "epsilom"),
        [],
        "settings.matching.solver has no option 'epsilom'; did you mean 'epsilon'?",
    ),
    "flat": (
        None,
        MANIFEST.replace("settings:", "settings:\n  epsilon: 1"),
        [],
        "settings: 'epsilon' is no option of its own; it is matching.solver.epsilon",
    ),
    "list": (None, MANIFEST.partition("weights: [3")[0] + "settings: []", [], "settings must be a"),
    "value": (
        None,
        MANIFEST.replace("1e-2", "-1"),
        [],
        "settings.matching.solver.epsilon must be a positive number; got -1",
    ),
    "text": (None, MANIFEST.replace("1e-2", "much"), [], "epsilon must be a positive number; got"),
    "data": (None, MANIFEST.replace("{file: data.npy, limit: 200}", "3"), [], "data must be a"),
    "limit": (None, MANIFEST.replace("200}\n", "few}\n", 1), [], "data, limit is not possible"),
    "mean": (None, MANIFEST.replace("limit: 200", "mean: [a]"), [], "data, mean must be a list"),
    "twice": (None, MANIFEST + "  \nout: there", [], "the entry 'out' is there twice"),
    "number": (None, MANIFEST.replace("  a:", "  1:"), [], "name 1 is read as 1: put it in quotes"),
    "octal": (None, MANIFEST.replace("  a:", "  010:"), [], "name 010 is read as 8"),
    "pair of numbers": (None, MANIFEST + "pairs: [[1, a]]", [], "which is no name"),
    "true": (None, MANIFEST.replace("limit: 200", "limit: true"), [], "data, limit is not"),
    "scale": (None, MANIFEST.replace("limit: 200", "scale: yes"), [], "data, scale is not"),
    "nan": (None, MANIFEST.replace("limit: 200", "mean: .nan"), [], "data, mean must be a list"),
    "weight": (None, MANIFEST.replace("[3, 1]", "[yes, 1]"), [], "weights[0] must be a number"),
    "one weight": (None, MANIFEST.replace("[3, 1]", "0.5"), [], "weights must be two numbers"),
    "negative": (None, MANIFEST.replace("[3, 1]", "[3, -1]"), [], "weights[1] must be a number"),
    "nothing": (None, MANIFEST.replace("[3, 1]", "[0, 0]"), [], "weights must not be all 0"),
    "deep": (None, "[" * 3000, [], "cannot be read"),
    "none": (None, MANIFEST + "pairs: []", [], "pairs has no pair"),
    "colon": (
        None,
        MANIFEST.replace("nets.py:mlp(12, 9, 5)", "nets.py"),
        [],
        "nets.py' is no factory",
    ),
    "code": (None, MANIFEST.replace("nets.py:mlp(12, 9, 5)", "no.py:m"), [], "no.py' does not"),
    "kind": (None, MANIFEST.replace("nets.py:mlp(12, 9, 5)", "3"), [], "must be MODULE:FACTORY"),
    "gone": (None, MANIFEST.replace("weights/a", "gone"), [], "gone.safetensors' does not exist"),
    "pairs": (None, MANIFEST + "pairs: some", [], "pairs must be all"),
    "base": (None, MANIFEST + "pairs: {base: z}", [], "pairs, base names 'z'"),
    "pair": (None, MANIFEST + "pairs: [[a, z]]", [], "names 'z', which models does not have"),
    "factory": (
        None,
        MANIFEST.replace("factory: nets.py:mlp(12, 9, 5)", ""),
        [],
        "models, a: fact",
    ),
    "weights": (None, MANIFEST.replace("weights: weights/b.safetensors", ""), [], "models, b: wei"),
    "no out": (None, MANIFEST.replace("out: fused", ""), [], "give --out DIR"),
    "jobs": (None, MANIFEST, ["--jobs=0"], "--jobs must be at least 1"),
    "memory": (
        None,
        MANIFEST,
        ["--memory-limit=lots"],
        "--memory-limit must be an amount",
    ),
    "no memory": (
        None,
        MANIFEST,
        ["--memory-limit=0"],
        "--memory-limit must be an amount",
    ),
    "order": (None, MANIFEST, ["--chosen=b,a"], "pairs FIRST,SECOND; it has a,b"),
    "chosen": (None, MANIFEST, ["--chosen=b,a"], "--chosen 'b,a' is none"),
    "report": (None, MANIFEST, ["--report=a.pdf"], "--report 'a.pdf' must end with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, name):
    path, text, more, message = BAD[name]
    if text is not None:
        path = folder / "pairs.yaml"
        path.write_text(text)
    assert main(["fuse-pairs", str(path), *more]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(re.escape(message), shown.err), shown.err
    assert shown.err.count("\n") == 1
    assert not list(folder.glob("fused/*.safetensors"))


def processes_of(group):
    """Those of a process group that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def started_with_two_jobs(folder, out):
    """Start a run of which the data would not fit into a pipe."""
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(9000, 12)).astype("f4"))
    (folder / "pairs.yaml").write_text(MANIFEST.replace("limit: 200", "limit: 9000"))
    command = ["-m", "clafusion.cli.app", "fuse-pairs", str(folder / "pairs.yaml"), "--jobs=2"]
    return subprocess.Popen(
        [sys.executable, *command, f"--out={out}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# Python, the tracker of shared resources and two workers
STARTED = 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "begun", "delay"),
    [
        pytest.param(signal.SIGINT, False, 0.3, marks=pytest.mark.nightly),
        (signal.SIGINT, False, 2.0),
        (signal.SIGTERM, True, 0.0),
        (signal.SIGKILL, True, 0.0),
    ],
)
def test_a_run_that_is_stopped_leaves_no_process(folder, number, begun, delay):
    out = folder / "fused"
    run = started_with_two_jobs(folder, out)
    try:
        if begun:
            wait_until(lambda: list(out.glob("*.safetensors")) or run.poll() is not None)
        else:
            wait_until(lambda: len(processes_of(run.pid)) >= STARTED or run.poll() is not None)
            time.sleep(delay)
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.send_signal(number)
        shown = run.communicate(timeout=120)[1]
        wait_until(lambda: not processes_of(run.pid))
    finally:
        for left in processes_of(run.pid):
            os.kill(left, signal.SIGKILL)
    if number != signal.SIGKILL and run.returncode != 0:  # 0: it was done before
        assert run.returncode == 128 + number
        assert "clafusion: interrupted; finished pairs are kept\n" in shown


def test_a_folder_that_cannot_be_made_is_told_by_its_option(folder, capsys):
    (folder / "file").write_text("")
    assert run(folder, f"--out={folder}/file/out") == 2
    assert f"--out '{folder}/file/out' cannot be made a directory" in capsys.readouterr().err
