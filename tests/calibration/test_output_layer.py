"""The last layer, refitted to the mean of the parents' probabilities."""

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import Assessment, FusionWarning, fuse
from clafusion.calibration.output_layer import refitted_weights
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.data import MODELS, PAIRS

X = torch.randn(900, 6, generator=torch.Generator().manual_seed(0))


def specialists():
    """Return networks that are sure of their answers, and of different ones."""
    models = [networks.mlp(6, 20, 18, 5, seed=1), networks.mlp(6, 24, 5, seed=2)]
    return [networks.confident(one, X) for one in models]


def mixture(models, x=X):
    with torch.no_grad():
        return torch.stack([one(x).double().softmax(-1) for one in models]).mean(0)


def divergence(model, models, x=X):
    goal = mixture(models, x)
    with torch.no_grad():
        return float((goal * (goal.log() - model(x).double().log_softmax(-1))).sum(-1).mean())


def test_the_weights_are_the_minimum_of_the_equation():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 4, generator=generator).double() @ torch.diag(
        torch.tensor([9, 1, 1, 0.1]).double()
    )
    goal = torch.randn(80, 3, generator=generator).double().log_softmax(-1)
    start = torch.randn(4, 3, generator=generator).double()
    found = refitted_weights(x, goal, start, 0.01).numpy()
    tau = 1 / 16
    penalty = 0.01 * (1 + 100 * 4 / 80) * float(x.square().mean())  # 4 inputs, 80 rows

    def softmax(z):
        powers = np.exp(z - z.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def slope(weights):
        apart = softmax(x.numpy() @ weights / tau) - softmax(goal.numpy() / tau)
        return x.numpy().T @ apart / len(x) + penalty * (weights - start.numpy())

    assert np.abs(slope(found)).max() < 1e-4 * np.abs(slope(start.numpy())).max()


def test_weights_that_put_out_the_goal_stay():
    x = torch.randn(50, 4, dtype=torch.float64)
    start = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(refitted_weights(x, (x @ start).log_softmax(-1), start, 1e-3), start)


def test_the_refit_comes_nearer_to_the_mean_of_probabilities():
    models = specialists()
    plain = fuse(models, X, combine="logits")
    found = fuse(models, X, combine="probabilities")
    goal = mixture(models).argmax(-1)
    with torch.no_grad():
        agreements = [
            float((one.model(X).argmax(-1) == goal).double().mean()) for one in (plain, found)
        ]
    assert agreements[1] > agreements[0] + 0.02
    assert divergence(found.model, models) < 0.8 * divergence(plain.model, models)
    assert found.combination.means == "probabilities"
    changed = {
        name
        for name, one in found.model.state_dict().items()
        if not torch.equal(one, plain.model.state_dict()[name])
    }
    assert changed == {"4.weight", "4.bias"}


@pytest.mark.parametrize("name", ["mlp", "vgg, BatchNorm"])
def test_copies_give_that_network(name):
    build, inputs = MODELS[name]
    model = build()
    for other in (model, networks.permuted_copy(model, inputs)):
        fused = fuse([model, other], inputs, combine="probabilities", assessment="classes").model
        assert_same_function(fused, model, inputs)


@pytest.mark.parametrize("name", ["mlp", "vgg, BatchNorm"])
def test_all_weight_on_a_parent_gives_that_parent(name):
    deep, shallow, inputs = PAIRS[name]
    for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
        found = fuse([deep, shallow], inputs, weights, combine="probabilities")
        assert_same_function(found.model, parent, inputs, "least_squares")


def test_networks_that_end_in_a_softmax_are_refitted_alike():
    models = specialists()
    soft = [nn.Sequential(*one, nn.Softmax(-1)) for one in models]
    plain = fuse(models, X, combine="probabilities").model
    found = fuse(soft, X, combine="probabilities").model
    with torch.no_grad():
        torch.testing.assert_close(found(X), plain(X).softmax(-1), rtol=0, atol=2e-3)


class Segmenter(nn.Module):
    def __init__(self, *widths, seed, scale=3.0):
        super().__init__()
        torch.manual_seed(seed)
        layers = []
        for into, out in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 4, 1)
        with torch.no_grad():
            self.head.weight.mul_(10 * scale)

    def forward(self, x):
        return self.head(self.body(x))


def test_classes_may_be_another_axis():
    models = [Segmenter(8, 7, seed=0).eval(), Segmenter(9, seed=1).eval()]
    images = torch.randn(120, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    given = {"assessment": Assessment("classes", axis=1, held_out=0)}
    plain = fuse(models, images, combine="logits", **given).model
    found = fuse(models, images, combine="probabilities", **given)
    assert found.combination.axis == 1
    flat = [nn.Sequential(one, Last()) for one in (*models, plain, found.model)]
    before, after = (divergence(one, flat[:2], images) for one in flat[2:])
    assert after < 0.8 * before


class Last(nn.Module):
    """Put the classes last."""

    def forward(self, x):
        return x.movedim(1, -1)


class Scaled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 0.5 * self.model(x)


def test_what_cannot_be_refitted_is_told():
    models = [Scaled(one) for one in specialists()]
    with pytest.warns(FusionWarning, match="more than a softmax follows it"):
        found = fuse(models, X, combine="probabilities").model
    plain = fuse(models, X, combine="logits").model
    assert all(map(torch.equal, found.state_dict().values(), plain.state_dict().values()))


def test_any_number_of_threads_gives_the_same_bytes():
    models = specialists()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            clafusion.set_num_threads(threads)
            found.append(fuse(models, X, combine="probabilities").model.state_dict())
    finally:
        torch.set_num_threads(before)
        clafusion.set_num_threads(before)
    assert all(map(torch.equal, *(one.values() for one in found)))
