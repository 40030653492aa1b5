"""From what is typed to models and data, as all commands do it."""

import numpy as np
import pytest
import torch

from clafusion import InputError, save_model
from clafusion.cli.inputs import DataOptions
from clafusion.cli.models import given_models
from tests.support.networks import mlp

FACTORY = "tests.support.networks:mlp(6, 5, 3)"
READING = DataOptions(None, None, None, None, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for seed, name in enumerate("abc"):
        save_model(mlp(6, 5, 3, seed=seed), tmp_path / f"{name}.pt")
    np.save(tmp_path / "data.npy", np.zeros((9, 6), dtype=np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((9, 7), dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_models_come_with_their_data(folder):
    given = given_models(["a.pt", "x=b.pt"], [FACTORY], None)
    assert list(given.files) == ["first", "x"]
    models, samples = given.with_data(folder / "data.npy", 4, READING)
    assert samples.shape == (4, 6)
    assert torch.equal(models["x"][0].weight, mlp(6, 5, 3, seed=1)[0].weight)
    with pytest.raises(InputError, match="model 'first' does not run on the data"):
        given.with_data(folder / "wide.npy", 4, READING)


@pytest.mark.usefixtures("folder")
def test_the_base_of_a_merge_comes_first():
    given = given_models(["b.pt"], [FACTORY], None, "a.pt")
    assert {name: str(file) for name, file in given.files.items()} == {
        "base": "a.pt",
        "first": "b.pt",
    }
    assert list(given.opened()) == ["base", "first"]


@pytest.mark.parametrize(
    ("weights", "archs", "keys", "base", "message"),
    [
        (["a.pt"], [FACTORY], None, None, "give the weights of at least two models; got 1"),
        (["a=a.pt", "a=b.pt"], [FACTORY], None, None, "two models are called 'a'"),
        (["a.pt", "b.pt"], None, None, None, "--arch MODULE:FACTORY"),
        (["a.pt", "b.pt"], [FACTORY], ["x", "y", "z"], None, "give --checkpoint-key once"),
        (["base=a.pt"], [FACTORY], None, "b.pt", "no model can be called 'base'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_does_not_fit_is_refused_before_anything_is_read(weights, archs, keys, base, message):
    with pytest.raises(InputError, match=message):
        given_models(weights, archs, keys, base)
