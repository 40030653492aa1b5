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
from clafusion.reports.plots import _figure, plot_alignment
from tests import networks


def aligned(deep, shallow):
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    return clafusion.align(networks.mlp(6, *deep, 3), networks.mlp(6, *shallow, 3), inputs)


@pytest.fixture(scope="module")
def pair():
    return aligned((9, 8, 7, 9), (6, 5))


def texts(figure):
    return [one.get_text() for axes in figure.axes for one in axes.texts]


def test_every_pair_that_may_match_shows_its_cost_and_every_inserted_unit_is_marked(pair):
    figure = _figure(pair)
    matrix, bar, boxes = figure.axes
    shown = {one.get_text() for one in matrix.texts}
    finite = pair.alignment.cost[np.isfinite(pair.alignment.cost)]
    assert shown == {f"{cost:.2f}" for cost in finite}
    assert [one.get_text() for one in boxes.texts].count("inserted") == 2
    assert bar.get_ylabel() == "cost (smaller is closer)"
    assert [one.get_text() for one in matrix.get_yticklabels()] == ["0", "2", "4", "6", "8"]
    assert [one.get_text() for one in matrix.get_xticklabels()] == ["0", "2", "4"]
    assert "chosen by cost" in figure.texts[0].get_text()


def test_the_path_goes_through_the_matched_pairs(pair):
    (path,) = _figure(pair).axes[0].lines
    drawn = [(int(row), int(column)) for column, row in path.get_xydata()]
    assert drawn == list(pair.alignment.pairs)


def test_a_forced_alignment_says_so():
    figure = _figure(aligned((9, 8), (7, 6)))
    assert "forced by structure" in figure.texts[0].get_text()
    assert "inserted" not in texts(figure)


def test_sixty_units_keep_their_names_apart():
    figure = _figure(aligned((7,) * 59, (6,) * 40))
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
    plot_alignment(pair, path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_refused(tmp_path, pair, monkeypatch):
    with pytest.raises(InputError, match=r"must end with one of \.png"):
        plot_alignment(pair, tmp_path / "a.gif")
    with pytest.raises(InputError, match="does not exist"):
        plot_alignment(pair, tmp_path / "none" / "a.png")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"the old one")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(InputError, match="No space left"):
        plot_alignment(pair, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_callers_settings_stay(tmp_path, pair):
    before = dict(mpl.rcParams)
    plot_alignment(pair, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, clafusion.reports.plots, clafusion.cli; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "False\n"


def test_names_are_never_read_as_formulas(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a$_{b", torch.nn.Linear(6, 5))
            self.add_module("c$^d" * 20, torch.nn.Linear(5, 3))

        def forward(self, x):
            first, second = self.children()
            return second(torch.relu(first(x)))

    pair = clafusion.align(Odd(), Odd(), torch.randn(60, 6))
    assert "a$_{b" in texts(_figure(pair))
    assert max(map(len, texts(_figure(pair)))) <= 32
    plot_alignment(pair, tmp_path / "a.png")
