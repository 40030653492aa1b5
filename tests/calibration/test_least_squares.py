"""Regression onto the parents: what must come back exactly, and what it must leave alone."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import (
    Alignment,
    Deeper,
    FusionWarning,
    LeastSquares,
    MergeWeights,
    UnsupportedOpError,
    fuse,
    summary,
    trace,
)
from clafusion.calibration.least_squares import anchored_weights
from clafusion.calibration.least_squares.anchors import ANCHORS, Lean, leans, nearest
from clafusion.calibration.least_squares.equations import NormalEquations
from clafusion.calibration.least_squares.rows import by_position, chosen_positions, rows_for
from clafusion.merging.combination import Combination
from clafusion.merging.mean import weighted_mean
from tests.support.assertions import assert_same_function
from tests.support.networks import Block, Matrices, mlp, output, resnet

VECTORS = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chain(*widths, seed=0, inplace=False):
    torch.manual_seed(seed)
    layers = []
    for into, out in pairwise((8, *widths)):
        layers += [nn.Linear(into, out), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 4)).eval()


class Residual(nn.Module):
    """A block on a stream that is the raw input's, whose channels may not move."""

    def __init__(self, width, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("anchor", [0.0, 0.8, "auto"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_operations_in_place_spoil_no_goal(weight, anchor):
    models = [chain(16, 12, inplace=True), chain(16, 12, seed=1, inplace=True)]
    calibration = LeastSquares(anchor=anchor)
    fused = fuse(models, VECTORS, [1 - weight, weight], calibration=calibration).model
    # Weight 0 is the first network, which gives the target; 1 the second one, in its channels.
    assert_same_function(fused, models[int(weight)], VECTORS, "least_squares")


def test_a_copy_in_place_is_itself():
    model = chain(16, 12, inplace=True)
    fused = fuse([model, copy.deepcopy(model)], VECTORS, calibration="least_squares").model
    assert_same_function(fused, model, VECTORS, "least_squares")


@pytest.mark.parametrize("seed", range(6))
def test_layers_may_be_merged_at_any_place(seed):
    deep, shallow = chain(10, 12, 9), chain(11, 9, seed=1)
    result = fuse(
        [deep, shallow],
        VECTORS,
        target="shallower",
        calibration="least_squares",
        alignment=Alignment(mode="random"),
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
    weights = [1 - weight, weight]
    fused = fuse([deep, shallow], VECTORS, weights, calibration="least_squares").model
    assert_same_function(fused, (deep, shallow)[int(weight)], VECTORS, "least_squares")


def test_outputs_that_cannot_be_regressed_are_not_anchored():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 3, 1)).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[2].weight.neg_()
        second[2].bias.neg_()
    inputs = torch.randn(40, 2, 4, 4, 4)
    fused = fuse([first, second], inputs, calibration=LeastSquares(anchor=0.8)).model
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
        fuse(models, VECTORS, calibration=calibration).model
        for calibration in ("none", LeastSquares(anchor=0.0))
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
            model = fuse([deep, shallow], IMAGES, calibration="least_squares").model
            found.append(b"".join(one.detach().numpy().tobytes() for one in model.parameters()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_batches_take_turns_through_all_positions():
    drawn = chosen_positions(12, 40, 8, torch.Generator().manual_seed(0))  # 5 of each input
    batches = [drawn.of(batch) for batch in range(12)]
    assert all(len(one) == len(one.unique()) == 5 for one in batches)
    assert torch.cat(batches).bincount().tolist() == [5] * 12


def test_auto_takes_what_comes_nearer_to_the_mean():
    deep, shallow = mlp(8, 12, 10, 4), mlp(8, 12, 4, seed=1)
    goal = (output(deep, VECTORS) + output(shallow, VECTORS)) / 2
    results = [
        fuse([deep, shallow], VECTORS, calibration=LeastSquares(anchor=anchor))
        for anchor in ("auto", *ANCHORS)
    ]
    auto, *distances = (
        float((output(one.model, VECTORS) - goal).square().sum()) for one in results
    )
    assert auto == pytest.approx(min(distances), rel=1e-4)
    assert results[0].anchor == ANCHORS[distances.index(min(distances))]


def distance_to_mean(result, models):
    goal = sum(output(one, VECTORS) for one in models) / len(models)
    return float((output(result.model, VECTORS) - goal).square().sum())


def test_the_interior_may_lean_towards_the_parent_that_does_not_give_the_structure():
    deep, shallow = mlp(8, 12, 10, 4), mlp(8, 12, 4, seed=1)
    with torch.no_grad():
        deep[-1].weight *= 0.01  # its outputs say next to nothing
    models = {"deep": deep, "shallow": shallow}
    one, any_of_them = (
        fuse(models, VECTORS, calibration=LeastSquares(anchor=1, toward=toward))
        for toward in ("largest", "any")
    )
    assert (one.anchor, one.toward) == (1.0, "deep")
    assert (any_of_them.anchor, any_of_them.toward) == (1.0, "shallow")
    far = distance_to_mean(any_of_them, models.values())
    assert far < 0.1 * distance_to_mean(one, models.values())
    assert any_of_them.to_dict()["toward"] == "shallow"
    assert "towards 'shallow'" in str(summary(any_of_them))
    assert "towards" not in str(summary(one))


def test_one_parents_interior_alone_is_taken_where_it_comes_clearly_nearer():
    deep, shallow = mlp(8, 12, 10, 4), mlp(8, 12, 4, seed=1)
    with torch.no_grad():
        deep[-1].weight *= 0.01  # its outputs say next to nothing
    models = {"deep": deep, "shallow": shallow}
    largest, auto, anywhere = (
        fuse(models, VECTORS, calibration=LeastSquares(toward=toward))
        for toward in ("largest", "auto", "any")
    )
    assert largest.toward == "deep"
    assert (auto.anchor, auto.toward) == (anywhere.anchor, anywhere.toward) == (1.0, "shallow")
    far = distance_to_mean(auto, models.values())
    assert far < 0.2 * distance_to_mean(largest, models.values())
    assert "anchor 1, towards 'shallow'" in str(summary(auto))


def test_where_inputs_are_few_no_parents_interior_is_tried_alone():
    deep, shallow = mlp(8, 12, 10, 4), mlp(8, 12, 4, seed=1)
    with torch.no_grad():
        deep[-1].weight *= 0.01
    few = VECTORS[:60]
    found = fuse([deep, shallow], few, calibration=LeastSquares(), assessment="none")
    assert found.anchor in ANCHORS


def test_auto_tries_more_where_the_interior_may_lean_towards_any():
    problem = with_weights([MergeWeights(0.25), MergeWeights(0.75), MergeWeights(0.0)])
    tried = leans(problem, LeastSquares())
    assert tried == leans(problem, LeastSquares(toward="any"))
    assert tried[: len(ANCHORS)] == leans(problem, LeastSquares(toward="largest"))
    assert {one.toward for one in tried} == {0, 1}  # who has no weight is no aim
    assert {one.anchor for one in tried} == {*ANCHORS, 1.0}
    assert leans(problem, LeastSquares(anchor=0, toward="any")) == (Lean(0, 1),)
    sure = with_weights([MergeWeights(1.0), MergeWeights(0.0)])
    assert leans(sure, LeastSquares(toward="any")) == leans(sure, LeastSquares())


def test_a_lean_must_come_clearly_nearer_where_parents_learnt_different_things():
    problem = with_weights([MergeWeights(0.5), MergeWeights(0.5)])
    apart = replace(problem, combination=Combination("probabilities"))
    tried = leans(problem, LeastSquares(toward="largest"))
    for far, taken, where_apart in (
        ([1.0, 0.9], 0.9, 0.0),
        ([1.0, 0.7], 0.9, 0.9),
        ([1.0, 1.1], 0.0, 0.0),
        ([0.0, 0.0], 0.0, 0.0),
    ):
        assert nearest(problem, "auto", tried, far).anchor == taken
        assert nearest(apart, "auto", tried, far).anchor == where_apart
    without_none = leans(apart, LeastSquares(anchor=0.5, toward="any"))
    assert nearest(apart, "any", without_none, [1.0, 0.9]) == Lean(0.5, 1)


def test_one_parent_alone_must_come_clearly_nearer_unless_asked_for():
    problem = with_weights([MergeWeights(0.5), MergeWeights(0.5)])
    tried = leans(problem, LeastSquares())
    assert [(one.anchor, one.toward) for one in tried] == [(0, 0), (0.9, 0), (1, 0), (1, 1)]
    for far, asked, taken in (
        ([1.0, 0.9, 0.8, 0.75], "auto", Lean(0.9, 0)),  # 0.75 is above 0.8 of 0.9
        ([1.0, 0.9, 0.8, 0.75], "any", Lean(1.0, 1)),
        ([1.0, 0.9, 0.8, 0.7], "auto", Lean(1.0, 1)),
        ([0.9, 1.0, 0.6, 0.7], "auto", Lean(1.0, 0)),
    ):
        assert nearest(problem, asked, tried, far) == taken


def with_weights(weights, reference=0):
    """Return a problem of copies of one network, of which only the weights matter."""
    problem = fuse([chain(6)] * len(weights), VECTORS, calibration="none", verify=False).problem
    parents = [replace(one, weights=of) for one, of in zip(problem.parents, weights, strict=True)]
    return replace(problem, parents=tuple(parents), reference=reference)


def anchored(problem, anchor):
    (lean,) = leans(problem, LeastSquares(anchor=anchor))
    return anchored_weights(problem, lean)


def test_the_interior_is_anchored_at_the_largest_weight():
    def inside(weights, anchor):
        problem = with_weights([*map(MergeWeights, weights)], reference=len(weights) - 1)
        return tuple(one.overall for one in anchored(problem, anchor))

    assert inside((0.5, 0.5), 0.0) == (0.5, 0.5)
    assert inside((0.5, 0.5), 1.0) == (0.0, 1.0)  # of equals to the reference
    assert inside((0.6, 0.4), 1.0) == (1.0, 0.0)
    assert inside((0.25, 0.75), 0.5) == (0.125, 0.875)
    assert inside((0.25, 0.5, 0.25), 0.5) == (0.125, 0.75, 0.125)
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.3, 0.4), (1 / 3,) * 3):
        for anchor in (0.0, 0.3, 1.0):
            found = inside(weights, anchor)
            assert sum(found) == pytest.approx(1.0, abs=1e-15)
            assert min(found) >= 0.0
            if max(weights) == 1.0:
                assert found == weights


def test_of_equals_the_reference_is_the_anchor_wherever_it_stands():
    for reference in range(3):
        problem = with_weights([MergeWeights(1 / 3)] * 3, reference)
        found = [one.overall for one in anchored(problem, 1.0)]
        assert found == pytest.approx([float(i == reference) for i in range(3)], abs=1e-15)


def test_a_layers_own_weights_are_anchored_at_the_same_network_as_the_outputs():
    own = MergeWeights(0.6, {"a": 0.25, "b": 1.0}), MergeWeights(0.4, {"a": 0.75, "b": 0.0})
    first, second = anchored(with_weights(own), 0.5)
    assert (first.overall, first.of("a"), first.of("b")) == (0.8, 0.625, 1.0)
    assert (second.overall, second.of("a"), second.of("b")) == pytest.approx((0.2, 0.375, 0.0))


def test_the_weighted_mean_counts_weights_of_their_sum():
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


def test_a_model_of_one_batch_size_gets_whole_batches():
    class Fixed(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.inner = mlp(*widths)

        def forward(self, x):
            return self.inner(x.reshape(3, -1))

    data = list(torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).split(3))
    for samples in (10, 2000):
        calibration = LeastSquares(samples=samples)
        models = [Fixed(12, 9, 8, 5).eval(), Fixed(12, 9, 5).eval()]
        fused = fuse(models, data, calibration=calibration).model
        assert torch.isfinite(fused(data[0])).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.Identity()])
