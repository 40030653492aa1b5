"""Attention with different numbers of heads: whole heads are matched, copied and averaged."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clafusion
from clafusion import (
    Assignment,
    Deeper,
    Like,
    Matching,
    Shallower,
    Sinkhorn,
    StructureError,
    WidthWarning,
    Zip,
    fuse,
    naive_average,
    profile,
    trace,
)
from clafusion.correspondence.heads import unite_heads
from clafusion.matching.head_plans import _assigned, plan_heads
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.attention import TOKENS, Encoder, Logits
from tests.support.data import CALIBRATIONS


class Fused(nn.Module):
    """Queries, keys and values by one layer, a scaled product, and a layer after it."""

    def __init__(self, heads, size=3, between=None):
        super().__init__()
        self.heads, self.between = heads, between or (lambda q, k: (q, k))
        self.enter, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 3 * heads * size)
        self.out = nn.Linear(heads * size, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.enter(x)
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in parts)
        q, k = self.between(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


class Tabled(Fused):
    """Scores get a bias by the distance of two tokens: each head has a column of a table."""

    def __init__(self, heads):
        super().__init__(heads)
        self.table = nn.Parameter(torch.zeros(11, heads))
        places = torch.arange(6)
        self.register_buffer("index", (places[:, None] - places + 5).flatten())

    def forward(self, x):
        x = self.enter(x)
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in parts)
        bias = self.table[self.index].view(6, 6, self.heads).permute(2, 0, 1)
        scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5 + bias).softmax(-1)
        return self.head((x + self.out((scores @ v).transpose(1, 2).flatten(2))).mean(1))


def normalised(q, k):
    return F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))


def scaled(q, k):
    return q * 0.5, k


def repeated(model, make, origins):
    """Return a model that computes the same with a head for each of ``origins``, a copy of that."""
    many = make(heads=len(origins))
    counts = torch.bincount(torch.tensor(origins))
    state = copy.deepcopy(model.state_dict())
    for name, value in state.items():
        if any(part in name for part in ("queries", "keys", "values", "qkv")):
            thirds = value.chunk(3) if "qkv" in name else [value]
            chosen = [one.unflatten(0, (len(counts), -1))[origins].flatten(0, 1) for one in thirds]
            state[name] = torch.cat(chosen)
        elif name == "table":
            state[name] = value[:, origins]
        elif name.endswith("out.weight"):
            heads = value.unflatten(1, (len(counts), -1))[:, origins]
            state[name] = (heads / counts[origins, None]).flatten(1)
    many.load_state_dict(state)
    return many.eval()


def encoder(heads, layers=2, size=3, seed=0):
    torch.manual_seed(seed)
    return networks.randomise(Encoder(layers, heads=heads, size=size), seed).eval()


def fused_projection(heads, seed=0):
    torch.manual_seed(seed)
    return networks.randomise(Fused(heads), seed).eval()


def tabled(heads, seed=0):
    torch.manual_seed(seed)
    return networks.randomise(Tabled(heads), seed).eval()


def of_normalised(heads, seed=0):
    torch.manual_seed(seed)
    return networks.randomise(Fused(heads, between=normalised), seed).eval()


def of_scaled(heads, seed=0):
    torch.manual_seed(seed)
    return networks.randomise(Fused(heads, between=scaled), seed).eval()


CASES = {
    "doubled": (encoder, [2, 0, 1, 1, 0, 2]),
    "unevenly": (encoder, [1, 2, 0, 1]),
    "from one": (encoder, [0, 0]),
    "fused projection": (fused_projection, [1, 0, 1, 0]),
    "a table": (tabled, [1, 0, 1, 0]),
    "a table, unevenly": (tabled, [1, 2, 0, 1]),
    "normalised": (of_normalised, [1, 0, 0, 1]),
    "scaled, from one": (of_scaled, [0, 0, 0]),
}


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_model_fused_with_one_that_has_its_heads_twice_is_itself(name, calibration):
    make, origins = CASES[name]
    model = make(heads=max(origins) + 1)
    many = repeated(model, make, origins)
    assert_same_function(many, model, TOKENS)
    for order in ((many, model), (model, many)):
        fused = fuse(order, TOKENS, calibration=calibration).model
        assert networks.shapes(fused) == networks.shapes(order[0])
        assert_same_function(fused, model, TOKENS, calibration)


@pytest.mark.parametrize(
    "settings",
    [
        {"matching": Matching(cost="euclidean")},
        {"matching": Matching(cost="weights")},
        {"matching": Matching(cost="both")},
        {"matching": Matching(solver=Sinkhorn(epsilon=0.001))},
        {"matching": Matching(solver=Assignment())},
        {"matching": Matching(importance="activation")},
        {"merging": {"layer_weights": "sensitivity"}},
    ],
    ids=str,
)
def test_every_way_to_match_goes_with_it(settings):
    model = encoder(3)
    many = repeated(model, encoder, [2, 0, 1, 1, 0, 2])
    more = repeated(model, encoder, [1, 2, 0, 1])
    for models in ([many, model], [many, model, more], [model, many, more]):
        fused = fuse(models, TOKENS, calibration="none", **settings).model
        assert networks.shapes(fused) == networks.shapes(models[0])
        assert_same_function(fused, model, TOKENS)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_weights_0_and_1_give_the_parents_at_different_depths(weight, calibration):
    deep, shallow = encoder(6, layers=3), encoder(2, layers=1, seed=1)
    weights = [1 - weight, weight]
    result = fuse([deep, shallow], TOKENS, weights, calibration=calibration)
    assert_same_function(result.model, (deep, shallow)[int(weight)], TOKENS, calibration)
    assert_heads_are(result.parents[1], 2, 6)


def assert_heads_are(parent, source, target):
    """The parent's heads, of which the target has another number, are united."""
    united = parent.correspondence.source.united_heads, parent.correspondence.target.united_heads
    assert united[0]
    assert {one.count for one in united[0]} == {source}
    assert {one.count for one in united[1]} == {target}


