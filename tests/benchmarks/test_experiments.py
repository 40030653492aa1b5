"""The experiments keep the seeds that are done, and only while the settings are the same."""

import argparse
import json

import pytest

from benchmarks import results
from benchmarks.experiments import experiment


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(settings, seeds, *, fresh=False, fails_at=None):
    """Run a stand-in of an experiment; return the seeds that it computed and its scores."""
    computed = []

    def one_seed(seed):
        if seed == fails_at:
            raise KeyboardInterrupt
        computed.append(seed)
        return {"parent": 0.5 + seed / 10, "fused": 0.75}

    given = argparse.Namespace(quick=True, seeds=seeds, fresh=fresh)
    scores = experiment.run("stand_in", given, settings, one_seed, title="accuracy")
    return computed, scores


def test_finished_seeds_are_kept(folder, capsys):
    settings = {"epochs": 2, "rates": (0.1, 0.2)}
    with pytest.raises(KeyboardInterrupt):
        run(settings, 3, fails_at=2)
    stored = json.loads((folder / "stand_in_quick.json").read_text())
    assert list(stored["seeds"]) == ["0", "1"]
    assert "NOT COMPUTED NOW" not in capsys.readouterr().out
    computed, scores = run(settings, 3)
    assert computed == [2]
    assert scores == {"parent": [0.5, 0.6, 0.7], "fused": [0.75] * 3}
    printed = capsys.readouterr().out
    assert "60.00 % +-  8.16" in printed  # sqrt(2 / 3) of 10 %
    assert "NOT COMPUTED NOW: seeds 0, 1 are read from" in printed
    assert "seed 2: computing" in printed
    assert (folder / "stand_in_quick.png").stat().st_size > 0
    assert run(settings, 3)[0] == []
    assert "NOT COMPUTED NOW: seeds 0, 1, 2" in capsys.readouterr().out
    assert run(settings, 3, fresh=True)[0] == [0, 1, 2]
    assert "NOT COMPUTED NOW" not in capsys.readouterr().out


def test_other_settings_begin_anew(folder):
    run({"epochs": 2}, 2)
    assert run({"epochs": 3}, 2)[0] == [0, 1]
    assert (folder / "stand_in_quick.json").exists()
