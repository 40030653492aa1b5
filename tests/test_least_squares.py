"""Regression onto the parents: what must come back exactly, and what it must leave alone."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from clafusion import UnsupportedOpError, fuse, trace
from clafusion.calibration.least_squares import interior_shares, weighted_mean
from clafusion.merging.layer_weights import MergeWeights
from tests.networks import mlp, resnet

VECTORS = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def output(model, inputs):
    with torch.no_grad():
        return model(inputs)


def chain(*widths, seed=0, inplace=False):
    torch.manual_seed(seed)
    layers = []
    for into, out in pairwise((8, *widths)):
        layers += [nn.Linear(into, out), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 4)).eval()


def assert_same(model, expected, inputs, bound=3e-4):
    wanted = output(expected, inputs)
    torch.testing.assert_close(
        output(model, inputs), wanted, rtol=0, atol=bound * float(wanted.abs().max())
    )


class Residual(nn.Module):
    """A block on a stream that is the raw input's, whose channels may not move."""

    def __init__(self, width, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("lean", [0.0, 0.8, "auto"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_operations_in_place_spoil_no_goal(weight, lean):
    models = [chain(16, 12, inplace=True), chain(16, 12, seed=1, inplace=True)]
    fused = fuse(*models, VECTORS, weight=weight, calibration="least_squares", lean=lean).model
    # Weight 0 is the first network, which gives the frame; 1 the second one, in that frame.
    assert_same(fused, models[int(weight)], VECTORS)


def test_a_copy_in_place_is_itself():
    model = chain(16, 12, inplace=True)
    assert_same(
        fuse(model, copy.deepcopy(model), VECTORS, calibration="least_squares").model,
        model,
        VECTORS,
    )


@pytest.mark.parametrize("seed", range(6))
def test_layers_may_be_merged_at_any_place(seed):
    deep, shallow = chain(10, 12, 9), chain(11, 9, seed=1)
    result = fuse(
        deep,
        shallow,
        VECTORS,
        balance="merge",
        calibration="least_squares",
        alignment="random",
        seed=seed,
        verify=False,
    )
    assert torch.isfinite(output(result.model, VECTORS)).all()
    assert len(result.model) == len(shallow)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_stream_whose_channels_may_not_move(weight):
    torch.manual_seed(0)
    deep = nn.Sequential(Residual(8, 12), Residual(8, 12), nn.Linear(8, 4)).eval()
    shallow = nn.Sequential(Residual(8, 12), nn.Linear(8, 4)).eval()
    fused = fuse(deep, shallow, VECTORS, weight=weight, calibration="least_squares").model
    assert_same(fused, (deep, shallow)[int(weight)], VECTORS)


def test_outputs_that_cannot_be_regressed_do_not_lean():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 3, 1)).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[2].weight.neg_()
        second[2].bias.neg_()
    inputs = torch.randn(40, 2, 4, 4, 4)
    fused = fuse(first, second, inputs, calibration="least_squares", lean=0.8).model
    assert float(output(fused, inputs).abs().max()) < 1e-5


def test_a_weight_that_two_layers_share_stays_the_average():
    class Shared(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.last(torch.relu(self.twice(torch.relu(self.twice(x)))))

    models = [Shared(seed).eval() for seed in (0, 1)]
    results = [
        fuse(*models, VECTORS, calibration=calibration, lean=0.0).model
        for calibration in ("none", "least_squares")
    ]
    assert torch.equal(results[0].twice.weight, results[1].twice.weight)
    assert not torch.equal(results[0].last.weight, results[1].last.weight)


def test_bytes_do_not_depend_on_torch_threads():
    deep, shallow = resnet(2, 1), resnet(1, 1, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = fuse(deep, shallow, IMAGES, calibration="least_squares").model
            found.append(b"".join(one.detach().numpy().tobytes() for one in model.parameters()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_auto_takes_what_comes_nearer_to_the_mean():
    deep, shallow = mlp(8, 12, 10, 4), mlp(8, 12, 4, seed=1)
    goal = (output(deep, VECTORS) + output(shallow, VECTORS)) / 2
    results = [
        fuse(deep, shallow, VECTORS, calibration="least_squares", lean=lean)
        for lean in ("auto", 0.0, 0.8)
    ]
    auto, *distances = (
        float((output(one.model, VECTORS) - goal).square().sum()) for one in results
    )
    assert auto == pytest.approx(min(distances), rel=1e-4)
    assert results[0].lean == (0.0, 0.8)[distances.index(min(distances))]


def test_the_interior_leans_to_the_largest_share():
    def inside(shares, lean):
        return tuple(one.overall for one in interior_shares([*map(MergeWeights, shares)], lean))

    assert inside((0.5, 0.5), 0.0) == (0.5, 0.5)
    assert inside((0.5, 0.5), 1.0) == (0.0, 1.0)  # of equals to the last, the frame
    assert inside((0.6, 0.4), 1.0) == (1.0, 0.0)
    assert inside((0.25, 0.75), 0.5) == (0.125, 0.875)
    assert inside((0.25, 0.5, 0.25), 0.5) == (0.125, 0.75, 0.125)
    for shares in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.3, 0.4), (1 / 3,) * 3):
        for lean in (0.0, 0.3, 1.0):
            found = inside(shares, lean)
            assert sum(found) == pytest.approx(1.0, abs=1e-15)
            assert min(found) >= 0.0
            if max(shares) == 1.0:
                assert found == shares


def test_a_layers_own_shares_lean_to_the_same_network_as_the_outputs():
    shares = MergeWeights(0.6, {"a": 0.25, "b": 1.0})
    first, second = interior_shares([shares, shares.rest()], 0.5)
    assert (first.overall, first.of("a"), first.of("b")) == (0.8, 0.625, 1.0)
    assert (second.overall, second.of("a"), second.of("b")) == pytest.approx((0.2, 0.375, 0.0))


def test_the_weighted_mean_counts_shares_of_their_sum():
    values = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])]
    assert float(weighted_mean(values, [0.2, 0.2, 0.2])) == pytest.approx(3.0)
    assert float(weighted_mean(values, [0.0, 0.1, 0.3])) == pytest.approx(5.0)
    assert float(weighted_mean(values, [0.0, 0.5, 0.0])) == 2.0
    assert float(weighted_mean(values, [0.0, 0.0, 0.0])) == 6.0


def test_a_model_that_changes_its_input_is_refused():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            x.view(-1).mul_(0.5)
            return self.layer(x)

    inputs = VECTORS.clone()
    with pytest.raises(UnsupportedOpError, match="changes its input in place"):
        trace(Changes(), inputs, verify=False)
    assert torch.equal(inputs, VECTORS)
