"""What REPAIR does in one pass is what the network's own operations do one after the other."""

# ruff: noqa: ARG005  (every end takes the same arguments)

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import trace
from clafusion.calibration.epilogues import epilogues
from clafusion.execution.walk import Walk
from tests.support.networks import randomise, resnet, vgg

IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SCALE, SHIFT = 1.5, -0.25  # of every channel


class Net(nn.Module):
    """Two convolutions whose ends are up to a function."""

    def __init__(self, end, norm=nn.BatchNorm2d):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=norm is nn.Identity), norm(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 3, padding=1), norm(6)
        self.head, self.end = nn.Linear(6, 4), end

    def forward(self, x):
        x = F.relu(self.norm(self.enter(x)))
        x = self.end(self, x, self.inner(x))
        return self.head(x.mean((2, 3)))


ENDS = {
    "relu": lambda self, x, y: F.relu(self.inner_norm(y)),
    "in place": lambda self, x, y: F.relu_(self.inner_norm(y)),
    "relu6": lambda self, x, y: F.relu6(self.inner_norm(y)),
    "hardtanh": lambda self, x, y: F.hardtanh(self.inner_norm(y), -0.5, 0.5),
    "bounded above": lambda self, x, y: F.hardtanh(self.inner_norm(y), -math.inf, 0.5),
    "gelu": lambda self, x, y: F.gelu(self.inner_norm(y)),
    "sum": lambda self, x, y: self.inner_norm(y) + x,
    "sum, relu": lambda self, x, y: F.relu(x + self.inner_norm(y)),
    "sum in place, relu": lambda self, x, y: self.inner_norm(y).add_(x).relu_(),
    "sum into the other": lambda self, x, y: x.clone().add_(self.inner_norm(y)),
    "twice": lambda self, x, y: (lambda z: z + z)(self.inner_norm(y)),
    "two readers": lambda self, x, y: (lambda z: F.relu(z) * torch.sigmoid(z))(self.inner_norm(y)),
    "read again": lambda self, x, y: F.relu(self.inner_norm(y)) + y,
    "a view": lambda self, x, y: F.relu(self.inner_norm(y.flatten(2).unflatten(2, (8, 8)))) + y,
    "subtracted": lambda self, x, y: F.relu(torch.sub(self.inner_norm(y), x, alpha=2.0)),
}


def step_by_step(graph, inputs):
    """Run every operation, and rescale what calibration points put out."""
    points = {one.node for layer in graph.layers for one in layer.calibration_points}

    def rescaled(node, value):
        return value * SCALE + SHIFT if node.name in points else value

    return graph.run((inputs,), replace=rescaled)


def at_once(graph, inputs):
    points = [one for layer in graph.layers for one in layer.calibration_points]
    order = [one.name for one in graph.module.graph.nodes]
    points.sort(key=lambda one: order.index(one.node))
    steps = epilogues(graph, graph.state(), points)
    walk = Walk(graph, (inputs,), graph.state(), {one.source for one in steps.values()})
    for one in steps.values():
        size = (len(one.point.groups),)
        one.run(walk, torch.full(size, SCALE).double(), torch.full(size, SHIFT).double())
    return walk.finish(), steps


def assert_same(graph, inputs):
    with torch.no_grad():
        wanted = step_by_step(graph, inputs)
        found, steps = at_once(graph, inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return steps


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize("end", ENDS)
def test_one_pass_does_what_the_operations_do(end, norm):
    model = randomise(Net(ENDS[end], norm)).eval()
    assert_same(trace(model, IMAGES), IMAGES)


@pytest.mark.parametrize(
    "build", [lambda: resnet(2, 2, shortcut="conv"), lambda: resnet(2, 1), lambda: vgg(2, 1)]
)
def test_networks_of_many_layers(build):
    steps = assert_same(trace(build(), IMAGES), IMAGES)
    assert all(one.factor is not None for one in steps.values() if one.point.affine != one.source)


def test_a_block_ends_in_one_pass():
    model = randomise(Net(ENDS["sum, relu"])).eval()
    *_, inner, head = assert_same(trace(model, IMAGES), IMAGES).values()
    assert len(inner.skipped) == 3  # the norm, the sum, the ReLU
    assert (inner.low, inner.high, inner.in_place) == (0.0, math.inf, True)
    assert head.skipped == ()
    assert head.last == head.source == head.point.node


def test_moments_behind_a_norm_follow_from_those_before_it():
    model = randomise(Net(ENDS["relu"])).eval()
    graph = trace(model, IMAGES)
    steps = assert_same(graph, IMAGES)
    values = {}
    graph.run((IMAGES,), replace=lambda node, value: values.setdefault(node.name, value))
    one = next(one for one in steps.values() if one.factor is not None)

    def moments(node):
        flat = values[node].double().movedim(1, -1).flatten(0, -2)
        return flat.mean(0), flat.std(0, correction=0)

    for found, wanted in zip(
        one.moments(moments(one.source)), moments(one.point.node), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_norm_that_takes_its_inputs_statistics_stays_an_operation():
    model = randomise(Net(ENDS["relu"], lambda size: nn.BatchNorm2d(size, momentum=None)))
    model.inner_norm = nn.BatchNorm2d(6, track_running_stats=False)
    graph = trace(model.eval(), IMAGES)
    steps = assert_same(graph, IMAGES)
    assert all(one.source == node for node, one in steps.items() if one.factor is None)


@pytest.mark.parametrize(
    "bias", [lambda self: 2.0 * self.bias, lambda self: self.bias + self.shift]
)
def test_a_norm_whose_bias_is_computed_stays_an_operation(bias):
    class Computed(nn.BatchNorm2d):
        def __init__(self, size):
            super().__init__(size)
            self.shift = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, bias(self))

    model = randomise(Net(ENDS["relu"], Computed)).eval()
    steps = assert_same(trace(model, IMAGES), IMAGES)
    assert all(one.factor is None for one in steps.values())


@pytest.mark.parametrize("end", ["sum, relu", "hardtanh", "bounded above"])
def test_float64_takes_pytorchs_operations(end):
    model = randomise(Net(ENDS[end])).double().eval()
    assert_same(trace(model, IMAGES.double()), IMAGES.double())
