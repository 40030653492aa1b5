"""What must hold exactly when two networks are fused, and what must be refused."""

import copy
import inspect
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import clafusion
from clafusion import (
    FusionConfig,
    InputError,
    StructureError,
    fuse,
    fuse_many,
    lift,
    profile,
    trace,
)
from clafusion.alignment.dynamic_program import align_layers
from clafusion.correspondence.correspondence import lifting
from clafusion.execution.call import call_model
from tests import networks

IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))

MODELS = {
    "mlp": (lambda seed=0: networks.mlp(12, 20, 17, 9, 5, seed=seed), VECTORS),
    "vgg": (lambda seed=0: networks.vgg(2, 2, norm=False, seed=seed), IMAGES),
    "vgg, BatchNorm": (lambda seed=0: networks.vgg(2, 1, seed=seed), IMAGES),
    "resnet, padded": (lambda seed=0: networks.resnet(2, 2, seed=seed), IMAGES),
    "resnet, 1x1": (lambda seed=0: networks.resnet(1, 2, shortcut="conv", seed=seed), IMAGES),
}
# A deep and a shallow network of equal widths, for which weight 0 and 1 are exact.
PAIRS = {
    "mlp": (networks.mlp(12, 9, 9, 9, 9, 5, seed=1), networks.mlp(12, 9, 9, 5, seed=2), VECTORS),
    "vgg": (networks.vgg(3, 2, norm=False, seed=1), networks.vgg(1, 1, norm=False), IMAGES),
    "vgg, BatchNorm": (networks.vgg(3, 2, seed=1), networks.vgg(2, 1, seed=2), IMAGES),
    "resnet, padded": (networks.resnet(3, 3, seed=1), networks.resnet(1, 2, seed=2), IMAGES),
    "resnet, 1x1": (
        networks.resnet(3, 2, shortcut="conv", seed=1),
        networks.resnet(2, 1, shortcut="conv", seed=2),
        IMAGES,
    ),
}
CALIBRATIONS = ["none", "repair", "least_squares"]


def output(model, inputs):
    with torch.no_grad():
        return model(inputs)


def assert_same_function(model, expected, inputs, calibration="none"):
    """Equal up to float32 rounding, relative to the largest output.

    Least squares rewrites every layer from float32 products, which leaves 1e-5 a layer.
    """
    want = output(expected, inputs)
    bound = 3e-4 if calibration == "least_squares" else 2e-5
    torch.testing.assert_close(
        output(model, inputs), want, rtol=0, atol=bound * float(want.abs().max())
    )


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_itself_is_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    fused = fuse(model, model, inputs, calibration=calibration).model
    assert_same_function(fused, model, inputs, calibration)
    assert_same_function(
        fused, model, 3 * torch.randn_like(inputs), calibration
    )  # also where no data was


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_fused_with_a_permuted_copy_is_itself(name, calibration):
    build, inputs = MODELS[name]
    model = build()
    graph = trace(model, inputs)
    permuted = networks.permuted(model, graph, networks.orders_of(graph))
    assert_same_function(permuted, model, inputs)
    for order in ((model, permuted), (permuted, model)):
        fused = fuse(*order, inputs, calibration=calibration).model
        assert_same_function(fused, model, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("factor", [2, 3])
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
        fused = fuse(*order, inputs, calibration=calibration).model
        assert_same_function(fused, model, inputs, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_deepened_copy_fuses_to_the_original_function(count, calibration):
    model = networks.mlp(12, 20, 17, 5)
    deepened = networks.with_identity_layers(model, 4, count)
    assert_same_function(deepened, model, VECTORS)
    for order in ((model, deepened), (deepened, model)):
        result = fuse(*order, VECTORS, calibration=calibration)
        assert_same_function(result.model, model, VECTORS, calibration)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_ends_of_the_weight_are_the_parents(name, calibration):
    deep, shallow, inputs = PAIRS[name]
    for first, second in ((deep, shallow), (shallow, deep)):
        at_zero = fuse(first, second, inputs, weight=0.0, calibration=calibration)
        at_one = fuse(first, second, inputs, weight=1.0, calibration=calibration)
        assert_same_function(at_zero.model, first, inputs, calibration)
        assert_same_function(at_one.model, second, inputs, calibration)


def transformer(kind: str, layers: int, seed: int) -> nn.Module:
    """Return a small model that nobody here wrote, with random weights."""
    import transformers

    torch.manual_seed(seed)
    if kind == "ViT":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
        return transformers.ViTForImageClassification(config).eval()
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=16,
            n_layer=layers,
            n_head=2,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12],
        depths=[layers, 1],
        num_stages=2,
        patch_size=2,
        num_labels=5,
        layer_scale_init_value=0.5,
    )
    return transformers.ConvNextForImageClassification(config).eval()


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("kind", ["ViT", "GPT-2", "ConvNeXt"])
def test_model_classes_that_nobody_here_wrote_fuse_across_depths(kind, calibration):
    deep, shallow = transformer(kind, 3, seed=0), transformer(kind, 2, seed=1)
    inputs = torch.randint(0, 50, (60, 9)) if kind == "GPT-2" else IMAGES[:60]
    for weight, parent in ((0.0, deep), (1.0, shallow)):
        fused = fuse(deep, shallow, inputs, weight=weight, calibration=calibration).model
        with torch.no_grad():
            found, wanted = fused(inputs).logits, parent(inputs).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", PAIRS)
