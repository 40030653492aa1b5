"""Models in files, and fusions within a limit of memory, give what others give."""

import errno
import os

import pytest
import torch

import clafusion
from clafusion import FusionConfig, InputError, fuse
from clafusion.memory import activation_bytes, bytes_of, needed_memory
from clafusion.weights.mapped import FileWeights
from tests.support.data import CALIBRATIONS
from tests.support.in_files import PAIRS, VECTORS, in_file, made
from tests.support.networks import mlp

ENDINGS = [".safetensors", ".pt", ".safetensors.index.json"]


def files(pair, folder, ending=".safetensors"):
    calls, inputs = PAIRS[pair]
    return [in_file(c, folder / f"{i}{ending}", i) for i, c in enumerate(calls)], inputs


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_files_and_a_limit_give_the_same_bytes(pair, calibration, tmp_path):
    given, inputs = files(pair, tmp_path)
    loaded = [made(call, i) for i, call in enumerate(PAIRS[pair][0])]
    expected = fuse(loaded, inputs, calibration=calibration)
    found = fuse(given, inputs, calibration=calibration, memory_limit="4GB")
    state = found.model.state_dict()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert found.assessment == expected.assessment
    assert any(isinstance(one.traced.weights, FileWeights) for one in found.aligned.profiles)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_stays_where_it_is(ending, tmp_path):
    given, inputs = files("language models", tmp_path, ending)
    for one in given:
        model, mapped = one.open()
        assert mapped == dict(model.named_parameters(remove_duplicate=False)).keys()
        assert model.head.weight is model.embed.weight
        wanted = one.load()
        assert torch.equal(model(inputs), wanted(inputs))


def test_a_network_that_needs_memory_to_be_built_is_loaded(tmp_path):
    given = [in_file(f"ReadsItsWeights({n})", tmp_path / f"{n}.pt", n) for n in (10, 14)]
    assert given[0].open()[1] == frozenset()
    expected = fuse([one.load() for one in given], VECTORS)
    found = fuse(given, VECTORS)
    assert all(
        torch.equal(found.model.state_dict()[name], value)
        for name, value in expected.model.state_dict().items()
    )


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path):
    state = made("Language(2)", 0).state_dict()
    state["head.weight"] = state["head.weight"] + 1
    torch.save(state, tmp_path / "a.pt")
    one = clafusion.ModelFile("tests.support.in_files:Language(2)", tmp_path / "a.pt")
    with pytest.raises(InputError, match="are tied in the model and differ in the file"):
        fuse([one, made("Language(3)", 1)], PAIRS["language models"][1])


def test_a_file_is_not_changed_by_what_is_done_with_the_result(tmp_path):
    given, inputs = files("perceptrons", tmp_path)
    before = [one.path.read_bytes() for one in given]
    model = fuse(given, inputs, memory_limit="4GB").model
    expected = [one.clone() for one in model.parameters()]
    with torch.no_grad():
        for one in model.parameters():
            one.add_(1.0)
    for one, was in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(one, was + 1.0)
    assert [one.path.read_bytes() for one in given] == before


# --- limits -------------------------------------------------------------------------------------


def test_a_limit_that_is_too_small_says_the_least_that_would_do(monkeypatch):
    monkeypatch.setattr("clafusion.memory.held_now", lambda: 0)
    models = [mlp(12, 20, 4), mlp(12, 20, 16, 4)]
    with pytest.raises(InputError, match=r"is too little: the least is about '67.5 MB'.*'match'"):
        fuse(models, VECTORS, calibration="repair", memory_limit="5kB")
    with pytest.raises(InputError, match="and 'calibrate' needs"):
        fuse(models, VECTORS, memory_limit="5kB")


def test_channels_that_are_chosen_count():
    """As matrices of all parents' channels side by side, of which a choice holds several."""
    models = [clafusion.trace(mlp(12, n, n, 4), VECTORS) for n in (400, 300)]
    needed = {
        name: needed_memory(models, 50, FusionConfig(calibration=name)).stages["calibrate"]
        for name in ("repair", "least_squares")
    }
    assert needed["least_squares"] - needed["repair"] > 8 * 5 * 700**2
    single = [clafusion.trace(mlp(12, 4), VECTORS)] * 2  # no hidden channels at all
    assert needed_memory(single, 50, FusionConfig()).stages["calibrate"] < 70e6


