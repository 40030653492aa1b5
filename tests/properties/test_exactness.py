"""What must hold exactly when networks are fused, whatever they are."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import (
    Matching,
    Sinkhorn,
    Zip,
    align_layers,
    correspond,
    fuse,
    inserted_model,
    profile,
    trace,
)
from clafusion.alignment.compatibility import allowed_pairs, skip_costs
from clafusion.execution.call import call_model
from tests.support import networks
from tests.support.architectures import ARCHITECTURES
from tests.support.assertions import assert_same_function, assert_same_logits
from tests.support.data import CALIBRATIONS, IMAGES, MODELS, PAIRS, VECTORS
from tests.support.results import moved_parent
from tests.support.transformers import transformer


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_itself_is_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    fused = fuse([model, model], inputs, calibration=calibration).model
    assert_same_function(fused, model, inputs, calibration)
    assert_same_function(
        fused, model, 3 * torch.randn_like(inputs), calibration
    )  # also where no data was


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_permuted_copy_is_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    permuted = networks.permuted_copy(model, inputs)
    assert_same_function(permuted, model, inputs)
    for order in ((model, permuted), (permuted, model)):
        fused = fuse(order, inputs, calibration=calibration).model
        assert_same_function(fused, model, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("factor", [2, pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (networks.mlp(12, 10, 7, 5), VECTORS),
        (networks.vgg(1, 1, widths=(6, 5), norm=False), IMAGES),
        (networks.vgg(1, 1, widths=(6, 5)), IMAGES),
    ],
)
def test_a_widened_copy_fuses_to_the_original_function(model, inputs, factor, calibration):
    wide = networks.widened(model, factor)
    assert_same_function(wide, model, inputs)
    for order in ((model, wide), (wide, model)):
        fused = fuse(order, inputs, calibration=calibration).model
        assert_same_function(fused, model, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_deepened_copy_fuses_to_the_original_function(count, calibration):
    model = networks.mlp(12, 20, 17, 5)
    deepened = networks.with_identity_layers(model, 4, count)
    assert_same_function(deepened, model, VECTORS)
    for order in ((model, deepened), (deepened, model)):
        result = fuse(order, VECTORS, calibration=calibration)
        assert_same_function(result.model, model, VECTORS, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_ends_of_the_weight_are_the_parents(name, calibration):
    deep, shallow, inputs = PAIRS[name]
    for first, second in ((deep, shallow), (shallow, deep)):
        at_zero = fuse([first, second], inputs, [1.0, 0.0], calibration=calibration)
        at_one = fuse([first, second], inputs, [0.0, 1.0], calibration=calibration)
        assert_same_function(at_zero.model, first, inputs, calibration)
        assert_same_function(at_one.model, second, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("kind", ["ViT", "GPT-2", "ConvNeXt"])
def test_model_classes_that_nobody_here_wrote_fuse_across_depths(kind, calibration):
    deep, shallow = transformer(kind, 3, seed=0), transformer(kind, 2, seed=1)
    inputs = torch.randint(0, 50, (60, 9)) if kind == "GPT-2" else IMAGES[:60]
    for weights, parent in (((1, 0), deep), ((0, 1), shallow)):
        fused = fuse([deep, shallow], inputs, weights, calibration=calibration).model
        assert_same_logits(fused, parent, inputs)


@pytest.mark.parametrize("name", PAIRS)
def test_the_order_of_the_models_does_not_matter(name):
    deep, shallow, inputs = PAIRS[name]
    one = fuse([deep, shallow], inputs, [0.7, 0.3]).model
    other = fuse([shallow, deep], inputs, [0.3, 0.7]).model
    assert_same_function(one, other, inputs)


@pytest.mark.parametrize(
    ("deep", "shallow", "inputs"),
    [
        *PAIRS.values(),
        (networks.mlp(12, 9, 8, 7, 6, 5), networks.mlp(12, 30, 20, 5, seed=1), VECTORS),
        (networks.vgg(3, 2), networks.vgg(1, 1, widths=(5, 20), seed=1), IMAGES),
        (
            networks.resnet(3, 3, shortcut="conv"),
            networks.resnet(2, 1, widths=(10, 20), shortcut="conv", seed=1),
            IMAGES,
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inserted_layers_change_nothing_whatever_the_alignment(deep, shallow, inputs, seed):
    graphs = [trace(one, inputs) for one in (deep, shallow)]
    allowed = allowed_pairs(graphs[0].layers, graphs[1].layers)
    alignment = align_layers(
        np.where(allowed, 0.0, np.inf),
        skip=skip_costs(graphs[0].layers),
        mode="random",
        seed=seed,
    )
    deepened = inserted_model(deep, correspond(*graphs, alignment.deep_to_shallow)).eval()
    far = 10 * torch.randn_like(inputs)
    assert_same_function(deepened, shallow, inputs)
    assert_same_function(deepened, shallow, far)
    assert len(trace(deepened, inputs).layers) == len(graphs[0].layers)


@pytest.mark.parametrize("solver", ["assignment", "exact", Sinkhorn(epsilon=2e-3)], ids=str)
@pytest.mark.parametrize("cost", ["correlation", "euclidean"])
def test_every_solver_and_cost_recovers_a_permutation(solver, cost):
    model = networks.mlp(12, 20, 17, 5)
    graph = trace(model, VECTORS)
    flipped = networks.permuted(
        model, graph, [torch.arange(one.size).flip(0) for one in graph.groups]
    )
    matching = Matching(cost=cost, solver=solver)
    plans = moved_parent(fuse([model, flipped], VECTORS, matching=matching)).plans
    assert plans
    for plan in plans:
        assert torch.equal(plan.dense().argmax(1), torch.arange(plan.shape[0]).flip(0))


def test_the_same_seed_gives_the_same_bytes_on_any_thread_count():
    deep, shallow, inputs = PAIRS["resnet, padded"]
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            clafusion.set_num_threads(count)
            states.append(fuse([deep, shallow], inputs, seed=5).model.state_dict())
    finally:
        torch.set_num_threads(threads)
        clafusion.set_num_threads(0)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name


def test_the_inputs_are_left_alone():
    deep, shallow, inputs = PAIRS["vgg, BatchNorm"]
    deep, shallow = copy.deepcopy(deep).train(), copy.deepcopy(shallow)
    before = [copy.deepcopy(one.state_dict()) for one in (deep, shallow)]
    result = fuse([deep, shallow], inputs)
    for one, state in zip((deep, shallow), before, strict=True):
        assert all(torch.equal(one.state_dict()[name], state[name]) for name in state)
    assert deep.training
    assert result.model.training
    assert not shallow.training


class Gated(nn.Module):
    """One layer writes two values that are multiplied: each channel stands in two places of it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(12, width), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        one, other = self.both(torch.relu(self.first(x))).chunk(2, -1)
        return self.head(torch.nn.functional.silu(one) * other)


