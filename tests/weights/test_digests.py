"""Digests of what a model is besides its weights."""

import torch

from clafusion.weights.digests import structure_digest
from tests.support import networks


def test_equal_models_have_equal_structure_digests():
    def model(function, factor=2.0):
        made = networks.mlp(12, 9, 5)
        made.function, made.names, made.own = function, {"x", "y", "z"}, made[0]
        made.settings = {"factor": factor, "mask": torch.ones(2)}
        made.register_forward_hook(lambda *_: None)
        return made

    def times(number):
        return lambda x: number * x

    one = structure_digest(model(times(2)))
    assert one == structure_digest(model(times(2)))
    assert one != structure_digest(model(times(3)))
    assert one != structure_digest(model(times(2), 2.5))
    assert one != structure_digest(model(torch.relu))
