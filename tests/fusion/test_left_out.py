"""Parameters that the example inputs do not reach are named, where parents have unlike ones."""

import copy
import warnings

import pytest
import torch
from torch import nn

import clafusion
from clafusion import FusionWarning, Like, Shallower, fuse, summary

INPUTS = torch.randn(120, 9, 6, generator=torch.Generator().manual_seed(0))


class Optional(nn.Module):
    """An optional condition."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.extra = nn.Linear(6, width), nn.Linear(3, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x, condition=None):
        hidden = self.first(x).mean(1)
        if condition is not None:
            hidden = hidden + self.extra(condition)
        return self.last(hidden.relu())


class Longer(Optional):
    """Longer inputs go another way."""

    def __init__(self, width=8):
        super().__init__(width)
        self.extra = nn.Linear(width, width)

    def forward(self, x):
        hidden = self.first(x).relu()
        if x.shape[1] > 12:
            hidden = hidden + self.extra(hidden)
        return self.last(hidden.mean(1))


class Auxiliary(Optional):
    """A second head in training, as GoogLeNet has."""

    def __init__(self, width=8):
        super().__init__(width)
        self.extra = nn.Linear(width, 4)

    def forward(self, x):
        hidden = self.first(x).relu().mean(1)
        return (self.last(hidden), self.extra(hidden)) if self.training else self.last(hidden)


class Dead(Optional):
    """What is computed of them is thrown away."""

    def forward(self, x):
        hidden = self.first(x).mean(1)
        self.extra(hidden[:, :3])
        return self.last(hidden.relu())


class Buffer(Optional):
    """A statistic that only another method reads."""

    def __init__(self, width=8):
        super().__init__(width)
        self.extra = nn.BatchNorm1d(width, affine=False)
        self.extra.running_mean.uniform_()
        self.extra.num_batches_tracked.fill_(int(torch.randint(100, (1,))))


KINDS = (Optional, Longer, Auxiliary, Dead, Buffer)


def made(kind, seed, width=8):
    torch.manual_seed(seed)
    return kind(width).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_unlike_parameters_that_no_example_reaches_are_named(kind):
    models = [made(kind, seed) for seed in (0, 1)]
    with pytest.warns(FusionWarning, match=r"'extra\..*has those of models\[0\]"):
        result = fuse(models, INPUTS, [0, 1])
    assert result.left_out
    assert all(name.startswith("extra.") for name in result.left_out)
    assert "extra.num_batches_tracked" not in result.left_out
    assert result.left_out[0] in summary(result)
    assert result.to_dict()["left_out"] == list(result.left_out)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ones_are_not_and_neither_are_those_that_all_weight_keeps(kind):
    models = [made(kind, seed) for seed in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        assert not fuse(models, INPUTS, [1, 0]).left_out
        models[1].extra = copy.deepcopy(models[0].extra)
        assert not fuse(models, INPUTS).left_out


def test_unlike_shapes_and_names_are_told_too():
    with pytest.warns(FusionWarning, match=r"'extra.weight', 'extra.bias'"):
        fuse([made(Optional, 0), made(Optional, 1, width=6)], INPUTS)
    other = made(Auxiliary, 1)
    other.second, other.extra = other.extra, None
    with pytest.warns(FusionWarning) as told:
        result = fuse([made(Auxiliary, 0), other], INPUTS)
    assert {name.split(".")[0] for name in result.left_out} == {"extra", "second"}
    assert "'second.weight'" in str(told[0].message)


def test_a_template_and_steps_and_many_pairs_tell_as_well():
    models = [made(Optional, seed) for seed in (0, 1, 2)]
    with pytest.warns(FusionWarning, match="those of the module of its structure"):
        fuse([models[0], models[0]], INPUTS, target=Like(made(Optional, 3)))
    with pytest.warns(FusionWarning, match=r"has those of models\[0\]"):
        result = fuse(models, INPUTS, merging="iterative")
    assert result.left_out == ("extra.weight", "extra.bias")
    with pytest.warns(FusionWarning, match="extra.weight"):
        fuse(models[:2], INPUTS, target=Shallower())
    with pytest.warns(FusionWarning, match="extra.weight"):
        (found,) = clafusion.fuse_pairs({"a": models[0], "b": models[1]}, INPUTS)
    assert any("extra.weight" in text for text in found.warnings)
