"""The simulated federation: shares, what clients get back, and a round."""

import pytest
import torch
from torch import nn

from benchmarks.experiments.federated import federated, matched, own_accuracy, shares

LABELS = torch.arange(600) % 10


def test_shares_part_the_images_and_are_unequal():
    found = shares(LABELS, 6, 0.3, seed=1)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(600))
    counts = torch.stack([torch.bincount(LABELS[one], minlength=10) for one in found])
    assert bool((counts.max(0).values > 20).all())  # equal shares would have 10 of each class
    again = shares(LABELS, 6, 0.3, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_client_is_scored_by_its_own_classes_and_gets_what_is_alike():
    class Always(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), self.label), 10).float() + 0 * x

    test = torch.zeros(600, 1), LABELS
    assert own_accuracy(Always(3), test, torch.tensor([3, 3, 3, 4])) == pytest.approx(0.75)
    candidates = [Always(1), Always(3)]
    assert matched(Always(3), candidates, test[0]) is candidates[1]


def test_a_round_gives_every_client_its_network():
    torch.manual_seed(0)
    labels = torch.arange(400) % 10
    images = torch.randn(10, 12)[labels] + 0.3 * torch.randn(400, 12)

    def perceptron(*widths):
        layers = []
        for before, after in zip((12, *widths), widths, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    families = {"narrow": lambda: perceptron(16, 14, 12), "wide": lambda: perceptron(24, 20, 16)}
    settings = {
        "clients": 4,
        "rounds": 1,
        "epochs": 2,
        "first_epochs": 3,
        "distilled_epochs": 1,
        "concentration": 5.0,
        "public": 100,
        "blocks": 2,
        "candidates": 2,
    }
    found = federated(
        "numbers",
        families,
        (images, labels),
        (images, labels),
        settings,
        lambda parameters: torch.optim.AdamW(parameters, 1e-2),
        seed=0,
    )
    before = found["numbers: clients before the first round, own classes"]
    assert found["numbers: clients after round 1, own classes"] > before
    assert found["numbers: reassembled in round 1, all classes"] > 0.1
    assert found.keys() >= {
        "numbers: clients of kind narrow, fused",
        "numbers: clients side by side",
        "numbers: clients without a server, own classes",
    }
