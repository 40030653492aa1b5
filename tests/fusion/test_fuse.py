"""What `fuse` takes, gives and refuses."""

import threading
from dataclasses import fields

import pytest
import torch
from torch import nn

from clafusion import (
    Alignment,
    Assessment,
    BatchNorm,
    FusionConfig,
    InputError,
    LeastSquares,
    Matching,
    Merging,
    Profiling,
    Shallower,
    StructureError,
    align,
    correspond,
    fuse,
    inserted_model,
    profile,
    trace,
)
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.data import IMAGES, PAIRS, VECTORS
from tests.support.networks import output


def test_unequal_depth_and_width_fuse_to_the_deep_architecture():
    deep = networks.vgg(3, 2, widths=(8, 12))
    shallow = networks.vgg(1, 1, widths=(6, 20), seed=1)
    result = fuse([shallow, deep], IMAGES)
    assert list(result.model.state_dict()) == list(deep.state_dict())
    for name, tensor in result.model.state_dict().items():
        assert tensor.shape == deep.state_dict()[name].shape
        assert torch.isfinite(tensor).all()
    loss = result.model.train()(IMAGES).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in result.model.parameters())
    assert result.aligned.reference == 1
    assert [one.is_identity for one in result.parents] == [False, True]
    assert [one.name for one in result.parents] == ["models[0]", "models[1]"]


def test_resetting_batchnorm_takes_the_statistics_of_the_data():
    model = networks.resnet(1, 1)
    fused = fuse([model, model], IMAGES, calibration="batchnorm", assessment="none").model
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
    for calibration in ("batchnorm", "none", "repair", "least_squares"):
        fused = fuse(
            [deep, shallow], data, example_inputs={"image": IMAGES}, calibration=calibration
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
    fused = fuse([model, model], IMAGES, calibration="least_squares").model
    assert_same_function(fused, model, IMAGES, "least_squares")
    mixed = fuse([model, other], IMAGES, calibration=LeastSquares(anchor=0.0)).model
    averaged = fuse([model, other], IMAGES, calibration="none").model
    # The convolution that two read is regressed by itself, without the norm behind it.
    for name in ("norm", "even"):
        assert torch.equal(getattr(mixed, name).weight, getattr(averaged, name).weight)


def test_data_may_be_a_tensor_a_list_or_a_loader():
    deep, shallow, inputs = PAIRS["mlp"]
    labels = torch.zeros(len(inputs))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=64
    )
    shuffled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=64, shuffle=True
    )
    expected = fuse([deep, shallow], inputs).model
    for data in ([inputs[:100], inputs[100:]], [(inputs, labels)], loader):
        fused = fuse([deep, shallow], data).model
        # REPAIR corrects batch by batch, so other batches give slightly other factors.
        difference = (output(fused, inputs) - output(expected, inputs)).abs().max()
        assert difference < 0.2 * output(expected, inputs).abs().max()
    fuse([deep, shallow], shuffled)


# --- refusals ------------------------------------------------------------------------------------


def test_different_inputs_and_outputs_are_refused():
    with pytest.raises(InputError, match=r"models\[1\]: the model does not run"):
        fuse([networks.mlp(12, 9, 5), networks.mlp(13, 9, 5)], VECTORS)
    with pytest.raises(StructureError, match=r"different outputs: models\[0\] \('batch', 5\)"):
        fuse([networks.mlp(12, 9, 5), networks.mlp(12, 9, 6)], VECTORS)
    with pytest.raises(StructureError, match=r"into one output$"):  # nothing about classes
        fuse([networks.mlp(12, 9, 1), networks.mlp(12, 9, 6)], VECTORS)


def test_different_structures_are_refused_by_layer():
    with pytest.raises(StructureError, match=r"layer '2' of models\[0\] has no partner"):
        fuse(
            [
                networks.mlp(12, 9, 9, 5, activation=nn.Tanh),
                networks.mlp(12, 9, 5, activation=nn.Tanh),
            ],
            VECTORS,
        )
    with pytest.raises(StructureError, match="no counterpart of its structure"):
        fuse([networks.mlp(12, 9, 9, 5), networks.mlp(12, 9, 5, activation=nn.GELU)], VECTORS)

    def net(first, second):
        layers = [nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), first(), nn.Linear(9, 9), second()]
        return nn.Sequential(*layers, nn.Linear(9, 5))

    with pytest.raises(
        StructureError, match=r"'2' of models\[1\] could only match '4' of models\[0\]"
    ):
        fuse([net(nn.Tanh, nn.Sigmoid), net(nn.Sigmoid, nn.Tanh)], VECTORS)


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
        fuse([networks.mlp(12, 9, 5), networks.mlp(12, 8, 5)], data)


