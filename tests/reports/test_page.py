"""The page about many pairs: what stands in it, escaped, the same bytes each time, small."""

import dataclasses
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats

from clafusion import FusionConfig, InputError, LeastSquares
from clafusion.reports.page import Accuracies, write_report
from clafusion.reports.page.details import load_line, page_data
from clafusion.reports.page.failures import causes_of
from clafusion.reports.page.heatmaps import NUM_COLOURS, colour_of
from clafusion.reports.page.markup import compact
from clafusion.reports.page.measures import measures_of, quality_of
from clafusion.reports.page.scatter import rank_correlation
from clafusion.reports.page.sections import settings
from tests.support.pair_results import FAILED, accuracies_of, pair_results, task_results

NAMES = ["small", "wide", "deep", "other"]
RUN = {"date": "today", "command": "clafusion fuse-pairs <zoo>.yaml", "data": "images.npy"}
EMPTY = {"meta", "input", "link", "br", "hr", "img"}


class Reader(HTMLParser):
    """Reads a page: the words of each element by its id, tables as rows, and what is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.rows, self.words, self.tags, self.ids = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data


def written(tmp_path, results, **given):
    write_report(results, tmp_path / "page.html", **given)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def board_of(page):
    reader = Reader(page)
    start = next(i for i, row in enumerate(reader.rows) if row[:2] == ["first", "second"])
    head = reader.rows[start]
    rows = []
    for row in reader.rows[start + 1 :]:
        if len(row) != len(head):
            break
        rows.append(dict(zip(head, row, strict=True)))
    return rows


def test_the_board_has_all_numbers_and_begins_with_the_best(tmp_path):
    results = pair_results(NAMES)
    page = written(tmp_path, results, run=RUN)
    rows = board_of(page)
    order = sorted(results, key=lambda one: -one.agreement)
    assert [(row["first"], row["second"]) for row in rows] == [
        (one.first, one.second) for one in order
    ]
    for row, one in zip(rows, order, strict=True):
        alone = max(near.agreement for near in one.assessment.parents.values())
        assert row["agreement, %"] == f"{100 * one.agreement:.1f}"
        assert row["gap to better parent, points"] == f"{100 * (one.agreement - alone):+.1f}"
        assert row["gap to ensemble, points"] == f"{100 * (one.agreement - 1):+.1f}"
        assert row["alignment cost"] == f"{one.alignment.total_cost:.3f}"
        assert (row["parameters"], row["operations"]) == ("188 k", "42.1 M")
        assert row["seconds"] == f"{sum(one.seconds.values()):.2f}"
        assert row["file"] == one.path.name
        assert "accuracy, %" not in row
    assert f"Best pair: {order[0].first} and {order[0].second}" in page
    assert f"Worst pair: {order[-1].first} and {order[-1].second}" in page
    words = "".join(Reader(page).words)
    for told in (*RUN.values(), "calibration repair", "02" * 0 + "01" * 32, "clafusion.load("):
        assert told in words


def test_accuracies_rank_the_pairs_and_give_the_gaps(tmp_path):
    results = pair_results(NAMES)
    given = accuracies_of(results)
    rows = board_of(written(tmp_path, results, accuracies=given))
    assert [row["accuracy, %"] for row in rows] == [
        f"{100 * value:.1f}" for value in sorted(given.pairs.values(), reverse=True)
    ]
    for row in rows:
        pair = row["first"], row["second"]
        gap = given.pairs[pair] - max(given.models[name] for name in pair)
        assert row["gap to better parent, points"] == f"{100 * gap:+.1f}"
        gap = given.pairs[pair] - given.ensembles[pair]
        assert row["gap to ensemble, points"] == f"{100 * gap:+.1f}"
    partly = Accuracies({("small", "wide"): 0.9}, {"small": 0.8})
    rows = board_of(written(tmp_path, results, accuracies=partly))
    assert [row["accuracy, %"] for row in rows] == ["90.0", "", "", "", "", ""]
    assert "gap to better parent, points" not in rows[0]


def test_models_that_put_out_values_are_ranked_by_distance(tmp_path):
    results = pair_results(NAMES, kind="values")
    rows = board_of(written(tmp_path, results))
    order = sorted(results, key=lambda one: one.distance)
    assert [row["distance"] for row in rows] == [f"{one.distance:.3g}" for one in order]
    alone = min(near.distance for near in order[0].assessment.parents.values())
    assert rows[0]["gap to better parent, distance"] == f"{alone - order[0].distance:+.3g}"
    assert "agreement, %" not in rows[0]


def test_heat_maps_have_the_parents_on_the_diagonal(tmp_path):
    failed = {("small", "other"): FAILED["unlike"].format("small", "other")}
    results = pair_results(NAMES, failed=failed)
    given = accuracies_of(results)
    page = written(tmp_path, results, accuracies=given, values={"<speed>": {("small", "deep"): 7}})
    reader = Reader(page)
    start = next(i for i, row in enumerate(reader.rows) if row == ["", *NAMES])
    rows = reader.rows[start + 1 : start + 5]
    for i, row in enumerate(rows):
        assert row[0] == NAMES[i]
        assert row[1 + i] == f"{100 * given.models[NAMES[i]]:.1f}"
        assert all(one == "" for one in row[1 : 1 + i])
    assert rows[0][3] == f"{100 * given.pairs['small', 'deep']:.1f}"
    assert rows[0][4] == "failed"
    switches = [given for tag, given in reader.tags if given.get("name") == "map"]
    assert ["checked" in one for one in switches] == [True] + [False] * (len(switches) - 1)
    assert page.count('class="map"') == len(switches) == 8
    assert "&lt;speed&gt;" in page
    # All switches need a rule each in the page's style.
    assert f"nth-of-type({len(switches)}):checked" in page


def test_models_of_one_side_only_stand_beside_the_map(tmp_path):
    pairs = [("small", "wide"), ("small", "deep")]
    page = written(tmp_path, pair_results(NAMES, pairs=pairs))
    rows = Reader(page).rows
    start = next(i for i, row in enumerate(rows) if row == ["", "alone", "wide", "deep"])
    assert rows[start + 1][0] == "alone"
    assert all(re.fullmatch(r"\d+\.\d", one) for one in rows[start + 1][2:])
    assert rows[start + 2][0] == "small"
    assert all(re.fullmatch(r"\d+\.\d", one) for one in rows[start + 2][1:])


def test_rank_correlations_are_those_of_scipy():
    measures = {one.key: one for one in measures_of(pair_results([f"m{i}" for i in range(7)]))}
    x, y = measures["cost"], measures["agreement"]
    rho, count = rank_correlation(x, y)
    assert count == 21
    expected = scipy.stats.spearmanr([x.values[i] for i in range(21)], list(y.values.values()))
    assert rho == pytest.approx(expected.statistic, abs=1e-12)
    few = dataclasses.replace(x, values={0: 1.0, 1: 2.0})
    assert rank_correlation(few, y) == (None, 2)


def test_failures_are_told_once_for_each_cause(tmp_path):
    corrupt = FAILED["corrupt"].format("other")
    failed = {(name, "other"): corrupt for name in NAMES[:3]}
    failed |= {pair: FAILED["unlike"].format(*pair) for pair in [("small", "wide")]}
    results = pair_results([*NAMES, "last"], failed=failed | {("wide", "last"): "KeyError: 'x'"})
    causes = causes_of(results)
    assert [(len(one.pairs), one.shared) for one in causes] == [
        (3, ("other",)),
        (1, ("small", "wide")),
        (1, ("wide", "last")),
    ]
    assert causes[0].remedy.startswith("Write or copy the file again")
    assert "clafusion explain" in causes[1].remedy
    assert "--debug" in causes[2].remedy
    unlike = {
        pair: FAILED["unlike"].format(*pair) for pair in [("small", "deep"), ("wide", "deep")]
    }
    (cause,) = causes_of(pair_results(NAMES, failed=unlike))
    assert cause.shared == ("deep",)
    depths = {
        (name, "tanh"): f"StructureError: {name} ({i} layers)" for i, name in enumerate(NAMES)
    }
    (cause,) = causes_of(pair_results([*NAMES, "tanh"], failed=depths))
    assert (len(cause.pairs), cause.shared) == (len(NAMES), ("tanh",))
    page = written(tmp_path, results)
    assert page.count("is corrupt") == 1
    assert "3 pairs with other" in page
    nothing = {(one.first, one.second): corrupt for one in pair_results(NAMES)}
    page = written(tmp_path, pair_results(NAMES, failed=nothing))
    assert "6 pairs" in page
    assert "0 of 6" in page
    Reader(page)


def test_what_users_name_is_escaped(tmp_path):
    bad = "</script><script>alert(1)</script><!-- \" ' & \u2028 $title"
    errors = {(bad, "b"): f"InputError: models[{bad!r}]: <b>no</b>"}
    results = pair_results([bad, "b", "c"], failed=errors)
    page = written(
        tmp_path, results, run={bad: bad}, chosen=(bad, "c"), values={bad: {(bad, "c"): 1.0}}
    )
    reader = Reader(page)
    assert sum(tag == "script" for tag, _ in reader.tags) == 2
    assert not {"b"} & {tag for tag, _ in reader.tags if "no" in tag}
    assert "<b>no" not in page
    assert bad in "".join(reader.words)
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["pairs"]["1"]["names"] == [bad, "c"]
    assert len(set(reader.ids)) == len(reader.ids)
    written(tmp_path, pair_results(["a\udcff", "b"]))  # of a file's name that is no UTF-8


def test_the_same_results_give_the_same_bytes_and_errors_leave_the_old_page(tmp_path):
    results = pair_results(NAMES)
    given = {"run": RUN, "accuracies": accuracies_of(results)}
    page = written(tmp_path, results, **given)
    assert written(tmp_path, pair_results(NAMES), **given) == page
    for wrong in (
        {"chosen": ("wide", "small")},
        {"values": {"x": {("small", "none"): 1.0}}},
        {"accuracies": Accuracies({("wide", "small"): 1.0})},
    ):
        with pytest.raises(InputError, match="the report has no fused pair"):
            write_report(results, tmp_path / "page.html", **wrong)
    with pytest.raises(InputError, match=r"must end with \.html$"):
        write_report(results, tmp_path / "page.pdf")
    assert (tmp_path / "page.html").read_text() == page
    Reader(written(tmp_path, []))
    Reader(written(tmp_path, pair_results(NAMES[:2])))


def test_the_costs_of_layers_come_back_from_the_data():
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    results = pair_results(NAMES)
    data = json.loads(page_data(results, [0]))
    for place, one in data["pairs"].items():
        cost = results[int(place)].alignment.cost
        numbers = np.array([digits.index(letter) for letter in one["costs"]]).reshape(-1, 2)
        steps = (numbers @ [64, 1]).reshape(cost.shape)
        low, high = one["ends"]
        assert (np.isinf(cost) == (steps == 4095)).all()
        finite = np.isfinite(cost)
        found = low + steps / 4094 * (high - low)
        assert np.abs(found - cost)[finite].max() < 2e-4
        assert [len(data["layers"][i]) for i in one["layers"]] == list(cost.shape)


def test_many_pairs_stay_small(tmp_path):
    pairs = [(f"m{i}", f"m{j}") for i in range(46) for j in range(i)][:1000]
    results = pair_results([f"m{i}" for i in range(46)], pairs=pairs, depth=14)
    page = written(tmp_path, results)
    assert len(page) < 4e6
    deep = [dataclasses.replace(one, alignment=_widened(one.alignment)) for one in results[:300]]
    assert sum(one.alignment.cost.size for one in deep) > 900_000
    costs = [one["costs"] for one in json.loads(page_data(deep, [7]))["pairs"].values()]
    assert costs[7] != ""
    assert costs[-1] == ""
    assert sum(map(len, costs)) <= 1_200_000


def _widened(alignment):
    return dataclasses.replace(
        alignment, cost=np.tile(alignment.cost, (4, 4)), skip=np.tile(alignment.skip, 4)
    )


def test_the_line_to_load_is_one_that_works(tmp_path):
    (one,) = pair_results(NAMES[:2], folder=tmp_path)
    path = str(tmp_path / "small+wide.safetensors")
    assert load_line(one) == f"model = clafusion.load('nets.py:make()', {path!r})"
    module = dataclasses.replace(one, _architecture=None)
    assert load_line(module).startswith(f"model = clafusion.load(models['wide'], {path!r})  # ")
    folder = dataclasses.replace(module, path=tmp_path / "v1.0+v1.1")
    assert load_line(folder) == f"model = clafusion.load({str(tmp_path / 'v1.0+v1.1')!r})"
    resized = dataclasses.replace(one, resized=True)
    assert (
        load_line(resized) == f"model = clafusion.load(clafusion.load('nets.py:make()'), {path!r})"
    )
    recorded = dataclasses.replace(resized, _has_record=True)
    assert load_line(recorded) == f"model = clafusion.load({path!r}, trust_code=True)"
    assert load_line(dataclasses.replace(one, path=None)).startswith("result.model")


def test_counts_and_colours():
    assert [compact(one) for one in (7, 999, 1000, 188_340, 999_999, 1.5e9, 2e19)] == [
        "7", "999", "1 k", "188 k", "1 M", "1.5 G", "20000 P",
    ]  # fmt: skip
    assert [colour_of(one, 0, 1) for one in (0, 0.5, 1)] == [0, 5, NUM_COLOURS - 1]
    assert colour_of(0, 0, 1, is_low_good=True) == NUM_COLOURS - 1
    assert colour_of(3, 3, 3) == NUM_COLOURS // 2


def test_the_numbers_that_rank_pairs_are_known():
    assert quality_of(measures_of([])) is None
    results = [dataclasses.replace(one, assessment=None) for one in pair_results(NAMES)]
    assert quality_of(measures_of(results)).key == "cost"


def told(**given):
    results = [
        dataclasses.replace(one, settings=FusionConfig(**given).to_dict())
        for one in pair_results(NAMES[:2])
    ]
    summary = re.search(r"<summary>(.*?)</summary>", settings(results))[1]
    return re.sub("<.*?>", "", summary)


def test_settings_are_told_by_what_is_not_the_default():
    assert told() == "Settings: all as they are by default"
    assert told(calibration="least_squares") == "Settings: calibration least_squares"
    changed = told(calibration=LeastSquares(anchor=0.5), verify=False)
    assert changed == "Settings: calibration least_squares, calibration.anchor 0.5, verify False"
    results = pair_results(NAMES[:3])
    other = dataclasses.replace(results[1], settings=FusionConfig(calibration="none").to_dict())
    page = settings([results[0], other, results[2]])
    assert page.count("<details") == 2
    unknown = {"calibration": {"name": "of another program", "factor": 1}}
    page = settings([dataclasses.replace(results[0], settings=unknown)])
    assert "calibration of another program" in page
    assert settings([dataclasses.replace(results[0], settings={})]) == ""


def tables_of(page, first):
    """Return the rows of the tables of which the first heading is ``first``, by their headings."""
    rows, found = Reader(page).rows, []
    for i, head in enumerate(rows):
        if head[0] == first:
            same = itertools.takewhile(lambda row: row[0] != first, rows[i + 1 :])
            found.append([dict(zip(head, row, strict=True)) for row in same])
    return found


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_merges_and_reassemblies_are_tables(tmp_path, kind):
    tasks = task_results(kind)
    page = written(tmp_path, [], tasks=tasks)
    assert page == written(tmp_path, [], tasks=tasks)
    merges, reassemblies = tables_of(page, "name")
    assert [one["name"] for one in merges] == ["both <b>", "no data", "lost"]
    both, without, lost = merges
    assert both["base"] == "base"
    assert both["models and weights"] == "maths & more 0.75, code 0.25"
    assert both["options"] == "method.density 0.5"
    near = tasks[0].assessment.result
    assert both["distance"] == f"{near.distance:.3g}"
    assert ("agreement, %" in both) == (kind == "classes")
    if kind == "classes":
        assert both["agreement, %"] == f"{100 * near.agreement:.1f}"
    nearest = tasks[0].assessment.nearest_parent
    assert both["nearest model"] == nearest
    alone = tasks[0].assessment.parents[nearest]
    if kind == "classes":
        assert both["its agreement, %"] == f"{100 * alone.agreement:.1f}"
    else:
        assert both["its distance"] == f"{alone.distance:.3g}"
    assert (both["outcome"], both["file"], both["seconds"]) == ("done", "both.safetensors", "1.50")
    assert (without["outcome"], without["distance"], without["options"]) == ("done before", "", "")
    assert (lost["outcome"], lost["file"]) == ("failed", "")
    assert lost["models and weights"] == "maths & more, code"
    (one,) = reassemblies
    assert (one["blocks"], one["options"]) == ("code 0 | maths & more 1", "blocks 2")
    words = "".join(Reader(page).words)
    assert "3 merges and 1 reassembly of 3 models" in words
    assert "lost was not done" in words
    assert "InputError: <no> file" in words
    assert "Look & see." in words
    assert "<b>" not in page.replace("<b>2 of 3</b>", "").replace("<b>1 of 1</b>", "")


def test_with_pairs_merges_have_their_sections_behind_them(tmp_path):
    results = pair_results(NAMES)
    page = written(tmp_path, results, run=RUN, tasks=task_results())
    alone = written(tmp_path, results, run=RUN)
    ids = [one for one in Reader(page).ids if one not in Reader(alone).ids]
    assert ids == ["merges", "merges-title", "reassemblies", "reassemblies-title"]
    assert "6 pairs, 3 merges and 1 reassembly of 7 models" in page
    with pytest.raises(InputError, match=r"tasks\[0\] must be what became of a merge"):
        write_report(results, tmp_path / "page.html", tasks=[3])
