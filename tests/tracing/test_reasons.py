"""Models that cannot be fused as they are: the error says why and what to do."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clafusion import ClafusionError, fuse, fuse_pairs

ROWS = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """What the other models have in common."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0

    def plain(self, x):
        return self.two(torch.relu(self.one(x)))


class ChangesABuffer(Small):
    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return self.plain(x - self.mean)


class CountsItsCalls(Small):
    def forward(self, x):
        self.calls += 1
        return self.plain(x) * self.calls


class ReturnsALoss(Small):
    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.plain(x), labels)


class ReturnsAnObject(Small):
    def forward(self, x):
        class Found:
            """No tensor."""

        return self.plain(x), Found()


class SecondAxisIsTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


class TakesOneImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, image):
        return self.head(torch.relu(self.layer(image[None])).mean((2, 3)))[0]


class TakesAList(Small):
    def forward(self, images):
        return [self.plain(image) for image in images]


class Nodes(Small):
    def forward(self, x, edges):
        x = torch.relu(self.one(x))
        return self.two(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


@pytest.mark.parametrize(
    ("kind", "inputs", "reason"),
    [
        (ChangesABuffer, ROWS, "its forward changes 'mean', also in eval mode"),
        (CountsItsCalls, ROWS, "its forward changes 'calls', also in eval mode"),
        (ReturnsALoss, (ROWS, torch.zeros(30, dtype=torch.long)), "give inputs without labels"),
        (ReturnsAnObject, ROWS, "returns a Found, which is neither a tensor nor"),
        (SecondAxisIsTheBatch, torch.randn(12, 30, 8), "batch_first=False"),
        (TakesOneImage, torch.randn(3, 16, 16), "the first axis of the model's inputs must be the"),
        (TakesAList, (ROWS, ROWS), "a list of tensors, as models for detection do"),
        (Nodes, (ROWS, torch.zeros(2, 50, dtype=torch.long)), "the edges are an input"),
    ],
)
def test_the_reason_is_named(kind, inputs, reason):
    data = inputs if isinstance(inputs, torch.Tensor) else [inputs]
    with pytest.raises(ClafusionError) as raised:
        fuse([kind().eval(), kind().eval()], data, example_inputs=inputs, calibration="none")
    assert reason in str(raised.value)
    assert "open an issue" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning")
def test_caches_are_off_while_models_are_looked_at():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    models = [transformers.GPT2LMHeadModel(config).eval() for _ in range(2)]
    tokens = torch.randint(0, 40, (30, 8))
    fused = fuse(models, tokens, calibration="none").model
    assert all(one.config.use_cache for one in (*models, fused))
    assert fused(tokens).past_key_values is not None


def test_a_cache_that_no_setting_switches_off_is_named():
    class Cache:
        pass

    class Keeps(ReturnsAnObject):
        def forward(self, x):
            return super().forward(x), Cache()

    models = [Keeps().eval() for _ in range(2)]
    with pytest.raises(ClafusionError, match="wrap it in a module that returns its outputs alone"):
        fuse(models, ROWS, calibration="none")


def test_the_switch_of_caches_is_named_for_caches_alone():
    models = [ReturnsAnObject().eval() for _ in range(2)]
    for one in models:
        one.config = SimpleNamespace(use_cache=True)
    with pytest.raises(ClafusionError, match="wrap it in a module that returns its outputs alone"):
        fuse(models, ROWS, calibration="none")


def test_randomness_is_named_with_what_to_do():
    class Noisy(Small):
        def forward(self, x):
            return self.plain(x) + torch.randn(1)

    models = [Noisy().eval(), Noisy().eval()]
    with pytest.raises(ClafusionError, match="make its forward deterministic in eval mode"):
        fuse(models, ROWS, calibration="none")


def test_an_operation_without_rows_is_named_with_its_module_and_model():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Linear(6, 7), nn.Linear(7, 6), nn.ReLU()

        def forward(self, x):
            return self.two(self.act(self.one(x.mean(0, keepdim=True))))

    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.branch, self.head = nn.Linear(8, 6), Branch(), nn.Linear(6, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.head(x + self.branch(x))

    models = {"a": Pools().eval(), "b": Pools().eval()}
    reason = (
        r"models\['a'\]: the rows .* see each other \(operation 'mean' in 'branch' is the first"
    )
    with pytest.raises(ClafusionError, match=reason):
        fuse(models, ROWS, calibration="none")
    (pair,) = fuse_pairs(models, ROWS, calibration="none")
    assert re.search(reason, pair.error)
    assert pair.error.count("models[") == 1


def test_a_counter_that_enters_no_output_is_no_obstacle():
    class Counts(Small):
        def forward(self, x):
            self.calls += 1
            return self.plain(x)

    models = [Counts().eval(), Counts().eval()]
    assert fuse(models, ROWS, [1, 0], calibration="none").model(ROWS).shape == (30, 3)