def test_what_flows_past_a_block_is_taken_behind_the_pooling_before_it(pooling, seed):
    def network(blocks, seed):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), pooling]
        layers += [Block(8, 8, 1, "pad") for _ in range(blocks)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        return nn.Sequential(*layers).eval()

    deep, shallow = network(3, 0), network(1, 1)
    alignment = Alignment(mode="random")
    settings = {"alignment": alignment, "seed": seed, "calibration": "least_squares"}
    for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
        fused = fuse([deep, shallow], IMAGES, weights, **settings).model
        assert_same_function(fused, parent, IMAGES, "least_squares")
    assert torch.isfinite(output(fuse([deep, shallow], IMAGES, **settings).model, IMAGES)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_regressed_with_sums_in_single(dtype):
    data = VECTORS[:40].to(dtype)  # few rows: the sums are all but singular
    models = [mlp(8, 64, 64, 4).to(dtype), mlp(8, 64, 4, seed=1).to(dtype)]
    fused = fuse(models, data, calibration="least_squares").model
    assert torch.isfinite(output(fused, data)).all()


def _norm_behind(width, seed, unused=0, depthwise=False):
    """Convolutions with a norm behind the activation; some channels that no layer reads."""
    torch.manual_seed(seed)
    last = unused + width
    between = [nn.Conv1d(last, last, 3, padding=1, groups=last), nn.ReLU()] if depthwise else []
    model = nn.Sequential(
        nn.Conv1d(2, last, 8, padding=4),
        nn.ReLU(),
        *between,
        nn.BatchNorm1d(last),
        nn.MaxPool1d(2),
        nn.Conv1d(last, last, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm1d(last),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(last, 5),
    )
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.uniform_(0.1, 0.5)
                norm.running_var.uniform_(0.2, 2.0)
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
        used = torch.randperm(last)[:width]
        idle = torch.ones(last, dtype=torch.bool)
        idle[used] = False
        for layer in model:
            is_reader = isinstance(layer, (nn.Conv1d, nn.Linear)) and layer.weight.size(1) == last
            if is_reader and unused:
                layer.weight[:, idle] = 0.0
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*alone has weight:clafusion.WidthWarning")
@pytest.mark.parametrize("depthwise", [False, True])
def test_channels_are_chosen_across_a_norm_behind_the_activation(depthwise):
    """The narrow result keeps exactly those channels of the wide network that count."""
    wide = _norm_behind(6, 0, unused=18, depthwise=depthwise)
    narrow = _norm_behind(6, 1, depthwise=depthwise)
    data = torch.randn(300, 2, 20, generator=torch.Generator().manual_seed(2))
    found = fuse(
        [wide, narrow], data, [1, 0], calibration="least_squares", target=Deeper(width="narrow")
    ).model
    assert sum(one.numel() for one in found.parameters()) == sum(
        one.numel() for one in narrow.parameters()
    )
    with torch.no_grad():
        wanted, fused = wide(data), found(data)
    assert (fused - wanted).square().sum() < 1e-4 * (wanted - wanted.mean(0)).square().sum()


# --- products with a matrix ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["as they are", "turned", "linear of turned"])
def test_products_with_a_matrix_are_regressed_as_linear_layers_are(way):
    """A network of ``addmm`` and ``matmul`` beside the same one of linear layers."""
    sequences = torch.randn(150, 5, 12, generator=torch.Generator().manual_seed(3))
    converters = {"as they are": lambda one: one, "turned": Turned, "linear of turned": OfTurned}
    for calibration in ("none", "repair", "least_squares"):
        found = []
        for convert in (converters[way], as_linear):
            models = [convert(Matrices(2, 9)), convert(Matrices(1, 11, seed=1))]
            fused = fuse(models, sequences, calibration=calibration).model
            found.append(output(fused, sequences))
        bound = 2e-4 * float(found[1].abs().max())
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=bound)


class Products(nn.Module):
    """Products with matrices, written in one of several ways; each with a bias."""

    def __init__(self, *widths, way, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.way, pairs = way, list(pairwise(widths))
        self.weights = nn.ParameterList(torch.randn(*one, generator=draw) / 3 for one in pairs)
        self.biases = nn.ParameterList(torch.randn(one[1], generator=draw) for one in pairs)
        self.eval()

    def product(self, x, weight, bias):
        if self.way == "bias apart":
            return x @ weight + bias
        if self.way == "bias before":
            return bias + F.linear(x, weight.T)
        if self.way == "from the left":
            return (weight.T @ x.transpose(1, 2) + bias[:, None]).transpose(1, 2)
        if self.way == "scaled":
            return torch.addmm(bias, x.flatten(0, 1), weight, beta=2).view(*x.shape[:2], -1)
        return F.linear(x, weight.T, bias)

    def forward(self, x):
        first, *others = zip(self.weights, self.biases, strict=True)
        x = torch.relu(self.product(x, *first))
        for weight, bias in others:
            x = x + torch.relu(self.product(x, weight, bias))
        return x.mean((1, 2))[:, None]


def fused_products(way, calibration):
    sequences = torch.randn(200, 5, 6, generator=torch.Generator().manual_seed(3))
    models = [Products(6, 12, 12, 12, way=way), Products(6, 12, 12, 12, way=way, seed=1)]
    result = fuse(models, sequences, calibration=calibration)
    return result, output(result.model, sequences)


@pytest.mark.parametrize("way", ["bias apart", "bias before"])
@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_a_bias_that_is_added_apart_is_calibrated_as_a_layers_own(way, calibration):
    result, found = fused_products(way, calibration)
    _, wanted = fused_products("one operation", calibration)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert result.averaged == ()


@pytest.mark.parametrize("way", ["from the left", "scaled"])
@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_the_result_names_weights_that_stay_at_the_average(way, calibration):
    result, _ = fused_products(way, calibration)
    assert result.averaged == ("weights.0", "weights.1", "weights.2")
    line = f"averaged     3 weights that {calibration} does not calibrate: weights.0, weights.1"
    assert line in summary(result)
    result, _ = fused_products(way, "none")
    assert result.averaged == ()


class Turned(nn.Module):
    """The same function by products with transposed matrices ``(outputs, inputs)``."""

    def __init__(self, model):
        super().__init__()
        turned = [[one.detach().T.clone() for one in ones] for ones in (model.up, model.down)]
        self.stem, self.head = nn.Parameter(model.stem.detach().T.clone()), model.head
        self.up, self.down = map(nn.ParameterList, turned)
        self.up_bias = model.up_bias
        self.eval()

    def product(self, x, weight, bias=None):
        if bias is None:
            return x @ weight.T
        folded = torch.addmm(bias, x.reshape(-1, x.size(-1)), weight.t())
        return folded.view(*x.shape[:-1], -1)

    def forward(self, x):
        x = torch.relu(self.product(x, self.stem))
        for up, bias, down in zip(self.up, self.up_bias, self.down, strict=True):
            x = x + self.product(torch.relu(self.product(x, up, bias)), down)
        return self.head(x)


class OfTurned(nn.Module):
    """The same function by linear layers whose weights are transposed matrices."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        x = torch.relu(F.linear(x, self.model.stem.t()))
        blocks = zip(self.model.up, self.model.up_bias, self.model.down, strict=True)
        for up, bias, down in blocks:
            x = x + F.linear(torch.relu(F.linear(x, up.mT, bias)), down.transpose(0, 1))
        return self.model.head(x)


def as_linear(model):
    """The same function, with linear layers."""

    class Linears(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = linear(model.stem), copy.deepcopy(model.head)
            self.up = nn.ModuleList(map(linear, model.up, model.up_bias))
            self.down = nn.ModuleList(map(linear, model.down))

        def forward(self, x):
            x = torch.relu(self.stem(x))
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(torch.relu(up(x)))
            return self.head(x)

    return Linears().eval()


def linear(weight, bias=None):
    made = nn.Linear(*weight.shape, bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().T.contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def test_a_weight_that_two_layers_share_is_solved_for_neither():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = torch.relu(self.inner(self.embedding(x)))
            return x @ self.embedding.weight.T

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Tied().eval())
    words = torch.randint(0, 20, (200, 6), generator=torch.Generator().manual_seed(0))
    plain, solved = (
        fuse(models, words, calibration=how).model for how in ("none", LeastSquares(anchor=0.0))
    )
    assert torch.equal(plain.embedding.weight, solved.embedding.weight)
    assert not torch.equal(plain.inner.weight, solved.inner.weight)


def test_progress_is_told_in_inputs_as_by_other_stages():
    told = []
    fuse(
        [mlp(8, 9, 7, 4), mlp(8, 6, 4, seed=1)],
        VECTORS,
        calibration="least_squares",
        progress=lambda stage, done: told.append((stage, done)),
    )
    done = [count for stage, count in told if stage == "calibrate"]
    assert done == sorted(done)
    assert done[-1] == len(VECTORS)


# --- little to learn from, and nothing to restore -------------------------------------------------


def test_few_inputs_are_warned_of():
    models = [mlp(8, 9, 7, 4), mlp(8, 6, 4, seed=1)]
    for count in (5, 60):
        with pytest.warns(FusionWarning, match=f"least squares has {count} inputs to learn from"):
            fuse(models, VECTORS[:count])
    with pytest.warns(FusionWarning, match="REPAIR has 5 inputs to learn from"):
        fuse(models, VECTORS[:5], calibration="repair")


@pytest.mark.parametrize(("calibration", "count"), [("least_squares", 100), ("repair", 10)])
@pytest.mark.filterwarnings("error::clafusion.FusionWarning")
@pytest.mark.filterwarnings("ignore::clafusion.AssessmentWarning")
def test_enough_inputs_are_not(calibration, count):
    models = [mlp(8, 9, 7, 4), mlp(8, 6, 4, seed=1)]
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    fuse(models, inputs, calibration=calibration)


@pytest.mark.parametrize("anchor", ["auto", 0.5])
def test_all_weight_on_the_network_that_gives_the_structure_gives_it_back(anchor):
    """Also in half precision, whose roundings a regression would take for an error."""
    for kind in (torch.bfloat16, torch.float32):
        models = [mlp(8, 9, 7, 4).to(kind), mlp(8, 6, 4, seed=1).to(kind)]
        result = fuse(models, VECTORS.to(kind), [1, 0], calibration=LeastSquares(anchor=anchor))
        for name, tensor in models[0].state_dict().items():
            assert torch.equal(result.model.state_dict()[name], tensor)
        assert result.anchor == (0.0 if anchor == "auto" else anchor)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("model", "data"),
    [
        (chain(16, 12), VECTORS),
        (nn.Sequential(Residual(8, 12), Residual(8, 16), nn.Linear(8, 4)).eval(), VECTORS),
        (resnet(2, 1), IMAGES),
    ],
)
def test_a_copy_in_half_precision_is_itself(model, data, kind):
    """Up to one rounding of each weight; what a regression made of roundings was 4e-3 off."""
    model = copy.deepcopy(model).to(kind)
    fused = fuse([model, copy.deepcopy(model)], data.to(kind), calibration="least_squares").model
    for name, wanted in model.state_dict().items():
        found = fused.state_dict()[name]
        if wanted.is_floating_point():
            step = torch.finfo(kind).eps * wanted.float().abs()
            assert bool(((found.float() - wanted.float()).abs() <= step).all()), name


def test_a_start_stays_where_it_leaves_nothing_before_and_after_the_relu():
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).double()
    goal = (x.T @ start.float()).bfloat16()  # known up to its roundings
    for active, stays in ((None, True), (goal.relu(), True), (goal.relu() + goal.abs(), False)):
        equations = NormalEquations(start)
        equations.add(torch.cat([x, torch.empty(2, 500)]), goal, active)
        assert torch.equal(equations.solved(1e-3), start) == stays
    equations = NormalEquations(start)
    equations.add(torch.cat([x, torch.empty(2, 500)]), goal * 1.1, None)
    assert not torch.equal(equations.solved(1e-3), start)


def test_rows_grow_with_the_columns_and_the_penalty_where_they_are_few():
    """With about one row for each column, an interpolation of noise was a hundred times worse."""
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(60, 40, generator=draw), torch.randn(60, 3, generator=draw)
    truth = torch.randn(40, 3, generator=draw).double() / 40**0.5
    errors = []
    for rows in (42, 60):
        equations = NormalEquations(torch.zeros(40, 3, dtype=torch.float64))
        sides = torch.cat([x[:rows].T, torch.empty(3, rows)])
        equations.add(sides, (x[:rows].double() @ truth).float() + 0.3 * noise[:rows], None)
        errors.append(float((equations.solved(1e-3) - truth).square().sum()))
    assert max(errors) < float(truth.square().sum())
    assert rows_for(100, 64, 10_000) == 10_000
    assert rows_for(1000, 64, 10_000) == 64_000
    assert rows_for(100_000, 64, 10_000) == 400_000


def test_positions_that_come_before_inputs_are_those_of_each_input():
    by_input = torch.arange(5 * 4 * 3.0).view(5, 4, 3)  # inputs, positions, channels
    for value in (by_input, by_input.transpose(0, 1), by_input.flatten(0, 1)):
        assert torch.equal(by_position(value, (), 5), by_input)
    assert by_position(by_input, (), 0).shape == (5, 4, 3)  # of a graph: rows stand alone


def test_attention_is_solved_on_batches_of_unlike_size():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        models.append(nn.Sequential(nn.Linear(3, 8), layer, nn.Flatten(), nn.Linear(32, 4)).eval())
    inputs = torch.randn(101, 4, 3)
    gaps = []
    for calibration in ("none", "least_squares"):
        made = fuse(models, list(inputs.split([60, 41])), calibration=calibration).model
        with torch.no_grad():
            wanted = (models[0](inputs) + models[1](inputs)) / 2
            gaps.append((made(inputs) - wanted).square().mean())
    assert gaps[1] < 0.7 * gaps[0]
