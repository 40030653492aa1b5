"""The picture: what is drawn, and that nothing but its file changes."""

import subprocess
import sys
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
import torch

import clafusion
from clafusion import InputError
from clafusion.reports import plot
from clafusion.reports.alignment_plot import aligned_figure
from clafusion.reports.plots import model_figure
from tests.support import networks


def aligned(deep, shallow):
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    models = {"long": networks.mlp(6, *deep, 3), "brief": networks.mlp(6, *shallow, 3)}
    return clafusion.align(models, inputs)


@pytest.fixture(scope="module")
def pair():
    return aligned((9, 8, 7, 9), (6, 5))


def texts(figure):
    return [one.get_text() for axes in figure.axes for one in axes.texts]


def test_every_pair_that_may_match_shows_its_cost_and_every_inserted_layer_is_marked(pair):
    figure = aligned_figure(pair)
    matrix, bar, boxes = figure.axes
    shown = {one.get_text() for one in matrix.texts}
    finite = pair.alignment.cost[np.isfinite(pair.alignment.cost)]
    assert shown == {f"{cost:.2f}" for cost in finite}
    assert [one.get_text() for one in boxes.texts].count("inserted") == 2
    assert bar.get_ylabel() == "cost (smaller is closer)"
    assert [one.get_text() for one in matrix.get_yticklabels()] == ["0", "2", "4", "6", "8"]
    assert [one.get_text() for one in matrix.get_xticklabels()] == ["0", "2", "4"]
    assert matrix.get_ylabel() == "layers of long"
    assert matrix.get_xlabel() == "layers of brief"
    title = figure.texts[0].get_text()
    assert title.startswith("long (5 layers) and brief (3 layers): chosen by cost, total cost ")


def test_a_line_shows_where_a_shared_trunk_ends(pair):
    ends = pair.alignment.deep_to_shallow
    inserted = [i for i, k in enumerate(ends) if k < 0]
    for end, said in ((0, "nothing is shared"), (inserted[0] + 1, "the trunk ends")):
        shown = texts(aligned_figure(pair, counts=(end, end)))
        assert shown.count(said) == 1
        assert shown.count("inserted") == sum(i < end for i in inserted)


def test_the_path_goes_through_the_matched_pairs(pair):
    (path,) = aligned_figure(pair).axes[0].lines
    drawn = [(int(row), int(column)) for column, row in path.get_xydata()]
    assert drawn == list(pair.alignment.pairs)


def test_a_forced_alignment_says_so():
    figure = aligned_figure(aligned((9, 8), (7, 6)))
    assert "forced by structure" in figure.texts[0].get_text()
    assert "inserted" not in texts(figure)


def test_sixty_layers_keep_their_names_apart():
    figure = aligned_figure(aligned((7,) * 59, (6,) * 40))
    figure.draw_without_rendering()
    for axis in (figure.axes[0].yaxis, figure.axes[0].xaxis):
        extents = [label.get_window_extent() for label in axis.get_ticklabels()]
        for one, other in pairwise(extents):
            assert not one.overlaps(other)
    width, height = figure.get_size_inches()
    assert width < 25
    assert height < 25


@pytest.mark.parametrize(
    ("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_the_ending_chooses_the_format(tmp_path, pair, ending, start):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"the old one")
    plot(pair, path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_refused(tmp_path, pair, monkeypatch):
    with pytest.raises(InputError, match=r"must end with one of \.png"):
        plot(pair, tmp_path / "a.gif")
    with pytest.raises(InputError, match="does not exist"):
        plot(pair, tmp_path / "none" / "a.png")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"the old one")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(InputError, match="No space left"):
        plot(pair, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_callers_settings_stay(tmp_path, pair):
    before = dict(mpl.rcParams)
    plot(pair, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_matplotlib_waits_for_a_picture_and_pyplot_is_never_imported():
    code = "import sys, clafusion.reports, clafusion.cli.app\n"
    code += "print('matplotlib' in sys.modules)\nimport clafusion.reports.page\n"
    code += "print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "False\nFalse\n"


def test_names_are_never_read_as_formulas(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a$_{b", torch.nn.Linear(6, 5))
            self.add_module("c$^d" * 20, torch.nn.Linear(5, 3))

        def forward(self, x):
            first, second = self.children()
            return second(torch.relu(first(x)))

    pair = clafusion.align({"$_{": Odd(), "b" * 60: Odd()}, torch.randn(60, 6))
    assert "a$_{b" in texts(aligned_figure(pair))
    assert max(map(len, texts(aligned_figure(pair)))) <= 32
    plot(pair, tmp_path / "a.png")


def test_of_several_models_each_has_a_panel(tmp_path, pair):
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    models = {
        "one": networks.mlp(6, 5, 3, seed=2),
        "two": networks.mlp(6, 9, 8, 3),
        "three": networks.mlp(6, 7, 9, 3, seed=1),
    }
    result = clafusion.fuse(models, inputs)
    figure = aligned_figure(result.aligned)
    assert len(figure.axes) == 6
    assert [one.get_text().partition(":")[0] for one in figure.texts] == [
        "two (3 layers) and one (2 layers)",
        "two (3 layers) and three (3 layers)",
    ]
    extents = [one.get_position() for one in figure.axes]
    for upper, lower in zip(extents[:3], extents[3:], strict=True):
        assert upper.y0 > lower.y1
    plot(result, tmp_path / "three.svg")
    assert "layers of three" in (tmp_path / "three.svg").read_text()
    plot(clafusion.fuse(models, inputs, merging="iterative"), tmp_path / "steps.svg")
    assert "one+two" in (tmp_path / "steps.svg").read_text()
    heights = [one.get_size_inches()[1] for one in (figure, aligned_figure(pair))]
    assert heights[0] > 1.5 * heights[1]


def test_layers_that_go_are_called_merged():
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    models = [networks.mlp(6, 9, 8, 7, 3), networks.mlp(6, 5, 3)]
    figure = aligned_figure(clafusion.align(models, inputs, target="shallower"))
    assert texts(figure).count("merged") == 2
    assert "inserted" not in texts(figure)


def test_a_models_layers_are_drawn(tmp_path):
    traced = clafusion.trace(networks.resnet(2, 1), torch.randn(4, 3, 8, 8))
    figure = model_figure(traced)
    for layer in traced.layers:
        assert layer.name in texts(figure)
    assert figure.texts[0].get_text() == f"5 layers, {len(traced.groups)} channel groups"
    marks = [one.get_text() for one in figure.legends[0].get_texts()]
    assert marks == ["cannot be inserted", "can be inserted with a zero residual"]
    plot(traced, tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match="plot takes a FusionResult"):
        plot([1], tmp_path / "a.png")
