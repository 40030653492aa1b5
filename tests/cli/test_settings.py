"""Files of settings: YAML and JSON alike, with errors that name the setting by its path."""

import json

import pytest
from torch import nn

from clafusion import FusionConfig, InputError, LeastSquares, Matching, Sinkhorn
from clafusion.cli.settings import config_of, read_config


def read(tmp_path, text, name="settings.yaml"):
    (tmp_path / name).write_text(text)
    return read_config(tmp_path / name, "--config")


def test_yaml_and_json_say_the_same(tmp_path):
    text = "matching: {cost: euclidean, solver: {name: sinkhorn, epsilon: 1e-2}}\ncalibration: none"
    found = read(tmp_path, text)
    matching = Matching(cost="euclidean", solver=Sinkhorn(epsilon=0.01))
    assert found == FusionConfig(matching=matching, calibration="none")
    nested = {"cost": "euclidean", "solver": {"name": "sinkhorn", "epsilon": 0.01}}
    text = json.dumps({"matching": nested, "calibration": "none"})
    assert read(tmp_path, text, "settings.json") == found
    assert config_of(found.to_dict(), "settings", tmp_path) == found


@pytest.mark.parametrize("text", ["1e-2", "1E-2", "+1e-2", ".1e-1", "1.e-2", "0.01"])
def test_numbers_that_yaml_takes_for_text(tmp_path, text):
    found = read(tmp_path, f"calibration: {{name: least_squares, ridge: {text}}}")
    assert found.calibration == LeastSquares(ridge=0.01)


def test_a_template_is_built_from_beside_the_file(tmp_path):
    (tmp_path / "nets.py").write_text("from torch import nn\ndef make(n): return nn.Linear(n, n)\n")
    found = read(tmp_path, "target: {name: like, template: 'nets.py:make(3)'}")
    assert isinstance(found.target.template, nn.Linear)
    with pytest.raises(InputError, match=r"'.*gone.py' does not exist"):
        read(tmp_path, "target: {name: like, template: 'gone.py:make(3)'}")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"epsilon": 1},
            r"settings: 'epsilon' is no option of its own; it is matching.solver.epsilon",
        ),
        ({"calibratoin": "none"}, r"settings: 'calibratoin' is no option; did you mean 'calibrat"),
        (
            {"calibration": "train"},
            r"settings.calibration must be one of 'auto', 'none', 'batch",
        ),
        ({"calibration": {"anchor": 1}}, r"settings.calibration must say which by its name"),
        (
            {"calibration": {"name": "repair", "anchor": 1}},
            r"settings.calibration has no option 'anchor' \(it has none\)",
        ),
        (
            {"calibration": {"name": "least_squares", "anchor": 2}},
            r"settings.calibration.anchor must be 'auto' or in \[0, 1\]; got 2",
        ),
        (
            {"calibration": {"name": "least_squares", "ancor": 2}},
            r"settings.calibration has no option 'ancor'; did you mean 'anchor'",
        ),
        (
            {"matching": {"solver": {"name": "sinkhorn", "epsilon": "x"}}},
            r"matching.solver.epsilon",
        ),
        ({"profiling": {"inputs": 1.5}}, r"settings.profiling.inputs must be a whole number"),
        ({"verify": "yes"}, r"settings.verify must be True or False; got 'yes'"),
        ("repair", r"settings must be a mapping of profiling, alignment, .*; got 'repair'"),
        ([], r"settings must be a mapping"),
    ],
)
def test_an_error_names_the_path(tmp_path, found, message):
    with pytest.raises(InputError, match=f"^{message}" if message[0] == "s" else message):
        config_of(found, "settings", tmp_path)


def test_what_yaml_takes_silently_is_refused(tmp_path):
    for text, message in (
        ("seed: 1\nseed: 2", "the entry 'seed' is there twice"),
        ("1: 2", "the name 1 is read as 1: put it in quotes"),
        ("seed: [", "--config .* cannot be read"),
        ("- seed", r"it must be a mapping of profiling, .*; got \['seed'\]"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, text)
    with pytest.raises(InputError, match="has an unknown ending"):
        read(tmp_path, "seed: 1", "settings.toml")
    with pytest.raises(InputError, match="the entry 'seed' is there twice"):
        read(tmp_path, '{"seed": 1, "seed": 2}', "settings.json")