def test_the_order_of_the_models_does_not_matter(name):
    deep, shallow, inputs = PAIRS[name]
    one = fuse(deep, shallow, inputs, weight=0.3).model
    other = fuse(shallow, deep, inputs, weight=0.7).model
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
def test_a_lifted_model_computes_the_same_whatever_the_alignment(deep, shallow, inputs, seed):
    graphs = [trace(one, inputs) for one in (deep, shallow)]
    allowed = clafusion.correspondence.correspondence.allowed_pairs(*graphs)
    alignment = align_layers(
        np.where(allowed, 0.0, np.inf),
        skip=clafusion.correspondence.correspondence.skip_costs(graphs[0]),
        mode="random",
        seed=seed,
    )
    lifted = lift(deep, lifting(*graphs, alignment.deep_to_shallow)).eval()
    far = 10 * torch.randn_like(inputs)
    assert_same_function(lifted, shallow, inputs)
    assert_same_function(lifted, shallow, far)
    assert len(trace(lifted, inputs).layers) == len(graphs[0].layers)


def test_unequal_depth_and_width_fuse_to_the_deep_architecture():
    deep = networks.vgg(3, 2, widths=(8, 12))
    shallow = networks.vgg(1, 1, widths=(6, 20), seed=1)
    result = fuse(shallow, deep, IMAGES)
    assert list(result.model.state_dict()) == list(deep.state_dict())
    for name, tensor in result.model.state_dict().items():
        assert tensor.shape == deep.state_dict()[name].shape
        assert torch.isfinite(tensor).all()
    loss = result.model.train()(IMAGES).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in result.model.parameters())
    assert not result.pair.deep_is_first


def test_lifting_into_fixed_widths_is_refused():
    deep, shallow = networks.resnet(3, 3), networks.resnet(2, 1, widths=(10, 20))
    result = fuse(deep, shallow, IMAGES)  # the fused model has the deep one's widths
    with pytest.raises(StructureError, match="a width is fixed in the deep module's code"):
        lift(deep, result.lifting)


def test_resetting_batchnorm_takes_the_statistics_of_the_data():
    model = networks.resnet(1, 1)
    fused = fuse(model, model, IMAGES, calibration="batchnorm").model
    seen = {}
    hook = model.stem[0].register_forward_hook(lambda *call: seen.update(out=call[2]))
    output(model, IMAGES)
    hook.remove()
    torch.testing.assert_close(fused.stem[1].running_mean, seen["out"].mean((0, 2, 3)))
    torch.testing.assert_close(fused.stem[1].running_var, seen["out"].var((0, 2, 3)))
    assert not fused.training
    assert not any(module.training for module in fused.modules())


class ByKeyword(nn.Module):
    """Takes its input by keyword only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, image):
        return self.inner(image)


def test_models_that_take_keywords_are_calibrated_by_every_way():
    deep, shallow = ByKeyword(networks.vgg(2, 2)), ByKeyword(networks.vgg(1, 1, seed=1))
    data = [{"image": IMAGES[:48]}, {"image": IMAGES[48:]}]
    for calibration in ("batchnorm", *CALIBRATIONS):
        fused = fuse(
            deep, shallow, data, example_inputs={"image": IMAGES}, calibration=calibration
        ).model
        with torch.no_grad():
            assert torch.isfinite(fused(image=IMAGES)).all()


class ReadTwice(nn.Module):
    """A convolution that a norm and something else read; another pads unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.even = nn.Conv2d(6, 6, 2, padding="same")
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = self.conv(x)
        y = torch.relu(self.norm(y)) + torch.sigmoid(y)
        return self.head(self.even(y).relu().mean((2, 3)))


