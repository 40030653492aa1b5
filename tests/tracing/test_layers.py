"""Cutting networks into layers: where, of what kind, and what can be inserted."""

import torch
from torch import nn

from clafusion import trace
from tests.support import networks
from tests.support.architectures import ARCHITECTURES

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def describe(model, inputs):
    return [(layer.name, layer.kind, layer.insertable) for layer in trace(model, inputs).layers]


def test_a_chain_is_cut_at_its_layers():
    assert describe(networks.mlp(12, 9, 8, 7, 5), VECTORS) == [
        ("0", "chain", None),  # its input cannot move
        ("2", "chain", "identity"),
        ("4", "chain", "identity"),
        ("6", "chain", None),
    ]


def test_an_activation_that_is_not_idempotent_admits_no_identity():
    model = networks.mlp(12, 9, 8, 5, activation=nn.Tanh)
    assert [kind for *_, kind in describe(model, VECTORS)] == [None, None, None]


def test_a_layer_that_cannot_be_inserted_says_why():
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    found = trace(networks.randomise(nn.Sequential(*layers, nn.Linear(8, 3))), VECTORS[:, :8])
    says = [one.obstacle for one in found.layers]
    assert "keep their places" in says[0]
    assert says[1].startswith("its linear is followed by relu, where only")  # its input is a tanh's
    assert says[2] == ""
    assert "keep their places" in says[3]
    images = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
    found = trace(networks.randomise(images), IMAGES)
    assert "its convolution needs stride 1" in found.layers[1].obstacle


def test_a_pooling_between_layers_belongs_to_neither():
    layers = trace(networks.vgg(2, 2), IMAGES).layers
    assert [layer.output_shape for layer in layers] == [(16, 16)] * 2 + [(8, 8)] * 2 + [()]
    assert [layer.insertable for layer in layers] == [None] + ["identity"] * 3 + [None]
    assert layers[1].structure == layers[2].structure


def test_a_strided_or_even_convolution_admits_no_identity():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, padding="same"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),  # into groups, which an identity would have to keep
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 4),
    )
    assert [kind for *_, kind in describe(networks.randomise(model), IMAGES)] == [
        None,
        None,
        None,
        "identity",
        None,
        None,
        None,
    ]


def test_a_residual_block_is_one_layer_that_its_last_norm_silences():
    layers = trace(networks.resnet(2, 2), IMAGES).layers
    assert [layer.kind for layer in layers] == ["chain"] + ["residual_block"] * 4 + ["chain"]
    assert [layer.insertable for layer in layers] == [None, "zero", "zero", None, "zero", None]
    assert layers[2].last_write == ("blocks.1.bn2.weight", "blocks.1.bn2.bias")
    assert [layer.name for layer in layers] == [
        "stem.0",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.3",
        "head",
    ]


def test_every_parameter_of_every_architecture_belongs_to_a_layer():
    for name in ("ResNet, bottleneck blocks", "DenseNet concatenation", "transformers ViT"):
        model, inputs = ARCHITECTURES[name].build()
        graph = trace(model, inputs, verify=False)
        owned = {parameter for layer in graph.layers for parameter in layer.parameters}
        used = {use.parameter for use in graph.uses}
        assert used <= owned, name


def test_blocks_of_a_pre_norm_transformer_can_be_inserted():
    model, inputs = ARCHITECTURES["transformers ViT"].build()
    layers = trace(model, inputs, verify=False).layers
    blocks = [layer for layer in layers if layer.kind == "residual_block"]
    assert blocks
    assert all(layer.insertable == "zero" for layer in blocks)


def test_all_layers_sit_along_one_stream():
    model, inputs = ARCHITECTURES["transformers ViT"].build()
    traced = trace(model, inputs, verify=False)
    (trunk,) = traced.streams
    assert trunk.name == "trunk"
    assert [traced.layers[i] for i in trunk.layers] == list(traced.layers)
