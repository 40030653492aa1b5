"""Mixtures of experts: experts change places together with their rows of the router."""

import copy

import pytest
import torch
from torch import nn

from clafusion import StructureError, fuse, trace

transformers = pytest.importorskip("transformers")

TEXT = torch.randint(3, 23, (40, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": TEXT}]
EXAMPLE = {"input_ids": TEXT[:3]}


def mixture(seed, width=20, experts=3, chosen=2):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=width, max_position_embeddings=32, num_key_value_heads=2,
        num_local_experts=experts, num_experts_per_tok=chosen, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def gap(model, other):
    with torch.no_grad():
        found, wanted = model(TEXT).logits, other(TEXT).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


def with_experts_in_another_order(model):
    """Return a copy with other places of the experts, and of the hidden units of one of them."""
    copied = copy.deepcopy(model)
    places, units = torch.tensor([2, 0, 1]), torch.randperm(20)
    for layer in copied.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        gate.weight.data = gate.weight[places]
        up, down = experts.gate_up_proj.data[places], experts.down_proj.data[places]
        up[1] = torch.cat([up[1, :20][units], up[1, 20:][units]])
        down[1] = down[1][:, units]
        experts.gate_up_proj.data, experts.down_proj.data = up, down
    return copied


def test_experts_are_heads():
    traced = trace(mixture(0), EXAMPLE)
    experts = [one for one in traced.heads if len(one.members) == 3]
    assert len(experts) == 1
    sizes = [sorted(traced.groups[i].size for i in head) for head in experts[0].members]
    assert sizes == [[1, 20]] * 3  # the router's row, and the hidden units
    assert traced.pinned == ()


def test_experts_in_another_order_fuse_to_the_network():
    model = mixture(0)
    other = with_experts_in_another_order(model)
    assert gap(other, model) < 1e-5
    fused = fuse([model, other], DATA, example_inputs=EXAMPLE, calibration="none").model
    assert gap(fused, model) < 1e-5


def test_all_weight_on_one_mixture_gives_that_mixture():
    models = [mixture(0), mixture(1)]
    for weights, model in (([1, 0], models[0]), ([0, 1], models[1])):
        fused = fuse(models, DATA, weights, example_inputs=EXAMPLE, calibration="none").model
        assert gap(fused, model) < 1e-5


def test_mixtures_of_other_widths_fuse():
    models = [mixture(0, 28), mixture(1)]
    fused = fuse(models, DATA, example_inputs=EXAMPLE).model
    with torch.no_grad():
        assert fused(TEXT).logits.isfinite().all()


class SignsChoose(nn.Module):
    """Three experts, of which the sign of an input's first number chooses one of two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 10)
        self.up, self.down = nn.Parameter(torch.randn(3, 10, 8)), nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x):
        product = torch.ops.transformers.grouped_mm_fallback
        chosen = (x[:, 0] > 0).long()
        order = chosen.argsort(stable=True)
        ends = nn.functional.one_hot(chosen, 3).sum(0).cumsum(0).int()
        hidden = product(self.enter(x).relu()[order], self.up, ends).relu()
        return product(hidden, self.down, ends)[order.argsort()]


def test_an_expert_that_no_example_reaches_keeps_its_channels_and_is_told():
    traced = trace(SignsChoose(), torch.randn(12, 6))
    assert sorted(one.size for one in traced.groups) == [8, 8, 10]
    (stream,) = (one for one in traced.groups if one.size == 10)
    offsets = [one.use.offset for one in stream.axes if one.use.parameter == "up"]
    assert offsets == [0, 80, 160]  # what the experts read moves in all of them
    assert {one.why for one in traced.pinned} == {"no example input comes to this expert"}
    assert [(one.parameter, one.size) for one in traced.pinned] == [("up", 8)]


def test_a_trace_does_not_depend_on_those_before():
    first, second = (mixture(seed, experts=12, chosen=1) for seed in (1, 2))
    alone = trace(second, EXAMPLE)
    trace(first, EXAMPLE)
    again = trace(second, EXAMPLE)
    assert [one.size for one in again.groups] == [one.size for one in alone.groups]
    assert again.pinned == alone.pinned


def test_experts_without_tokens_are_told_where_they_stand_in_the_way():
    models = [mixture(seed, experts=12, chosen=1) for seed in (1, 2)]
    with pytest.raises(StructureError, match="Not all experts have tokens"):
        fuse(models, DATA, example_inputs=EXAMPLE)
