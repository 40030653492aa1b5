"""Copies of rotary transformers whose heads, or groups of heads, stand in another order."""

import copy

import pytest
import torch

import clafusion
from clafusion import Like, fuse, trace
from tests.support.assertions import assert_same_logits
from tests.support.data import CALIBRATIONS

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 60, (60, 9), generator=torch.Generator().manual_seed(0))
SIZE = 8  # of a head


def network(kind, groups, heads, layers=2, seed=0):
    """Build a small Llama, Qwen3 or Phi-3: ``groups`` of keys and values, ``heads`` of queries."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=SIZE,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def weights_of(attention, groups, heads):
    """Return the weights that make queries, keys and values, also where one has them all."""
    if hasattr(attention, "qkv_proj"):
        sizes = [SIZE * count for count in (heads, groups, groups)]
        return dict(zip("qkv", attention.qkv_proj.weight.split(sizes), strict=True))
    return {part: getattr(attention, f"{part}_proj").weight for part in "qkv"}


def shuffled(model, groups, heads, order):
    """Return a copy in which the groups stand in another order, with their queries."""
    moved = copy.deepcopy(model)
    each = heads // groups
    with torch.no_grad():
        for layer in moved.model.layers:
            attention = layer.self_attn
            for part, size in (("q", each * SIZE), ("k", SIZE), ("v", SIZE)):
                weight = weights_of(attention, groups, heads)[part]
                weight.copy_(weight.view(groups, size, -1)[order].reshape(weight.shape))
            weight = attention.o_proj.weight
            weight.copy_(weight.view(len(weight), groups, -1)[:, order].reshape(weight.shape))
    return moved


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(
    ("kind", "groups", "heads"),
    [("Llama", 4, 4), ("Llama", 2, 4), ("Qwen3", 4, 4), ("Phi3", 2, 4)],
)
def test_heads_that_stand_in_another_order_are_matched(kind, groups, heads, calibration):
    model = network(kind, groups, heads)
    order = list(reversed(range(groups)))
    moved = shuffled(model, groups, heads, order)
    assert_same_logits(moved, model, TOKENS)
    whole = [one for one in trace(moved, TOKENS).heads if not one.is_shared]
    assert [len(one.members) for one in whole] == [groups, groups]
    fused = fuse([model, moved], TOKENS, calibration=calibration).model
    assert_same_logits(fused, model, TOKENS)


def with_queries_in_another_order(model, groups, heads):
    """Return a copy in which the queries of each group stand in another order, one for each."""
    moved = copy.deepcopy(model)
    each = heads // groups
    order = torch.cat(
        [group * each + torch.arange(each).roll(group + 1) for group in range(groups)]
    )
    with torch.no_grad():
        for layer in moved.model.layers:
            weight = weights_of(layer.self_attn, groups, heads)["q"]
            weight.copy_(weight.view(heads, SIZE, -1)[order].reshape(weight.shape))
            weight = layer.self_attn.o_proj.weight
            weight.copy_(weight.view(len(weight), heads, -1)[:, order].reshape(weight.shape))
    return moved


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(
    ("kind", "groups", "heads"),
    [("Llama", 2, 8), ("Llama", 1, 4), ("Qwen3", 2, 4), ("Phi3", 2, 4), ("Phi3", 1, 4)],
)
def test_queries_that_share_keys_are_matched_within_their_group(kind, groups, heads, calibration):
    model = network(kind, groups, heads)
    moved = with_queries_in_another_order(model, groups, heads)
    assert_same_logits(moved, model, TOKENS)
    shared = [one for one in trace(moved, TOKENS).heads if one.is_shared]
    assert [len(one.members) for one in shared] == [heads // groups] * groups * 2
    result = fuse([model, moved], TOKENS, calibration=calibration)
    assert_same_logits(result.model, model, TOKENS)
    naive = clafusion.naive_average(result.problem, [0, 1])
    assert_same_logits(naive, model, TOKENS)
    if groups > 1:
        both = shuffled(moved, groups, heads, list(reversed(range(groups))))
        result = fuse([model, both], TOKENS, calibration=calibration)
        assert_same_logits(result.model, model, TOKENS)
        assert_same_logits(clafusion.naive_average(result.problem, [0, 1]), model, TOKENS)


def test_other_numbers_of_queries_for_each_of_the_keys_in_one_weight():
    """Every head of the queries of four has a place of its own among eight."""
    few, many = network("Phi3", 2, 4), network("Phi3", 2, 8, seed=1)
    for weights, parent in (([1, 0], few), ([0, 1], many)):
        fused = fuse([few, many], TOKENS, weights, calibration="none", target=Like(many)).model
        assert_same_logits(fused, parent, TOKENS)


def test_depths_may_differ_beside():
    deep, shallow = network("Llama", 4, 4, layers=3), network("Llama", 4, 4, layers=2, seed=1)
    for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
        fused = fuse([deep, shallow], TOKENS, weights, calibration="none").model
        assert_same_logits(fused, parent, TOKENS)


@pytest.mark.parametrize("heads", [2, 3, 4])
@pytest.mark.parametrize("turned", [0.25, 0.5])
def test_queries_and_values_move_together_where_a_part_of_a_head_is_turned(heads, turned):
    """Two heads have one order but their own, in which all of them would move alike."""

    def made(layers, seed):
        torch.manual_seed(seed)
        config = transformers.StableLmConfig(
            vocab_size=60,
            hidden_size=heads * SIZE,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": turned,
            },
            use_cache=False,
        )
        model = transformers.StableLmForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.5 * torch.randn_like(parameter)
        return model

    models = [made(3, 0), made(2, 1)]
    traced = [trace(one, TOKENS[:4]) for one in models]
    for one in traced:
        assert len(one.heads) == len(one.model.model.layers)
        assert all(len(whole.members) == heads for whole in one.heads)
    fused = fuse(models, TOKENS, [0, 1], calibration="none").model
    assert_same_logits(fused, models[1], TOKENS)
