"""The progress bar: each stage ends at the number of inputs that it looks at."""

import io

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from clafusion import Assessment, FusionConfig, LeastSquares, Matching, Profiling, fuse
from clafusion.cli import show
from clafusion.stages import expected_inputs
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
    expected = expected_inputs(count, config)
    assert ends == {stage: expected[stage] for stage in ends}
    assert {"profile", "calibrate"} <= ends.keys()


def test_the_bar_is_full_at_the_last_input_that_a_stage_looks_at(monkeypatch):
    shown = []
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(show, "Console", lambda **_: terminal)
    monkeypatch.setattr(Progress, "update", lambda *_, **told: shown.append(told))
    with show.progress(1000, {"profile": 900}) as report:
        for done in (450, 900):
            report("profile", done)
        report("profile", 950)  # more than was expected
        report("other", 500)
    assert shown == [
        {"description": "profile", "completed": 450, "total": 900},
        {"description": "aligning and matching", "total": None},
        {"description": "profile", "completed": 950, "total": 1000},
        {"description": "other", "completed": 500, "total": 1000},
    ]