class FusedAttention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(6, width), nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v
        return self.head(x.mean(1))


class BatchSecond(nn.Module):
    """Inside, the batch is the second axis."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("family", [Gated, FusedAttention, BatchSecond])
def test_channels_that_stand_in_several_places_of_a_layer_move_together(family, calibration):
    models = [networks.randomise(family(), seed) for seed in range(2)]
    data = VECTORS[:120] if family is Gated else torch.randn(120, 7, 6)
    result = fuse(models, data, [0.0, 1.0], calibration=calibration)
    torch.testing.assert_close(
        networks.output(result.model, data), networks.output(models[1], data), rtol=1e-4, atol=1e-4
    )
    if calibration != "least_squares":
        zipped = fuse(
            models,
            data,
            [1.0, 0.0],
            calibration=calibration,
            matching=Matching(solver=Zip(budget=0)),
        )
        torch.testing.assert_close(
            networks.output(zipped.model, data),
            networks.output(models[0], data),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    "name",
    [
        "RNN",
        "LSTM, two layers",
        "GRU, bidirectional",
        "nn.LSTMCell, unrolled",
        "Channels sorted",
        "Largest channel's index returned",
        "Feature norm returned beside the logits",
    ],
)
@pytest.mark.filterwarnings("ignore::clafusion.errors.PinnedWarning")  # of the sorted channels
def test_layers_that_put_out_several_tensors_or_one_number_are_fused(name):
    model, example = ARCHITECTURES[name].build()
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, *example.shape[1:], generator=draw)
    permuted = networks.permuted_copy(model, example)
    fused = fuse([model, permuted], inputs, calibration="none").model
    for one, other in zip(outputs_of(fused, inputs), outputs_of(model, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def outputs_of(model, inputs):
    with torch.no_grad():
        return call_model(model, (inputs,))


def test_an_attention_with_the_positions_first_is_compared_input_by_input():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(72, 5)).eval()
    inputs = torch.randn(50, 6, 12, generator=torch.Generator().manual_seed(0))
    profiled = profile(model, inputs)
    assert {tuple(one.shape) for one in profiled.grams} == {(50, 50)}
    assert_same_function(fuse([model, copy.deepcopy(model)], inputs).model, model, inputs, "repair")
