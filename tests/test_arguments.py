"""Arguments of another kind are refused at once, by their names, wherever a user gives them."""

import numpy as np
import pytest
import torch

import clafusion
from clafusion import InputError
from clafusion.errors import check_callable
from tests.support.networks import mlp

A, B = mlp(6, 8, 4, seed=1), mlp(6, 8, 8, 4, seed=2)
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABELLED = (X, torch.arange(40) % 4)

FUNCTIONS = {
    "fuse": lambda **given: clafusion.fuse([A, B], X, **given),
    "align": lambda **given: clafusion.align([A, B], X, **given),
    "profile": lambda **given: clafusion.profile(A, X, **given),
    "merge": lambda **given: clafusion.merge(A, [A], **given),
    "reassemble": lambda **given: clafusion.reassemble([A, B], X, **given),
    "fuse_pairs": lambda **given: clafusion.fuse_pairs({"a": A, "b": B}, X, **given),
    "sweep": lambda **given: clafusion.sweep([A, B], X, **given),
    "finetune": lambda **given: clafusion.finetune(A, LABELLED, steps=1, **given),
    "distill": lambda **given: clafusion.distill(A, B, LABELLED, steps=1, **given),
}


@pytest.mark.parametrize("value", [3, "x", [], torch.zeros(2), lambda: None])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_progress_that_cannot_be_called_is_refused_before_anything_runs(
    function, value, monkeypatch
):
    def never(*_more, **_others):
        raise AssertionError("a model ran")

    monkeypatch.setattr(torch.nn.Sequential, "forward", never)
    with pytest.raises(InputError, match=r"^progress must be None or a function of \("):
        FUNCTIONS[function](progress=value)


def test_what_can_be_called_with_the_arguments_is_taken():
    class Counter:
        def __call__(self, stage: str, count: int = 0) -> None:
            """Count."""

    for one in (None, print, Counter(), lambda *_: None):
        check_callable(one, "progress", ("stage", "count"))
    with pytest.raises(InputError, match=r"a function of \(stage, count\); .* takes \(one\)"):
        check_callable(lambda one: one, "progress", ("stage", "count"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clafusion.finetune(A, LABELLED, steps=1, optimizer=lambda: 3), "optimizer must"),
        (lambda: clafusion.finetune(A, LABELLED, steps=1, batch_size=None), "batch_size must be a"),
        (lambda: clafusion.finetune(A, LABELLED, steps=1, mixed_precision=[]), "mixed_precision"),
        (lambda: clafusion.distill(A, B, LABELLED, steps=1, combine=[]), "combine must be one of"),
        (lambda: clafusion.fuse([A, B], X, combine=["logits"]), "combine must be one of"),
        (lambda: clafusion.fuse_pairs({}, X), "models is empty: give at least two"),
        (lambda: clafusion.fuse_pairs({"a": A}, X, out_dir=3), "out_dir must be a path"),
        (lambda: clafusion.fuse_pairs({"a": A}, X, cache_dir=3), "cache_dir must be a path"),
        (lambda: clafusion.save_model(A, "a.safetensors", check=3), r"check must .*\(state\)"),
        (lambda: clafusion.save_model(A, "a.safetensors", metadata=3), "metadata must be a map"),
        (
            lambda: clafusion.save_model(A, "a.safetensors", metadata={"a": 3}),
            r"metadata\['a'\] must be text; got int",
        ),
        (lambda: clafusion.load(A, 3), "weights must be a path"),
        (lambda: clafusion.load("nets.py:make", 3), "weights must be a path"),
        (lambda: clafusion.ModelFile(3, "a.pt"), "factory must be text"),
        (lambda: clafusion.ModelFile("nets.py:make", 3), "path must be a path"),
        (lambda: clafusion.trace(A, X, verify=3), "verify must be True or False"),
        (lambda: clafusion.trace(A, X, seed="x"), "seed must be a whole number"),
        (lambda: clafusion.layer_costs(3, 3), "deep must be a profile"),
        (lambda: clafusion.layer_costs(3, 3, metric=[]), "metric must be one of"),
        (lambda: clafusion.layer_costs(3, 3, names=3), "names must be two names; got int"),
        (lambda: clafusion.verify_graph(3, ()), "traced must be a traced model"),
        (lambda: clafusion.inserted_model(3, 3), "target must be the target's module"),
        (lambda: clafusion.inserted_model(A, 3), "correspondence must be that of a parent"),
        (lambda: clafusion.align_layers(np.zeros((2, 2)), mode=np.zeros(2)), "mode must be one of"),
        (lambda: clafusion.align_layers(np.zeros((2, 2)), pin_first="x"), "pin_first must be True"),
        (lambda: clafusion.align_layers_batch(3), "costs must be a list"),
        (lambda: clafusion.align_layers_batch(np.array(3.0)), "costs must be a list"),
        (lambda: clafusion.align_layers_batch([np.zeros((2, 2))], skips=3), "skips must be a list"),
        (lambda: clafusion.cka(3, []), "grams_a must be a list"),
        (lambda: clafusion.linear_cka(3, []), "layers_a must be a list"),
        (lambda: clafusion.gram(3), "x must be a tensor"),
        (lambda: clafusion.correspond(3, 3, ()), "target must be a traced model"),
        (lambda: clafusion.average(3), "problem must be a clafusion.FusionProblem"),
        (lambda: clafusion.fuse([A, B], np.array(5)), "data is a single number"),
        (lambda: clafusion.fuse([A, B], X.numpy()), r"give torch.from_numpy\(data\)"),
        (lambda: clafusion.fuse([A, B], X.to_sparse()), r"give data.to_dense\(\)"),
        (lambda: clafusion.evaluate([A, B], torch.tensor(1.0), LABELLED[1]), "a single number"),
        (lambda: clafusion.fuse([A, B], X, device=10**30), "device 1000.* cannot be used here"),
        (lambda: clafusion.fuse([A, B], X, vocabulary=np.zeros(3)), "vocabulary must be 'same'"),
        (lambda: clafusion.fuse([A, B], X, preset=np.zeros(3)), "preset must be one of"),
        (lambda: clafusion.fuse([A, B], X, memory_limit="9" * 400), "memory_limit must be an"),
        (lambda: clafusion.fuse_pairs({"a": A}, X, pairs=np.array(5)), "pairs must be 'all' or"),
        (lambda: clafusion.fuse_pairs({"a": A}, X, device="zzz"), "device 'zzz' cannot be used"),
        (lambda: clafusion.sweep([A, B], X, weight=np.array(5)), "weight must be a list"),
        (lambda: clafusion.sweep([A, B], X, seeds=b"ab"), "seeds must be a list"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_layer_map_of_other_networks_is_refused():
    one, other = clafusion.trace(A, X), clafusion.trace(B, X)
    for wrong in (3, (0,), (0, 1, 5), ("a", 1, -1), (0, 1, -2)):
        with pytest.raises(InputError, match="layer_map must be 3 whole numbers"):
            clafusion.correspond(other, one, wrong)


@pytest.mark.parametrize("weights", [3, [1], [1, "a"], [1, -1], np.array(5), [1, float("nan")]])
def test_weights_of_a_naive_average_are_checked(weights):
    result = clafusion.fuse([A, B], X, calibration="none", assessment="none")
    with pytest.raises(InputError, match="weights"):
        clafusion.naive_average(result.problem, weights)
