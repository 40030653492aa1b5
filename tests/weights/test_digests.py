"""Digests of what a model is besides its weights."""

import torch
import torch.fx
from torch import nn

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


def test_graphs_of_fx_have_digests_too():
    def model(factor):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, x):
                return factor * self.linear(x)

        return structure_digest(torch.fx.symbolic_trace(Net()))

    assert model(2.0) == model(2.0)
    assert model(2.0) != model(3.0)


def test_what_the_state_dict_lacks_and_what_is_tied_enter():
    def model(value=1.0, share=False):
        made = networks.mlp(5, 5, 5)
        made.register_buffer("hidden", torch.full((3,), value), persistent=False)
        if share:
            made[2].weight = nn.Parameter(made[0].weight.detach())
        return structure_digest(made)

    assert model() == model()
    assert len({model(), model(2.0), model(share=True)}) == 3