def test_the_summary_tells_of_heads():
    deep, shallow = encoder(6, layers=3), encoder(2, layers=1, seed=1)
    assert "2 to 6" in clafusion.summary(fuse([deep, shallow], TOKENS))


def test_plans_move_whole_heads():
    deep, shallow = encoder(5), encoder(2, seed=1)
    _, parent = fuse([deep, shallow], TOKENS).parents
    assert parent.correspondence.target.united_heads
    for one in parent.correspondence.target.united_heads:
        masses = []
        for index in one.groups:
            plan = parent.plans[index].dense()
            torch.testing.assert_close(plan.sum(), torch.ones((), dtype=plan.dtype))
            masses.append(plan.unflatten(0, (2, -1)).unflatten(2, (5, -1)).sum((1, 3)))
        torch.testing.assert_close(masses[0], masses[1])  # queries with keys, values
        assert ((masses[0] > 0).sum(0) == 1).all()
        assert sorted((masses[0] > 0).sum(1).tolist()) == [2, 3]


def test_heads_may_also_differ_in_size():
    deep, shallow = fused_projection(4), networks.randomise(Fused(2, size=5), 1).eval()
    with pytest.warns(WidthWarning, match="'qkv.weight', 5 in .* and 3 in the result"):
        result = fuse([deep, shallow], TOKENS, [1, 0])
    assert_same_function(result.model, deep, TOKENS, "repair")
    assert_heads_are(result.parents[1], 2, 4)


def test_scores_may_be_divided_by_what_the_heads_size_says():
    deep, shallow = encoder(4), encoder(2, size=6, seed=1)
    with pytest.warns(WidthWarning, match="6 in .* and 3 in the result"):
        result = fuse([deep, shallow], TOKENS, [1, 0])
    assert_same_function(result.model, deep, TOKENS, "repair")


def test_groups_of_one_channel_are_not_taken_for_one_head():
    def normed(width):
        return networks.randomise(Normed(width)).eval()

    with pytest.raises(StructureError, match="different numbers of heads or groups"):
        fuse([normed(8), normed(4)], TOKENS)


