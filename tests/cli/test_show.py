"""Progress: each stage ends at what is expected of it, is shown once, and says what is left."""

import io

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from clafusion import Assessment, FusionConfig, LeastSquares, Matching, Profiling, fuse
from clafusion.cli import show
from clafusion.stages import expected_work
from tests.support.networks import mlp

VECTORS = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [300, 1000])  # of fewer than 500 nothing is held out
@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(),
        FusionConfig(calibration="repair", matching=Matching(importance="activation")),
        FusionConfig(calibration=LeastSquares(samples=250), profiling=Profiling(inputs=200)),
        FusionConfig(assessment=Assessment(held_out=0.3)),
        FusionConfig(assessment="none"),
    ],
)
def test_each_stage_ends_at_as_many_inputs_as_are_expected_of_it(config, count):
    ends = {}
    fuse(
        [mlp(8, 9, 7, 4), mlp(8, 6, 4, seed=1)],
        VECTORS[:count],
        config=config,
        progress=lambda stage, done: ends.update({stage: done}),
    )
    expected = expected_work(count, config)
    assert ends == {stage: expected[stage] for stage in ends}
    assert list(ends) == [stage for stage in expected if stage in ends]
    assert {"trace", "profile", "match", "calibrate"} <= ends.keys()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: the list holds its time."""
    now = [0.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    return now


def test_every_stage_has_a_bar_from_the_start_and_ends_full(monkeypatch, clock):
    shown = []
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    monkeypatch.setattr(Progress, "update", lambda _, task, **told: shown.append((task, told)))
    with show.progress({"trace": 2, "profile": 900, "calibrate": 900}, 5.0) as report:
        assert [told["total"] for _, told in shown] == [2, 900, 900]
        clock[0] = 1.0
        report("trace", 1)
        report("trace", 2)
        clock[0] = 4.0
        report("profile", 300)
        assert shown[-2][1] == {"completed": 300, "total": 900, "left": "about 6 s left"}
        clock[0] = 10.0
        report("profile", 900)
        # Least squares takes five times as long as profiling, which took 9 seconds.
        assert shown[-1][1] == {"completed": 0, "total": 900, "left": "about 45 s left"}
        clock[0] = 20.0
        report("calibrate", 100)
        # A ninth took 10 seconds in place of 5: the measured rate counts for a ninth so far.
        assert shown[-1][1]["left"] == "about 44 s left"
        report("calibrate", 900)
    assert [told for _, told in shown[-3:]] == [
        {"completed": 2, "total": 2, "left": ""},
        {"completed": 900, "total": 900, "left": ""},
        {"completed": 900, "total": 900, "left": ""},
    ]
    assert {task for task, _ in shown} == {0, 1, 2}  # one bar for each stage


def test_without_a_terminal_there_is_a_line_a_minute(capsys, clock):
    with show.progress({"trace": 2, "profile": 900, "calibrate": 900}) as report:
        clock[0] = 30.0
        report("trace", 2)
        assert capsys.readouterr().err == ""
        clock[0] = 90.0
        report("profile", 300)
        report("profile", 400)
        told = capsys.readouterr().err
        assert told == "clafusion: profile 300 of 900, about 2 min 0 s left\n"


def test_nothing_is_told_of_what_is_left_before_it_is_known(clock):
    work = show._Work({"profile": 100, "calibrate": 100}, 2.0)
    clock[0] = 10.0
    work.report("profile", 9)  # the first inputs bear the start of the stage
    assert work.left("profile") is None
    clock[0] = 12.0
    work.report("profile", 40)
    assert work.left("profile") == pytest.approx(18.0)
    clock[0] = 20.0
    work.report("profile", 100)
    assert work.left("calibrate") == pytest.approx(40.0)
    clock[0] = 50.0
    assert work.left("calibrate") == pytest.approx(10.0)
    clock[0] = 61.0  # all that was expected has passed
    assert work.left("calibrate") is None
    work.report("calibrate", 50)
    assert work.left("calibrate") == pytest.approx(0.5 * (41 + 0.5 * 40))


def test_least_squares_reports_the_trial_of_its_anchors_as_a_part_of_it():
    told = []
    fuse(
        [mlp(8, 9, 7, 4), mlp(8, 6, 4, seed=1)],
        VECTORS,
        progress=lambda stage, done: told.append(done) if stage == "calibrate" else None,
    )
    assert told == sorted(told)
    # Three layers, by two anchors, by each parent's interior alone and by what was chosen.
    assert len(told) == 3 * 3
    # Two parents and four candidates on an eighth of the inputs, then two and one on all.
    assert told[5] == 900 * 113 * 6 // (113 * 6 + 900 * 3)
    assert told[-1] == 900


def test_a_stage_that_comes_again_adds_to_its_whole(capsys, clock):
    with show.progress({"profile": 100, "assess": 10}) as report:
        report("profile", 100)
        report("profile", 50)
        clock[0] = 70.0
        report("profile", 60)
    assert capsys.readouterr().err.startswith("clafusion: profile 160 of 200")


def test_quiet_shows_no_progress():
    token = show.QUIET.set(True)
    try:
        with show.progress({"trace": 2}) as report:
            assert report is None
    finally:
        show.QUIET.reset(token)
