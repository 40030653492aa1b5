"""Whatever the networks and the options, a pair is fused as `fuse` does it alone."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from clafusion import (
    Deeper,
    FusionConfig,
    Matching,
    Shallower,
    WidthWarning,
    Zip,
    fuse,
    stages,
    trace,
)
from clafusion.batch.check import check_pairs
from clafusion.batch.run import fuse_pairs
from tests.support import networks
from tests.support.dense import dense
from tests.support.mixtures import VECTORS as MIXED
from tests.support.mixtures import listed

IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(120, 6, 12, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


def assert_fused_alike(models, data, **settings):
    (pair,) = fuse_pairs(models, data, **settings)
    alone = fuse(list(models.values()), data, **settings)
    assert pair.error is None
    expected = alone.model.state_dict()
    assert pair.state.keys() == expected.keys()
    for name, one in pair.state.items():
        assert torch.equal(one, expected[name]), name
    assert pair.layer_weights == alone.layer_weights
    assert torch.equal(pair.model(data), alone.model(data))
    return alone


def test_the_published_steps():
    models = {
        "deep": networks.mlp(6, 12, 9, 7, 8, 5, 4, seed=3),
        "shallow": networks.mlp(6, 8, 10, 6, 4, seed=4),
    }
    assert_fused_alike(models, VECTORS, config=FusionConfig.paper())


@pytest.mark.parametrize("target", [Shallower(), Deeper(width="narrow"), Deeper()])
@pytest.mark.parametrize("calibration", ["repair", "batchnorm"])
def test_zipped_channels(target, calibration):
    models = {
        "deep": networks.resnet(3, 2, shortcut="conv", seed=1),
        "shallow": networks.resnet(2, 1, widths=(6, 12), shortcut="conv", seed=2),
    }
    matching = Matching(solver=Zip(budget=0.3))
    assert_fused_alike(models, IMAGES, matching=matching, calibration=calibration, target=target)


class Attention(nn.Module):
    def __init__(self, heads, size=3):
        super().__init__()
        self.heads, self.size = heads, size
        self.enter, self.head = nn.Linear(12, 12), nn.Linear(12, 5)
        self.queries, self.keys, self.values = (nn.Linear(12, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 12)

    def forward(self, x):
        x = self.enter(x)
        queries, keys, values = (
            one(x).unflatten(2, (self.heads, self.size)).transpose(1, 2)
            for one in (self.queries, self.keys, self.values)
        )
        scores = queries @ keys.transpose(2, 3) / self.size**0.5
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


def attention(heads, seed=0):
    return networks.randomise(Attention(heads), seed)


def test_heads_in_another_order():
    model, other = attention(4), attention(4)
    rows = torch.arange(12).unflatten(0, (4, 3))[[2, 0, 3, 1]].flatten()
    with torch.no_grad():
        for one in (other.queries, other.keys, other.values):
            one.weight.copy_(one.weight[rows])
            one.bias.copy_(one.bias[rows])
        other.out.weight.copy_(other.out.weight[:, rows])
    assert len(trace(model, TOKENS).heads[0].members) == 4
    alone = assert_fused_alike({"one": model, "other": other}, TOKENS)
    assert any(one.head_orders for one in alone.parents)


def test_other_numbers_of_heads():
    assert_fused_alike({"four": attention(4), "two": attention(2, seed=1)}, TOKENS)


class Scores(nn.Module):
    """The sums of the products of all queries with all keys."""

    def __init__(self, width):
        super().__init__()
        self.queries, self.keys = nn.Linear(6, width), nn.Linear(6, width)
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        x = torch.stack([x, x.sin(), x.cos()], 1)
        return self.last((self.queries(x) @ self.keys(x).mT).mean(1))


@pytest.mark.parametrize("turned", [False, True])
def test_dense_blocks_of_other_lengths(turned):
    models = {"long": dense(3, 2), "short": dense(2, 2, seed=1)}
    if turned:
        models = dict(reversed(models.items()))
    alone = assert_fused_alike(models, IMAGES, calibration="none")
    (pair,) = fuse_pairs(models, IMAGES, calibration="none")
    assert (pair.structure, pair.resized) == ("long", False)
    counts = {name: sum(p.numel() for p in one.parameters()) for name, one in models.items()}
    assert {name: one.parameters for name, one in pair.models.items()} == counts
    assert pair.parameters == counts["long"] == sum(p.numel() for p in alone.model.parameters())


def test_other_numbers_of_experts_in_a_list():
    models = {"few": listed(count=3), "many": listed(count=5, hidden=16, seed=1)}
    assert_fused_alike(models, MIXED, calibration="none")
    (pair,) = fuse_pairs(models, MIXED, calibration="none")
    assert pair.structure == "many"


def test_dense_blocks_each_longer_somewhere_are_a_union():
    models = {"first": dense(3, 2), "second": dense(2, 3, seed=1)}
    (pair,) = fuse_pairs(models, IMAGES, calibration="none")
    assert "each the deeper one somewhere" in pair.error
    found = check_pairs(models, IMAGES, [("first", "second")])
    assert "each the deeper one somewhere" in found.causes[0].reason


def test_the_check_knows_of_completed_models():
    models = {"long": dense(3, 2), "short": dense(2, 2, seed=1)}
    assert check_pairs(models, IMAGES, [("short", "long")]).fusible == (("short", "long"),)


def test_a_warning_is_given_and_kept():
    models = {"wide": networks.randomise(Scores(8)), "narrow": networks.randomise(Scores(5), 1)}
    with pytest.warns(WidthWarning, match=r"models\['wide'\] and .*added up without weights"):
        (result,) = fuse_pairs(models, VECTORS, assessment="none")
    (text,) = result.warnings
    assert "added up without weights" in text


def test_a_union_is_refused_by_name():
    models = {
        "a": networks.resnet(3, 1, shortcut="conv"),
        "b": networks.resnet(1, 3, shortcut="conv", seed=1),
    }
    (result,) = fuse_pairs(models, IMAGES)
    assert "StructureError: models['a'] and models['b'] are each the deeper one" in result.error


# For each option a value with which something else comes out than with the default. Many pairs are
# not fused to networks of other classes: outputs and shared are refused by name.
OTHERS = {
    "profiling": {"matching_rows": 12},
    "alignment": {"mode": "random"},
    "target": "shallower",
    "matching": "euclidean",
    "merging": {"normalisation": "single"},
    "calibration": "batchnorm",
    "combine": "probabilities",
    "assessment": {"held_out": 0.3},
    "verify": False,
    "seed": 3,
}


def test_all_options_are_tried():
    assert {one.name for one in fields(FusionConfig)} == {*OTHERS, "outputs", "shared"}


@pytest.mark.parametrize("name", OTHERS)
def test_every_option_is_a_keyword(name, monkeypatch):
    models = {
        "deep": networks.mlp(6, 9, 8, 7, 8, 4, seed=0),
        "shallow": networks.mlp(6, 7, 10, 4, seed=1),
    }
    proofs = []

    def counted(model, *arguments, verify, **settings):
        proofs.extend([model] * verify)
        return trace(model, *arguments, verify=verify, **settings)

    monkeypatch.setattr(stages, "trace", counted)
    base = FusionConfig(profiling={"matching_rows": 12}) if name == "seed" else FusionConfig()
    (usual,) = fuse_pairs(models, VECTORS, config=base)
    assert len(proofs) == 2
    (other,) = fuse_pairs(models, VECTORS, config=base, **{name: OTHERS[name]})
    assert len(proofs) == (2 if name == "verify" else 4)
    monkeypatch.setattr(stages, "trace", trace)
    alike = usual.state.keys() == other.state.keys() and all(
        torch.equal(usual.state[key], other.state[key]) for key in usual.state
    )
    assert alike == (name == "verify")
    assert_fused_alike(models, VECTORS, config=base, **{name: OTHERS[name]})
