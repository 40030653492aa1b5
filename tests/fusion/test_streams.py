"""Networks with several streams, and blocks of kinds that a chain of residual blocks lacks."""

import warnings

import pytest
import torch

from clafusion import PinnedWarning, StructureError, WidthWarning, fuse, trace
from clafusion.reports.tables import model_summary
from tests.support import families, networks, vision

FAMILIES = {
    "T5": (lambda: families.t5(3, 3), lambda: families.t5(2, 2, seed=1), families.TEXTS),
    "T5, each deeper somewhere": (
        lambda: families.t5(3, 2),
        lambda: families.t5(2, 3, seed=1),
        families.TEXTS,
    ),
    "BART": (lambda: families.bart(3, 2), lambda: families.bart(2, 1, seed=1), families.TEXTS),
    "Whisper": (
        lambda: families.whisper(3, 3),
        lambda: families.whisper(2, 2, seed=1),
        families.SOUND,
    ),
    "BERT": (lambda: families.bert(4), lambda: families.bert(2, seed=1), families.TEXT),
    "Gemma-2": (lambda: families.gemma2(4), lambda: families.gemma2(2, seed=1), families.TEXT),
    "Phi": (lambda: families.phi(3), lambda: families.phi(2, seed=1), families.TEXT),
    "GPT-NeoX": (lambda: families.gpt_neox(3), lambda: families.gpt_neox(2, seed=1), families.TEXT),
    "Mixtral": (lambda: families.mixtral(3), lambda: families.mixtral(2, seed=1), families.TEXT),
    "Mixture of experts in a list": (
        lambda: families.mixture(3),
        lambda: families.mixture(2, seed=1),
        families.VECTORS,
    ),
    "Llama, more heads share the keys": (
        lambda: families.llama(2, heads=8, keys=2),
        lambda: families.llama(1, heads=4, keys=2, seed=1),
        families.TEXT,
    ),
    "Llama, fewer heads share more keys": (
        lambda: families.llama(2, heads=8, keys=4),
        lambda: families.llama(1, heads=8, keys=2, seed=1),
        families.TEXT,
    ),
    "Mamba": (lambda: families.mamba(2), lambda: families.mamba(1, seed=1), families.SHORT_TEXT),
    "Swin": (lambda: families.swin(4, 2), lambda: families.swin(2, 2, seed=1), families.IMAGES),
    "nn.Transformer": (
        lambda: families.translator(3, 2),
        lambda: families.translator(2, 1, seed=1),
        families.TEXTS,
    ),
    "nn.Transformer, pre-norm": (
        lambda: families.translator(3, 2, norm_first=True),
        lambda: families.translator(1, 1, seed=1, norm_first=True),
        families.TEXTS,
    ),
    "DETR": (
        lambda: families.detector(3, 3),
        lambda: families.detector(2, 2, seed=1),
        families.IMAGES,
    ),
    "LeViT": (lambda: vision.hybrid(2), lambda: vision.hybrid(1, seed=1), vision.IMAGES),
    "BiT": (lambda: vision.standardised(3), lambda: vision.standardised(1, seed=1), vision.IMAGES),
    "NF-ResNet": (lambda: vision.norm_free(3), lambda: vision.norm_free(1, seed=1), vision.IMAGES),
    "NF-ResNet, grouped convolutions": (
        lambda: vision.norm_free(2, groups=2),
        lambda: vision.norm_free(1, seed=1, groups=2),
        vision.IMAGES,
    ),
    "HRNet": (
        lambda: vision.resolutions((2, 1), (1, 3)),
        lambda: vision.resolutions((1, 1), (1, 1), seed=1),
        vision.IMAGES,
    ),
    "HRNet, each deeper somewhere": (
        lambda: vision.resolutions((3, 1), (1, 2)),
        lambda: vision.resolutions((1, 2), (2, 1), seed=1),
        vision.IMAGES,
    ),
    "U-Net": (
        lambda: families.unet((2, 1), 2, (1, 2), residual=False),
        lambda: families.unet((1, 1), 1, (1, 1), seed=1, residual=False),
        families.IMAGES,
    ),
    "U-Net of residual blocks": (
        lambda: families.unet((3, 2), 2, (2, 3)),
        lambda: families.unet((2, 2), 1, (2, 2), seed=1),
        families.IMAGES,
    ),
    "U-Net that adds skips, each deeper somewhere": (
        lambda: families.unet((3, 2), 1, (1, 3), skips="add"),
        lambda: families.unet((2, 3), 2, (2, 2), seed=1, skips="add"),
        families.IMAGES,
    ),
}


def fused(models, inputs, weights=None, calibration="none"):
    with warnings.catch_warnings():
        # Tables of positions are longer than the inputs, and heads of the suite are of all sizes.
        warnings.simplefilter("ignore", PinnedWarning)
        warnings.simplefilter("ignore", WidthWarning)
        return fuse(
            models,
            [inputs],
            weights,
            calibration=calibration,
            assessment="none",
            example_inputs=inputs,
        ).model


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs)