def test_least_squares_leaves_layers_that_it_cannot_rewrite_alone():
    model, other = (networks.randomise(ReadTwice(), seed) for seed in (0, 1))
    fused = fuse(model, model, IMAGES, calibration="least_squares").model
    assert_same_function(fused, model, IMAGES, "least_squares")
    mixed = fuse(model, other, IMAGES, calibration="least_squares", lean=0.0).model
    averaged = fuse(model, other, IMAGES, calibration="none").model
    # The convolution that two read is regressed by itself, without the norm behind it.
    for name in ("norm", "even"):
        assert torch.equal(getattr(mixed, name).weight, getattr(averaged, name).weight)


def test_a_lifted_model_tells_its_true_widths():
    deep, shallow = networks.vgg(2, 2), networks.vgg(1, 1, widths=(5, 20), seed=1)
    result = fuse(deep, shallow, IMAGES)
    for module in lift(deep, result.lifting).modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


@pytest.mark.parametrize("solver", ["assignment", "exact", "sinkhorn"])
@pytest.mark.parametrize("channel_cost", ["correlation", "euclidean"])
def test_every_solver_and_cost_recovers_a_permutation(solver, channel_cost):
    model = networks.mlp(12, 20, 17, 5)
    graph = trace(model, VECTORS)
    flipped = networks.permuted(
        model, graph, [torch.arange(one.size).flip(0) for one in graph.groups]
    )
    result = fuse(model, flipped, VECTORS, solver=solver, channel_cost=channel_cost, epsilon=2e-3)
    for plan in result.plans:
        assert torch.equal(plan.argmax(1), torch.arange(len(plan)).flip(0))


def test_the_same_seed_gives_the_same_bytes_on_any_thread_count():
    deep, shallow, inputs = PAIRS["resnet, padded"]
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            clafusion.set_num_threads(count)
            states.append(fuse(deep, shallow, inputs, seed=5).model.state_dict())
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
    result = fuse(deep, shallow, inputs)
    for one, state in zip((deep, shallow), before, strict=True):
        assert all(torch.equal(one.state_dict()[name], state[name]) for name in state)
    assert deep.training
    assert result.model.training
    assert not shallow.training


def test_data_may_be_a_tensor_a_list_or_a_loader():
    deep, shallow, inputs = PAIRS["mlp"]
    labels = torch.zeros(len(inputs))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=64
    )
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=64, shuffle=True
    )
    expected = fuse(deep, shallow, inputs).model
    for data in ([inputs[:100], inputs[100:]], [(inputs, labels)], loader):
        fused = fuse(deep, shallow, data).model
        # REPAIR corrects batch by batch, so other batches give slightly other factors.
        difference = (output(fused, inputs) - output(expected, inputs)).abs().max()
        assert difference < 0.2 * output(expected, inputs).abs().max()
    fuse(deep, shallow, shuffled)


# --- refusals ------------------------------------------------------------------------------------


def test_different_inputs_and_outputs_are_refused():
    with pytest.raises(InputError, match="second model: the model does not run"):
        fuse(networks.mlp(12, 9, 5), networks.mlp(13, 9, 5), VECTORS)
    with pytest.raises(StructureError, match=r"different outputs: \('batch', 5\)"):
        fuse(networks.mlp(12, 9, 5), networks.mlp(12, 9, 6), VECTORS)