class Normed(nn.Module):
    """A residual branch with four groups of channels."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.head = nn.Linear(12, 6), nn.Linear(6, 5)
        self.inner, self.norm = nn.Linear(6, width), nn.GroupNorm(4, width)
        self.out = nn.Linear(width, 6)

    def forward(self, x):
        x = self.enter(x).mean(1)
        return self.head(x + self.out(self.norm(self.inner(x)).relu()))


def test_a_transformer_of_others():
    import transformers

    def vit(layers, heads, width, seed):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=20,
            image_size=16,
            patch_size=8,
            num_labels=5,
        )
        return Logits(transformers.ViTForImageClassification(config)).eval()

    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    deep, shallow = vit(3, 6, 24, 0), vit(2, 2, 8, 1)
    result = fuse([deep, shallow], images, [1, 0])
    assert_same_function(result.model, deep, images, "repair")
    assert_heads_are(result.parents[1], 2, 6)
    rows = fuse([deep, shallow], images, [0.7, 0.3], calibration="none").layer_weights
    assert len(rows) == len(result.parents[0].traced.layers)
    assert set(rows) == {(0.7, 0.3), (0.7, None)}


def test_profiles_with_united_heads_are_those_of_the_same_models():
    one, other = profile(encoder(4), TOKENS), profile(encoder(2, seed=1), TOKENS)
    target, source = unite_heads(one, other, range(len(one.traced.layers)))
    for before, after, count in ((one, target, 4), (other, source, 2)):
        assert after.traced.model is before.traced.model
        assert [each.count for each in after.traced.united_heads] == [count, count]
        assert not after.traced.heads
        assert sum(each.size for each in after.traced.groups) == sum(
            each.size for each in before.traced.groups
        )
        for layer in after.traced.layers:
            for point in layer.hook_points:
                for index in point.groups.unique().tolist():
                    members = point.members[point.groups == index]
                    assert sorted(members.tolist()) == list(range(after.traced.groups[index].size))
    assert unite_heads(one, one, range(len(one.traced.layers))) == (one, one)


def test_pairs_are_fused_like_one():
    models = {"four": encoder(4), "two": encoder(2, seed=1)}
    (result,) = clafusion.fuse_pairs(models, TOKENS)
    expected = fuse(models, TOKENS).model.state_dict()
    assert result.error is None
    for name, one in result.state.items():
        assert torch.equal(one, expected[name]), name


@pytest.mark.nightly
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("strategy", ["iterative", "many_to_one", "barycentre"])
def test_three_models_with_other_numbers_each(strategy, calibration):
    models = [encoder(4), encoder(2, seed=1), encoder(3, seed=2)]
    settings = {"merging": strategy, "calibration": calibration}
    fused = fuse(models, TOKENS, **settings).model
    assert networks.shapes(fused) == networks.shapes(models[0])
    assert networks.output(fused, TOKENS).isfinite().all()
    kept = fuse(models, TOKENS, [1, 0, 0], **settings)
    assert_same_function(kept.model, models[0], TOKENS, calibration)
    results = kept.steps or [kept]  # one after another each step has two parents
    others = [parent for step in results for parent in step.parents[1:]]
    for parent, count in zip(others, (2, 3), strict=True):
        assert_heads_are(parent, count, 4)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_three_models_of_other_depths_and_heads_keep_each(position, calibration):
    models = [encoder(6, layers=3), encoder(2, layers=2, seed=1), encoder(3, layers=1, seed=2)]
    weights = [float(i == position) for i in range(3)]
    result = fuse(models, TOKENS, weights, calibration=calibration)
    assert networks.shapes(result.model) == networks.shapes(models[0])
    assert_same_function(result.model, models[position], TOKENS, calibration)


def test_the_naive_average_is_of_heads_in_order():
    result = fuse([encoder(4), encoder(2, seed=1)], TOKENS)
    assert networks.output(naive_average(result.problem), TOKENS).isfinite().all()
    # Where every head is there twice in a row, the order tells which go together.
    model = encoder(3)
    twice = repeated(model, encoder, [0, 0, 1, 1, 2, 2])
    result = fuse([model, twice, twice], TOKENS)
    assert_same_function(naive_average(result.problem), model, TOKENS)


class Gated(nn.Module):
    """Each head's values times a gate, which a learned query and a learned key decide."""

    def __init__(self, heads, size=3):
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(12, 12)
        self.asked, self.known = (nn.Parameter(torch.randn(1, 1, 12)) for _ in range(2))
        self.queries, self.keys, self.values = (nn.Linear(12, heads * size) for _ in range(3))
        self.out, self.head = nn.Linear(heads * size, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.enter(x)
        asked, known = (one.repeat(x.shape[0], 1, 1) for one in (self.asked, self.known))
        q, k, v = (
            layer(value).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, value in ((self.queries, asked), (self.keys, known), (self.values, x))
        )
        gated = (q @ k.transpose(2, 3)).sigmoid() * v
        return self.head((x + self.out(gated.transpose(1, 2).flatten(2))).mean(1))


def test_channels_of_heads_that_are_the_same_for_all_inputs_are_matched_by_weights():
    def make(heads):
        torch.manual_seed(0)
        return networks.randomise(Gated(heads)).eval()

    model = make(2)
    many = repeated(model, make, [1, 0, 1, 0])
    order = [2, 0, 1, 3, 5, 4, 7, 8, 6, 9, 11, 10]  # within each head
    with torch.no_grad():
        for parameter in (*many.queries.parameters(), *many.keys.parameters()):
            parameter.copy_(parameter[order])
    assert_same_function(many, model, TOKENS)
    for models in ([many, model], [model, many]):
        assert_same_function(fuse(models, TOKENS, calibration="none").model, model, TOKENS)


def test_zip_is_refused():
    message = "needs equally many attention heads; 'layers.0' has 4 and 'layers.0' 2"
    zipped = Matching(solver=Zip())
    with pytest.raises(StructureError, match=message):
        fuse([encoder(4), encoder(2, seed=1)], TOKENS, matching=zipped)
    with pytest.raises(StructureError, match=message):
        fuse([encoder(4), encoder(4, seed=2), encoder(2, seed=1)], TOKENS, matching=zipped)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_heads_take_their_columns_of_a_table_along(weight, calibration):
    many, few = tabled(4), tabled(2, seed=1)
    for deep, shallow in ((many, few), (few, many))[: 2 if weight == 0 else 1]:
        fused = fuse([deep, shallow], TOKENS, [1 - weight, weight], calibration=calibration)
        assert_same_function(fused.model, (deep, shallow)[int(weight)], TOKENS, calibration)
        assert_heads_are(fused.parents[1], shallow.heads, deep.heads)


@pytest.mark.parametrize("own", ["bias", "temperature"])
@pytest.mark.parametrize("counts", [(4, 2), (2, 4)], ids=str)
def test_heads_take_along_what_they_have_of_their_own(counts, own):
    deep, shallow = (
        networks.randomise(Encoder(1, heads=heads, size=3, **{own: True}), seed).eval()
        for seed, heads in enumerate(counts)
    )
    for weight in (0.0, 1.0) if counts[0] > counts[1] else (0.0,):
        fused = fuse([deep, shallow], TOKENS, [1 - weight, weight])
        assert_same_function(fused.model, (deep, shallow)[int(weight)], TOKENS, "least_squares")
        assert_heads_are(fused.parents[1], counts[1], counts[0])


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 4), (2, 5)])
def test_heads_are_assigned_at_the_least_cost(shape):
    costs = np.random.default_rng(sum(shape)).normal(size=shape)
    matched = _assigned(costs)
    more, fewer = max(shape), min(shape)
    side = 0 if shape[0] >= shape[1] else 1
    assert (matched.sum(1 - side) == 1).all()
    counts = matched.sum(side)
    assert counts.max() <= -(-more // fewer)
    assert counts.min() >= more // fewer
    tall = costs if side == 0 else costs.T
    best = min(
        sum(tall[i, j] for i, j in enumerate(chosen))
        for chosen in product(range(fewer), repeat=more)
        if all(more // fewer <= chosen.count(j) <= -(-more // fewer) for j in range(fewer))
    )
    assert np.isclose((costs * matched).sum(), best)


@pytest.mark.parametrize("shape", [(6, 2), (2, 6), (3, 3), (5, 2), (1, 4)])
def test_plans_of_heads_are_wholes_and_those_of_all_groups_alike(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    costs = [
        torch.rand(shape[0] * n, shape[1] * m, generator=generator).double()
        for n, m in ((3, 3), (4, 2))
    ]
    found, pairs = plan_heads(costs, shape)
    plans = [plan.dense() for plan in found]
    assert pairs.shape == shape
    more, fewer = max(shape), min(shape)
    assert pairs.sum() == more
    for plan, cost in zip(plans, costs, strict=True):
        assert plan.shape == cost.shape
        mass = plan.unflatten(0, (shape[0], -1)).unflatten(2, (shape[1], -1)).sum((1, 3))
        torch.testing.assert_close(mass, torch.from_numpy(pairs / more))
    again, same = plan_heads(costs[:1], shape, pairs)
    assert (same == pairs).all()
    assert again[0] == found[0]
    assert more // fewer <= pairs.sum(0 if shape[0] >= shape[1] else 1).min()


@pytest.mark.nightly
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_template_may_have_another_number_of_heads(calibration):
    # The deep network has few heads, the shallow one many; the result both its depth and those.
    deep, shallow = encoder(2, layers=3), encoder(4, layers=1, seed=1)
    template = encoder(4, layers=3, seed=2)
    for weights, parent in (([1, 0], deep), ([0, 1], shallow)):
        target = Like(template)
        result = fuse([deep, shallow], TOKENS, weights, target=target, calibration=calibration)
        assert networks.shapes(result.model) == networks.shapes(template)
        assert_same_function(result.model, parent, TOKENS, calibration)
    narrow = fuse([deep, shallow], TOKENS, target=Like(encoder(2, layers=3, seed=2))).model
    assert networks.shapes(narrow) == networks.shapes(deep)


@pytest.mark.nightly
@pytest.mark.parametrize("heads", [2, 3, 4, 6])
def test_a_template_of_three_may_have_another_number_of_heads(heads):
    models = [encoder(2, layers=3), encoder(4, layers=1, seed=1), encoder(3, layers=2, seed=2)]
    template = encoder(heads, layers=3, seed=3)
    result = fuse(models, TOKENS, target=Like(template))
    assert networks.shapes(result.model) == networks.shapes(template)
    assert networks.output(result.model, TOKENS).isfinite().all()
    for position, own in enumerate((2, 4, 3)):
        if heads >= own:  # else some of its heads go
            weights = [float(i == position) for i in range(3)]
            result = fuse(models, TOKENS, weights, target=Like(template))
            assert_same_function(result.model, models[position], TOKENS, "repair")


def test_the_shallower_one_may_have_another_number_of_heads():
    deep, shallow = encoder(2, layers=3), encoder(4, layers=1, seed=1)
    result = fuse([deep, shallow], TOKENS, [0, 1], target=Shallower())
    assert networks.shapes(result.model) == networks.shapes(shallow)
    assert_same_function(result.model, shallow, TOKENS, "repair")
    assert_heads_are(result.parents[0], 2, 4)


def test_widths_that_a_module_cannot_have_are_refused():
    models = [encoder(2, layers=3), encoder(4, layers=1, seed=1), encoder(2, layers=2, seed=2)]
    for count in (2, 3):
        message = r"its module's code has 2: give target=Like\("
        with pytest.raises(StructureError, match=message):
            fuse(models[:count], TOKENS, target=Deeper(width="wide"))


def test_inspecting_counts_heads_as_before():
    assert len(trace(encoder(4), TOKENS).heads[0].members) == 4
