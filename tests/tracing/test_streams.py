"""Streams: which layers lie on which, and what each reads."""

import torch
from torch import nn

from clafusion import trace
from tests.support import families
from tests.support.architectures import ARCHITECTURES, randomise


def streams_of(model, inputs):
    traced = trace(model, inputs, verify=False)
    listed = [index for stream in traced.streams for index in stream.layers]
    assert listed == list(range(len(traced.layers)))  # one stream after the other
    for i, stream in enumerate(traced.streams):
        assert all(traced.layers[index].stream == i for index in stream.layers)
        assert all(one < i for one in stream.inputs if isinstance(one, int))  # behind what it reads
    kinds = [[traced.layers[index].insertable for index in one.layers] for one in traced.streams]
    return [one.inputs for one in traced.streams], kinds


def test_an_encoder_and_a_decoder_are_two_streams():
    inputs, kinds = streams_of(families.translator(2, 1, norm_first=True), families.TEXTS)
    assert inputs == [("input 0",), (0, "input 1")]
    assert kinds == [[None, *["zero"] * 4, None], [None, *["zero"] * 3, None, None]]


def test_a_table_that_all_blocks_read_is_a_part_of_the_first():
    traced = trace(families.t5(2, 2), families.TEXTS, verify=False)
    encoder, decoder = traced.streams
    assert encoder.inputs == ("input 0",)
    assert decoder.inputs == (0, "input 1")
    for stream in (encoder, decoder):
        layers = [traced.layers[index] for index in stream.layers]
        tables = [any("attention_bias" in name for name in one.parameters) for one in layers]
        assert tables == [i == 1 for i in range(len(layers))]
        attentions = [one for one in layers if ".SelfAttention" in one.name]
        assert [one.lender for one in attentions] == [attentions[0].index] * 2
        assert [one.insertable for one in attentions] == ["zero", "zero"]
    # Heads have a column of the table in common, so they move together in all attentions.
    assert [len(one.members[0]) for one in traced.heads if one.layer == encoder.layers[1]] == [5]


def test_the_levels_of_a_u_net_are_streams_on_the_way_down_and_up():
    for residual in (True, False):
        inputs, kinds = streams_of(
            families.unet((2, 2), 2, (2, 2), residual=residual), families.IMAGES
        )
        # down, down, bottom, and up twice, each with the level below and a skip
        assert inputs == [("input 0",), (0,), (1,), (1, 2), (0, 3)]
        assert all(any(one) for one in kinds)


def test_a_block_of_parallel_paths_stays_one_layer():
    for name in (
        "Inception-like branches",
        "Spatial pyramid pooling",
        "Squeeze-excite with linear layers and view",
        "transformers ConvNeXtV2",
        "transformers EfficientNet",
    ):
        model, inputs = ARCHITECTURES[name].build()
        traced = trace(model, inputs, verify=False)
        assert [stream.name for stream in traced.streams] == ["trunk"]
        assert any(layer.kind == "residual_block" for layer in traced.layers)


class Crossed(nn.Module):
    """Two streams of blocks that read each other after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        one, other = (stem(x) for stem in self.stems)
        for i in (0, 2):
            one = one + self.blocks[i](torch.cat([one, other], -1)).relu()
            other = other + self.blocks[i + 1](torch.cat([other, one], -1)).relu()
        return self.head(torch.cat([one, other], -1))


def test_streams_that_read_each_other_in_turns_are_one_layer():
    torch.manual_seed(0)
    traced = trace(randomise(Crossed()), torch.randn(3, 6))
    assert len(traced.streams) == 1
    assert traced.layers[0].insertable is None


def test_post_norm_blocks_begin_with_the_norm_before_them():
    traced = trace(families.bert(2), families.TEXT, verify=False)
    blocks = [one for one in traced.layers if one.insertable == "zero"]
    assert len(blocks) == 4
    assert len({blocks[0].structure, blocks[2].structure}) == 1
    assert all(one.structure[1][0] == "layer_norm" for one in blocks)
    (norm,) = (one for one in traced.layers if one.kind == "norm")
    assert norm.index == blocks[-1].index + 1


class ReadTwice(nn.Module):
    """A post-norm network whose outputs hold a norm's value between two blocks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.head, self.side = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x, seen = self.stem(x), []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x).relu())
            seen.append(x)
        return self.head(x) + self.side(seen[0])


def test_a_norm_that_something_else_reads_stays_as_it_is():
    traced = trace(randomise(ReadTwice()), torch.randn(3, 6), verify=False)
    first = [one for one in traced.layers if "norms.0.weight" in one.parameters]
    assert all("norms.0.weight" not in dict(one.fillings) for one in first)