def assert_same(model, expected, inputs):
    found, want = run(model, inputs), run(expected, inputs)
    torch.testing.assert_close(found, want, rtol=0, atol=6e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_weight_on_one_network_of_another_depth_gives_it(name):
    deep, shallow, inputs = FAMILIES[name]
    models = [deep(), shallow()]
    assert_same(fused(models, inputs, [1, 0]), models[0], inputs)
    assert_same(fused(models, inputs, [0, 1]), models[1], inputs)


WIDTHS = {
    "LeViT, whose heads another layer reads": vision.hybrid,
    "NF-ResNet": vision.norm_free,
    "HRNet": lambda depth, **arguments: vision.resolutions((depth, 1), (1, depth), **arguments),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_all_weight_on_one_network_of_another_width_gives_it(name):
    make = WIDTHS[name]
    models = [make(1, width=16), make(1, width=8, seed=1)]
    assert_same(fused(models, vision.IMAGES, [1, 0]), models[0], vision.IMAGES)
    assert_same(fused(models, vision.IMAGES, [0, 1]), models[1], vision.IMAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_permuted_copy_gives_the_network(name):
    _, shallow, inputs = FAMILIES[name]
    model = shallow()
    copy = networks.permuted_copy(model, inputs)
    assert_same(copy, model, inputs)
    assert_same(fused([model, copy], inputs), model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_another_depth_fuse(name, calibration):
    deep, shallow, inputs = FAMILIES[name]
    result = fused([deep(), shallow()], inputs, calibration=calibration)
    assert bool(run(result, inputs).isfinite().all())


@pytest.mark.parametrize("post_norm", [families.bert, families.gemma2])
def test_an_inserted_block_of_norms_has_gains_that_change_nothing(post_norm):
    model = post_norm(2, seed=1)
    traced = trace(model, families.TEXT, verify=False)
    blocks = [one for one in traced.layers if one.insertable == "zero"]
    assert len(blocks) == 4
    for one in blocks:
        fillings = dict(one.fillings)
        if post_norm is families.bert:  # the norm before the block, without gain and bias
            assert sorted(fillings.values()) == [0.0, 1.0]
            assert set(fillings).isdisjoint(one.last_write)
        else:  # a gain that is stored less one
            assert list(fillings.values()) == [-1.0]
            assert set(fillings) == set(one.last_write)


def test_streams_that_do_not_correspond_are_drawn_side_by_side():
    models = [families.translator(2, 2), _Encoders(2)]
    with pytest.raises(StructureError) as refusal:
        fused(models, families.TEXTS)
    lines = str(refusal.value).splitlines()
    assert "2 stream(s)" in lines[0]
    assert "wired differently" in lines[0]
    assert all("|" in line for line in lines[1:-1])
    assert "reads source, input 1" in str(refusal.value)
    assert [line[0] for line in lines[1:-1]] == [" ", " ", ">", ">"]


def test_a_summary_names_the_streams():
    text = model_summary(trace(families.unet(), families.IMAGES, verify=False))
    assert "(down.0.0 to down.0.1) reads input 0; " in text
    assert "(down.1.0 to down.1.1) reads down.0; " in text


def test_levels_whose_features_are_all_put_out_may_have_other_depths():
    models = [vision.pyramid(2, 3), vision.pyramid(1, 1, seed=1)]
    for weights, model in (([1, 0], models[0]), ([0, 1], models[1])):
        found = run(fused(models, vision.IMAGES, weights), vision.IMAGES)
        torch.testing.assert_close(found, run(model, vision.IMAGES), rtol=0, atol=1e-5)
    copy = networks.permuted_copy(models[1], vision.IMAGES)
    found = run(fused([models[1], copy], vision.IMAGES), vision.IMAGES)
    torch.testing.assert_close(found, run(models[1], vision.IMAGES), rtol=0, atol=1e-5)


def test_stretches_between_exchanges_are_streams():
    traced = trace(vision.resolutions((2, 1), (1, 3)), vision.IMAGES, verify=False)
    layers = [[traced.layers[i] for i in one.layers] for one in traced.streams]
    blocks = [sum(layer.insertable == "zero" for layer in of) for of in layers]
    assert [count for count in blocks if count] == [1, 2, 1, 3]


class _Encoders(torch.nn.Module):
    """Two encoders side by side, of which neither reads the other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        one = families.translator(layers, 1)
        self.source, self.target, self.out = one.source, one.target, one.out
        self.first = one.transformer.encoder
        self.second = families.translator(layers, 1, seed=1).transformer.encoder

    def forward(self, source, target):
        first, second = self.first(self.source(source)), self.second(self.target(target))
        return self.out(second + first.mean(1, keepdim=True))


def test_biases_that_a_network_keeps_from_call_to_call_are_not_the_results():
    models = [vision.hybrid(1), vision.hybrid(1, seed=1)]
    for model in models:
        run(model, vision.IMAGES)
    result = fused(models, vision.IMAGES)
    fresh = vision.hybrid(1, seed=2)
    fresh.load_state_dict(result.state_dict())
    assert_same(result, fresh, vision.IMAGES)
    run(models[1], vision.IMAGES)  # whose state is copied below, with what it keeps
    assert_same(fused(models, vision.IMAGES, [0, 1]), models[1], vision.IMAGES)


def test_layers_that_share_weights_are_a_count():
    with pytest.raises(StructureError, match="the depth is a count and not a matter of weights"):
        fused([families.albert(3), families.albert(2, seed=1)], families.TEXT)
