"""Matching by weights: permutations are found again, and each step lessens the sum of squares."""

import pytest
import torch

from clafusion import Matching, correspond, fuse, trace
from clafusion.correspondence.moving import move_state
from clafusion.matching.weight_costs import match_by_weights
from clafusion.transport.plan import TransportPlan
from tests.support.networks import mlp, output, permuted_copy, resnet, vgg

VECTORS = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))

MODELS = {
    "mlp": (lambda seed=0: mlp(12, 20, 15, 5, seed=seed), VECTORS),
    "vgg": (lambda seed=0: vgg(2, 1, seed=seed), IMAGES),
    "resnet": (lambda seed=0: resnet(2, 2, seed=seed), IMAGES),
}


@pytest.mark.parametrize("cost", ["weights", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_fuses_to_the_original(name, cost):
    build, inputs = MODELS[name]
    model = build()
    copies = [permuted_copy(model, inputs, seed) for seed in (3, 4)]
    for models in ([model, copies[0]], [model, *copies]):
        fused = fuse(models, inputs, matching=Matching(cost=cost), calibration="none").model
        torch.testing.assert_close(output(fused, inputs), output(model, inputs), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_no_swap_of_two_channels_lessens_the_sum_of_squares(name):
    build, inputs = MODELS[name]
    graphs = [trace(build(seed), inputs) for seed in (0, 1)]
    correspondence = correspond(*graphs, tuple(range(len(graphs[0].layers))))
    plans = match_by_weights(correspondence)
    target = graphs[0].state()
    weights = [one for one in target if "running" not in one and "num_batches" not in one]

    def distance(some):
        aligned = move_state(correspondence, some)
        return sum(float((aligned[one] - target[one]).double().square().sum()) for one in weights)

    least = distance(plans)
    for one in graphs[0].groups:
        # A group that both reads and writes a weight moves twice: no optimum of single steps.
        squares = {(group_axis.use.parameter, group_axis.direction) for group_axis in one.axes}
        if any((name, "out") in squares for name, way in squares if way == "in"):
            continue
        for i in range(one.size - 1):
            order = torch.arange(one.size)
            order[[i, i + 1]] = order[[i + 1, i]]
            some = list(plans)
            some[one.index] = TransportPlan.from_dense(plans[one.index].dense()[:, order])
            assert distance(some) >= least * (1 - 1e-6)


def test_widths_and_depths_may_differ():
    deep, shallow = mlp(12, 20, 15, 18, 5), mlp(12, 10, 9, 5, seed=1)
    for cost in ("weights", "both"):
        for models in ([deep, shallow], [shallow, deep, mlp(12, 8, 11, 5, seed=2)]):
            model = fuse(models, VECTORS, matching=Matching(cost=cost)).model
            assert torch.isfinite(output(model, VECTORS)).all()