def test_a_limit_below_the_largest_weight_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("clafusion.fusion.traced_parent", lambda *_: pytest.fail("traced"))
    monkeypatch.setattr("clafusion.memory.held_now", lambda: 0)
    models = [mlp(12, 2000, 4), mlp(12, 2000, 1600, 4)]
    with pytest.raises(InputError, match=r"'2.weight' of models\[1\] alone needs 38.4 MB"):
        fuse(models, VECTORS, memory_limit="20MB")
    with pytest.raises(InputError, match=r"'2.weight'.* the least for it is '38.4 MB'"):
        fuse(models, VECTORS, memory_limit="1kB")  # too little for the others, too


@pytest.mark.parametrize("limit", ["6 apples", "", "-1GB", 0, -5, True, 1.5])
def test_a_limit_is_an_amount_of_memory(limit):
    with pytest.raises(InputError, match="memory_limit must be an amount of memory"):
        fuse([mlp(12, 20, 4), mlp(12, 20, 16, 4)], VECTORS, memory_limit=limit)


def test_units_of_memory():
    assert bytes_of("6GB", "x") == 6_000_000_000
    assert bytes_of("1.5 GiB", "x") == 3 * 1024**3 // 2
    assert bytes_of("800m", "x") == 800_000_000
    assert bytes_of("1e9", "x") == 10**9
    assert bytes_of(17, "x") == 17
    for text in ("5iB", "0.2", "six GB"):
        with pytest.raises(InputError, match=f"x must be an amount of memory .* got '{text}'"):
            bytes_of(text, "x")


def test_a_full_disk_is_named(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left on device; let TMPDIR name"):
        fuse([mlp(12, 20, 4), mlp(12, 20, 16, 4)], VECTORS, memory_limit="4GB")


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fuse([mlp(12, 20, 4), mlp(12, 20, 16, 4)], VECTORS, memory_limit="4GB")
    assert not list(tmp_path.iterdir())


def test_activations_grow_with_inputs_and_widths():
    one, two = (clafusion.trace(mlp(12, n, 4), VECTORS) for n in (20, 40))
    assert activation_bytes(one, 100) == 10 * activation_bytes(one, 10)
    # The hidden values and what the activation makes of them are there at a time.
    assert activation_bytes(one, 1) == 2 * 20 * 4
    assert activation_bytes(two, 1) == 2 * 40 * 4


def test_plans_that_a_solver_fills_count():
    models = [clafusion.trace(mlp(12, n, 4), VECTORS) for n in (4200, 4100)]
    needed = {
        solver: needed_memory(models, 10, FusionConfig(matching={"solver": solver})).stages
        for solver in ("auto", "sinkhorn", "exact")
    }
    for stage, more in (("profile", 0), ("match", 4 * 4100**2), ("calibrate", 4 * 4100**2)):
        assert needed["auto"][stage] == needed["exact"][stage] + more
    assert needed["auto"] == needed["sinkhorn"]
    narrow = [clafusion.trace(mlp(12, 40, 4), VECTORS)] * 2
    for solver, more in (("auto", 0), ("sinkhorn", 4 * 40**2)):
        config = FusionConfig(matching={"solver": solver})
        least = needed_memory(narrow, 10, FusionConfig(matching={"solver": "exact"}))
        found = needed_memory(narrow, 10, config)
        assert found.stages["match"] == least.stages["match"] + more


def test_an_estimate_says_time_memory_and_size(tmp_path):
    given, inputs = files("language models", tmp_path)
    found = clafusion.estimate(given, inputs, calibration="repair")
    assert set(found.seconds) == {"trace", "profile", "match", "calibrate", "assess"}
    assert found.total_seconds > 0
    size = sum(one.nbytes for one in made("Language(3, 32)", 0).parameters())
    assert size <= found.result_bytes <= 2 * size
    assert found.memory.peak > found.memory.held > 0
    assert "about" in str(found)
    assert "GB" in str(found) or "MB" in str(found)
    fuse(given, inputs, calibration="repair", memory_limit=2 * found.memory.peak)
