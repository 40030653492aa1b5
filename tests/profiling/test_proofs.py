"""A graph that was proved with random weights, in another run, is proved with its own only."""

import pytest
import torch
from torch import nn

import clafusion
from clafusion import GraphVerificationError, fuse_pairs
from clafusion.profiling.proofs import ProofsOnDisk
from clafusion.tracing import trace as trace_module
from clafusion.tracing import verify
from clafusion.tracing.known_proofs import proof_key
from clafusion.tracing.trace_cache import TraceCache
from tests.support.attention import TOKENS, Encoder
from tests.support.networks import mlp, randomise

INPUTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self, scale, *widths, seed=0):
        super().__init__()
        self.body = mlp(*widths, seed=seed)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        return self.body(x * self.scale)


@pytest.fixture
def moved(monkeypatch):
    """Which sorts of weights were moved: True for random ones."""
    found = []
    in_float64, in_float32 = verify._Trial._gaps, verify._Trial._own_stay

    def gaps(self, redrawn, several):
        found.append((redrawn, len(several)))
        return in_float64(self, redrawn, several)

    def own_stay(self, several):
        stay = in_float32(self, several)
        if stay:  # else they are moved in float64
            found.append((False, len(several)))
        return stay

    monkeypatch.setattr(verify._Trial, "_gaps", gaps)
    monkeypatch.setattr(verify._Trial, "_own_stay", own_stay)
    return found


@pytest.fixture
def new_run(monkeypatch):
    """What forgets the traces of this process."""
    return lambda: monkeypatch.setattr(trace_module, "_cache", TraceCache())


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(lambda seed: mlp(6, 9, 4, seed=seed), INPUTS), (lambda n: randomise(Encoder(2), n), TOKENS)],
    ids=["perceptron", "attention"],
)
def test_another_run_proves_own_weights_only(make, inputs, moved, new_run, tmp_path):
    proofs = ProofsOnDisk(tmp_path / "cache")
    new_run()
    first = clafusion.trace(make(1), inputs, proofs=proofs)
    assert moved == [(True, 2), (False, 1)]
    moved.clear()
    new_run()
    again = clafusion.trace(make(2), inputs, proofs=ProofsOnDisk(tmp_path / "cache"))
    assert moved == [(False, 1)]
    assert [one.size for one in again.groups] == [one.size for one in first.groups]
    assert again.heads == first.heads


def test_other_graphs_inputs_and_buffers_are_proved_anew(moved, new_run, tmp_path):
    proofs = ProofsOnDisk(tmp_path)
    new_run()
    clafusion.trace(Scaled(2.0, 6, 9, 4), INPUTS, proofs=proofs)
    for model, inputs, seed in (
        (Scaled(2.0, 6, 8, 4), INPUTS, 0),
        (Scaled(3.0, 6, 9, 4), INPUTS, 0),
        (Scaled(2.0, 6, 9, 4), INPUTS + 1, 0),
        (Scaled(2.0, 6, 9, 4), INPUTS, 1),
    ):
        moved.clear()
        new_run()
        clafusion.trace(model, inputs, seed=seed, proofs=proofs)
        assert (True, 2) in moved
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff\xfe", None])
def test_what_is_no_whole_entry_counts_as_none(content, moved, new_run, tmp_path):
    proofs = ProofsOnDisk(tmp_path)
    new_run()
    clafusion.trace(mlp(6, 9, 4), INPUTS, proofs=proofs)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    if content is None:
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(content)
    moved.clear()
    new_run()
    clafusion.trace(mlp(6, 9, 4), INPUTS, proofs=proofs)
    assert moved == [(True, 2), (False, 1)]
    assert content is None or entry.read_bytes() == whole


def test_a_forged_proof_does_not_spare_own_weights(new_run):
    class Forged:
        def __contains__(self, key):
            return True

        def add(self, _):
            raise AssertionError("nothing is proved")

    new_run()
    traced = clafusion.trace(mlp(6, 9, 4), INPUTS, verify=False)
    traced.groups[0].axes[1].positions[[0, 1]] = traced.groups[0].axes[1].positions[[1, 0]]
    with pytest.raises(GraphVerificationError):
        verify.verify_graph(traced, (INPUTS,), proofs=Forged())


def test_own_parameters_do_not_enter_the_key():
    traced = [clafusion.trace(mlp(6, 9, 4, seed=n), INPUTS) for n in (1, 2)]
    assert len({proof_key(one, (INPUTS,), 0, {}) for one in traced}) == 1


def test_pairs_keep_proofs_beside_profiles(moved, new_run, tmp_path):
    models = {name: mlp(6, 9, 4, seed=n) for n, name in enumerate("ab")}
    data = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    new_run()
    (one,) = fuse_pairs(models, data, cache_dir=tmp_path, calibration="none")
    assert one.error is None
    assert (True, 2) in moved
    moved.clear()
    new_run()
    others = {name: mlp(6, 9, 4, seed=n) for n, name in enumerate("cd", 2)}
    (one,) = fuse_pairs(others, data, cache_dir=tmp_path, calibration="none")
    assert one.error is None
    assert {redrawn for redrawn, _ in moved} == {False}
