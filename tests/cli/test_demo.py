"""The demo in a quick form; the command line's tests run it whole."""

import sys

import pytest

from clafusion import InputError
from clafusion.demo import run_demo


def test_same_seed_same_bytes_and_one_table(tmp_path):
    told: list[str] = []
    first = run_demo(tmp_path / "new" / "folder", epochs=2, say=told.append)
    second = run_demo(tmp_path / "again", epochs=2)
    assert first.weights.read_bytes() == second.weights.read_bytes()
    assert first.picture.read_bytes() == second.picture.read_bytes()
    assert first.accuracies == second.accuracies
    assert len(told) == 3
    summary = first.summary()
    for name, accuracy in first.accuracies.items():
        assert f"{100 * accuracy:.1f} %" in summary
        assert name in summary
    assert str(first.picture) in summary


def test_without_scikit_learn_the_demo_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'clafusion\[demo\]'"):
        run_demo(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run_demo(tmp_path / "file")