def lock_kept(model):
    model.lock = threading.Lock()
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.Module.double, r"models\[1\]: .* with parameters of torch.float64"),
        (nn.DataParallel, "wrapped in DataParallel: give its .module"),
        (torch.jit.script, "compiled by torch.jit"),
        (lock_kept, r"cannot be copied .* Take off what no copy can be made of"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_cannot_be_traced_are_refused(change, message):
    model = networks.mlp(12, 9, 5)
    other = change(networks.mlp(12, 8, 5))
    with pytest.raises(InputError, match=message):
        fuse([model, other], VECTORS)
    if change is lock_kept:
        with pytest.raises(InputError, match=message):
            fuse([model, other], VECTORS, device="cpu")


def test_what_inference_mode_would_make_untrainable_is_refused():
    models = [networks.mlp(12, 9, 9, 5), networks.mlp(12, 9, 5, seed=1)]
    pair = [trace(model, VECTORS) for model in models]
    correspondence = correspond(*pair, (0, -1, 1))
    with torch.inference_mode():
        with pytest.raises(InputError, match="cannot be trained"):
            fuse(models, VECTORS)
        deepened = inserted_model(models[0], correspondence)
        made_here = networks.mlp(12, 9, 5)
    deepened(VECTORS).sum().backward()
    assert all(one.grad is not None for one in deepened.parameters())
    with pytest.raises(InputError, match=r"models\[1\]: parameter '0.weight' was made in"):
        fuse([models[0], made_here], VECTORS)


def test_bad_weights_are_refused_by_name():
    broken = networks.mlp(12, 9, 5)
    broken[2].weight.data[1, 3] = torch.nan
    with pytest.raises(InputError, match=r"models\[1\]: parameter '2.weight' holds 1 NaN"):
        fuse([networks.mlp(12, 9, 5), broken], VECTORS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": [-0.5, 1.5]}, r"weights\[0\] must be a number of at least 0; got -0.5"),
        ({"weights": "half"}, "weights must be a list of numbers; got 'half'"),
        ({"weights": [0.5, True]}, r"weights\[1\] must be a number of at least 0; got True"),
        ({"alignment": {"cost": "distance"}}, r"alignment\.cost must be one of 'cka'"),
        ({"alignment": {"mode": "segment"}}, r"alignment\.mode must be one of 'layer'"),
        ({"alignment": {"pin_ends": 1}}, r"alignment\.pin_ends must be True or False; got 1"),
        ({"matching": {"cost": "weight"}}, r"matching\.cost must be one of .*; got 'weight'"),
        ({"matching": {"solver": "magic"}}, r"matching\.solver must be one of .*; got 'magic'"),
        ({"calibration": "finetune"}, "calibration must be one of .*; got 'finetune'"),
        ({"profiling": {"alignment_samples": 1}}, r"profiling\.alignment_samples must be a whole"),
        ({"profiling": {"matching_rows": 2.5}}, r"profiling\.matching_rows must be a whole"),
        ({"profiling": {"inputs": True}}, r"profiling\.inputs must be a whole number"),
        (
            {"matching": {"solver": {"name": "sinkhorn", "epsilon": 0.0}}},
            r"matching\.solver\.epsilon must be a positive number; got 0.0",
        ),
        (
            {"matching": {"solver": {"name": "sinkhorn", "epsilon": True}}},
            r"matching\.solver\.epsilon must be a positive number; got True",
        ),
        (
            {"calibration": {"name": "least_squares", "anchor": True}},
            r"calibration\.anchor must be 'auto' or in \[0, 1\]; got True",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(given, message):
    with pytest.raises(InputError, match=f"^{message}"):
        fuse([networks.mlp(12, 9, 5), networks.mlp(12, 9, 5)], VECTORS, **given)


def test_too_many_channels_are_refused_with_the_memory_they_would_take():
    wide = networks.mlp(12, 10_001, 5)
    with pytest.raises(InputError, match=r"10001 channels; matching them would take about 1\.6 GB"):
        fuse([wide, wide], VECTORS, verify=False)


def test_a_dead_layer_is_refused_by_name():
    dead = networks.mlp(12, 9, 8, 5)
    dead[2].weight.data.zero_()
    with pytest.raises(InputError, match=r"layer '2' of models\[0\] puts out the same"):
        fuse([dead, networks.mlp(12, 9, 5)], VECTORS)
    with pytest.raises(InputError, match=r"layer '2' of models\['dead'\] puts out the same"):
        fuse({"deep": networks.mlp(12, 9, 9, 9, 5), "dead": dead}, VECTORS)


def test_no_module_is_refused():
    with pytest.raises(InputError, match=r"models\[0\] must be a torch\.nn\.Module"):
        fuse(["model.pt", networks.mlp(12, 9, 5)], VECTORS)


OTHERS = {
    "profiling": Profiling(matching_rows=300),
    "alignment": Alignment(cost="index"),
    "target": Shallower(),
    "matching": Matching(cost="euclidean"),
    "merging": Merging(layer_weights="sensitivity"),
    "calibration": BatchNorm(),
    "assessment": Assessment(outputs="values"),
    "combine": "logits",
    "verify": False,
    "seed": 3,
}


def test_every_field_of_the_configuration_is_an_argument():
    apart = {"outputs", "shared"}  # which other options do not go with: see tests/shared_trunk
    assert list(OTHERS) == [one.name for one in fields(FusionConfig) if one.name not in apart]
    models = [networks.mlp(12, 9, 8, 5), networks.mlp(12, 8, 5, seed=1)]
    assert fuse(models, VECTORS).config == FusionConfig()
    assert fuse(models, VECTORS, **OTHERS).config == FusionConfig(**OTHERS)
    config = FusionConfig(calibration="none", seed=4)
    for name, value in OTHERS.items():
        made = fuse(models, VECTORS, config=config, **{name: value}).config
        assert made == FusionConfig(**{"calibration": "none", "seed": 4, name: value}), name


@pytest.mark.parametrize("function", [fuse, align, profile])
def test_unknown_arguments_are_refused_with_a_hint(function):
    model = networks.mlp(12, 9, 5)
    models = model if function is profile else [model, model]
    for given, message in [
        ({"calibratoin": "none"}, "'calibratoin' is no option; did you mean 'calibration'?"),
        ({"epsilon": 0.1}, "'epsilon' is no option of its own; it is matching.solver.epsilon"),
        ({"config": {"seed": 1}}, "config must be a FusionConfig; got dict"),
    ]:
        with pytest.raises(InputError) as caught:
            function(models, VECTORS, **given)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("device", ["nowhere", "mps:7", 5.5])
def test_a_device_that_cannot_be_used_is_refused_with_the_reason(device):
    model = networks.mlp(12, 9, 5)
    for call in (
        lambda: fuse([model, model], VECTORS, device=device),
        lambda: align([model, model], VECTORS, device=device),
        lambda: profile(model, VECTORS, device=device),
    ):
        with pytest.raises(InputError, match=f"device {device!r} cannot be used here: "):
            call()


def test_too_few_samples_are_refused():
    model = networks.mlp(12, 9, 5)
    for count in (1, 2):
        with pytest.raises(InputError, match=f"data has {count} sample\\(s\\), of which nothing"):
            fuse([model, model], VECTORS[:count])


@pytest.mark.parametrize("sizes", [(256, 1), (1,) * 70, (5, 1, 5)])
def test_resetting_batchnorm_takes_rows_that_come_alone(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    data = list(torch.randn(sum(sizes), 4).split(list(sizes)))
    fused = fuse([model, model], data, calibration="batchnorm").model
    assert torch.isfinite(fused(data[0])).all()


def test_inputs_of_one_number_each():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(30, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.table(x).relu())

    tokens = torch.randint(0, 30, (60,))
    assert fuse([Tokens(), Tokens()], tokens).model(tokens).shape == (60, 3)


def test_weights_beyond_half_precision_are_refused():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(30, 6), nn.ReLU(), nn.Linear(6, 5)) for _ in range(2)]
    with torch.no_grad():
        models[1][2].weight *= 1e6
    models = [models[0].half(), models[1].bfloat16()]
    with pytest.raises(InputError, match="beyond the numbers that float16 holds"):
        fuse(models, torch.randint(0, 30, (60,)), calibration="none", assessment="none")