def test_different_structures_are_refused_by_unit():
    with pytest.raises(StructureError, match="layer '2' of the deeper model has no partner"):
        fuse(
            networks.mlp(12, 9, 9, 5, activation=nn.Tanh),
            networks.mlp(12, 9, 5, activation=nn.Tanh),
            VECTORS,
        )
    with pytest.raises(StructureError, match="no counterpart of its structure"):
        fuse(networks.mlp(12, 9, 9, 5), networks.mlp(12, 9, 5, activation=nn.GELU), VECTORS)

    def net(first, second):
        layers = [nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), first(), nn.Linear(9, 9), second()]
        return nn.Sequential(*layers, nn.Linear(9, 5))

    with pytest.raises(StructureError, match="'2' of the shallower model could only match '4'"):
        fuse(net(nn.Tanh, nn.Sigmoid), net(nn.Sigmoid, nn.Tanh), VECTORS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (VECTORS[:, :11], "does not run on the example inputs"),
        (VECTORS.double(), r"inputs \(3, 12\) torch.float64, with parameters of torch.float32"),
        (VECTORS.long(), r"inputs \(3, 12\) torch.int64, with parameters of torch.float32"),
        ([VECTORS, VECTORS[:, :11]], r"batch 1 has shape \(400, 11\)"),
        ([VECTORS, VECTORS.double()], r"batch 1 has dtype torch.float64"),
        ([VECTORS, VECTORS * torch.nan], "batch 1 holds 4800 NaN or infinite"),
        (VECTORS[:0], "data is empty"),
        ([], "data is empty"),
        (iter([VECTORS]), "can be read only once"),
        (17, "data must be a tensor"),
        (["a"], "a batch of data must be a tensor"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        fuse(networks.mlp(12, 9, 5), networks.mlp(12, 8, 5), data)


def weights_computed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.Module.double, "second model: .* with parameters of torch.float64"),
        (nn.DataParallel, "wrapped in DataParallel: give its .module"),
        (torch.jit.script, "compiled by torch.jit"),
        (weights_computed, r"cannot be copied .* Take off what computes a weight"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_cannot_be_traced_are_refused(change, message):
    model = networks.mlp(12, 9, 5)
    other = change(networks.mlp(12, 8, 5))
    with pytest.raises(InputError, match=message):
        fuse(model, other, VECTORS)
    if change is weights_computed:
        with pytest.raises(InputError, match=message):
            fuse(model, other, VECTORS, device="cpu")


def test_what_inference_mode_would_make_untrainable_is_refused():
    models = [networks.mlp(12, 9, 9, 5), networks.mlp(12, 9, 5, seed=1)]
    pair = [trace(model, VECTORS) for model in models]
    plan = lifting(*pair, (0, -1, 1))
    with torch.inference_mode():
        with pytest.raises(InputError, match="cannot be trained"):
            fuse(*models, VECTORS)
        lifted = lift(models[0], plan)
        made_here = networks.mlp(12, 9, 5)
    lifted(VECTORS).sum().backward()
    assert all(one.grad is not None for one in lifted.parameters())
    with pytest.raises(InputError, match=r"second model: parameter '0.weight' was made in"):
        fuse(models[0], made_here, VECTORS)


def test_bad_weights_are_refused_by_name():
    broken = networks.mlp(12, 9, 5)
    broken[2].weight.data[1, 3] = torch.nan
    with pytest.raises(InputError, match=r"second model: parameter '2.weight' holds 1 NaN"):
        fuse(networks.mlp(12, 9, 5), broken, VECTORS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weight", 1.5),
        ("weight", "half"),
        ("layer_cost", "distance"),
        ("alignment", "segment"),
        ("channel_cost", "weights"),
        ("solver", "magic"),
        ("calibration", "finetune"),
        ("alignment_samples", 1),
        ("matching_rows", 2.5),
        ("epsilon", 0.0),
        ("epsilon", True),
        ("weight", True),
        ("lean", True),
        ("profile_inputs", True),
        ("pin_ends", 1),
    ],
)
def test_bad_settings_are_refused_by_name(setting, value):
    with pytest.raises(InputError, match=setting):
        fuse(networks.mlp(12, 9, 5), networks.mlp(12, 9, 5), VECTORS, **{setting: value})


def test_too_many_channels_are_refused_with_the_memory_they_would_take():
    wide = networks.mlp(12, 10_001, 5)
    with pytest.raises(InputError, match=r"10001 channels; matching them would take about 1\.6 GB"):
        fuse(wide, wide, VECTORS, verify=False)


def test_a_dead_unit_is_refused_by_name():
    dead = networks.mlp(12, 9, 8, 5)
    dead[2].weight.data.zero_()
    with pytest.raises(InputError, match="layer '2' of the deeper model puts out the same"):
        fuse(dead, networks.mlp(12, 9, 5), VECTORS)


def test_no_module_is_refused():
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        fuse("model.pt", networks.mlp(12, 9, 5), VECTORS)


@pytest.mark.parametrize("function", [fuse, fuse_many])
def test_every_setting_is_an_argument_with_the_same_default(function):
    arguments = inspect.signature(function).parameters
    for field in fields(FusionConfig):
        assert arguments[field.name].default == field.default, field.name


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


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("family", [Gated, FusedAttention, BatchSecond])
def test_channels_that_stand_in_several_places_of_a_layer_move_together(family, calibration):
    models = [networks.randomise(family(), seed) for seed in range(2)]
    data = VECTORS[:120] if family is Gated else torch.randn(120, 7, 6)
    result = fuse(*models, data, weight=1.0, calibration=calibration)
    torch.testing.assert_close(
        networks.output(result.model, data), networks.output(models[1], data), rtol=1e-4, atol=1e-4
    )
    if calibration != "least_squares":
        zipped = fuse(
            *models, data, weight=0.0, calibration=calibration, solver="zip", zip_budget=0
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
def test_units_that_put_out_several_tensors_or_one_number_are_fused(name):
    model, example = ARCHITECTURES[name].build()
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, *example.shape[1:], generator=draw)
    graph = trace(model, example)
    permuted = networks.permuted(model, graph, networks.orders_of(graph))
    fused = fuse(model, permuted, inputs, calibration="none").model
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
    assert_same_function(fuse(model, copy.deepcopy(model), inputs).model, model, inputs, "repair")
