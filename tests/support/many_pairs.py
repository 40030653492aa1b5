"""Models whose pairs are fused in one run, and what must come of it."""

import json

import torch

from clafusion import Profiling
from tests.support import networks

FACTORY = """
from torch import nn

def mlp(*widths):
    layers = []
    for into, out in zip(widths, widths[1:]):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
"""

WIDTHS = {
    "a": (12, 9, 5),
    "b": (12, 9, 8, 5),
    "c": (12, 7, 8, 6, 5),
    "d": (12, 9, 8, 7, 6, 5),
}

DATA = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
SETTINGS = {"profiling": Profiling(alignment_samples=100, matching_rows=200)}


def modules():
    return {name: networks.mlp(*widths, seed=i) for i, (name, widths) in enumerate(WIDTHS.items())}


def assert_as_fused(results, expected):
    results = list(results)
    assert [(one.first, one.second) for one in results] == list(expected)
    for one in results:
        assert one.error is None
        wanted = expected[one.first, one.second]
        state = wanted.model.state_dict()
        assert one.state.keys() == state.keys()
        assert all(torch.equal(one.state[name], tensor) for name, tensor in state.items())
        assert one.alignment.deep_to_shallow == wanted.alignment.deep_to_shallow
        assert (one.alignment.cost == wanted.alignment.cost).all()
        assert one.alignment.total_cost == wanted.alignment.total_cost
        assert one.deep == (one.first, one.second)[wanted.aligned.pairs[0].deep]
        assert one.layer_weights == wanted.layer_weights
        assert torch.equal(one.model(DATA), wanted.model(DATA))


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
