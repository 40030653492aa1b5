"""Walks whose convolutions read channels that lie innermost compute what the model computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import fuse, trace
from clafusion.calibration import epilogues
from clafusion.execution import channels_last
from clafusion.execution.channels_last import is_channels_last
from clafusion.execution.walk import Walk
from clafusion.profiling.moments import channel_moments

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """A residual network whose blocks write in place, as torchvision's do."""

    def __init__(self, width=6, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth + 1))
        self.blocks = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.norms[0](self.stem(x)), inplace=True)
        for block, norm in zip(self.blocks, self.norms[1:], strict=True):
            out = norm(block(x))
            out += x
            x = F.relu(out, inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OfConvolutions(nn.Module):
    """Convolutions, and between them what a test asks for."""

    def __init__(self, between, out=6, groups=1):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(out, 6, 3, padding=1, groups=groups)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x))).flatten(2).mean(2)


class ByPosition(nn.Module):
    """What views its input as rows of channels, which only the usual order allows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return self.inner(x.view(x.size(0), x.size(1), 64)).view_as(x)


class Innermost(nn.Module):
    """What lays its own values out with channels innermost, and views them then (ConvNeXt)."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.inner(self.norm(x.permute(0, 2, 3, 1)))
        y = y.permute(0, 3, 1, 2)
        rows = y.permute(0, 2, 3, 1).view(-1, 6)  # a view of this order alone
        return y * rows.mean()


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))


class OnMoreAxes(nn.Module):
    """What broadcasts to more axes than images have, and views these then."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.randn(2, 1, 1, 1, 1))

    def forward(self, x):
        return (x * self.scales).view(2, x.size(0), 6 * 64).sum(0).view_as(x)


class OfOtherWeights(nn.Module):
    """A convolution by computed weights with channels innermost, which its output has, too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 6))

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.weight.permute(0, 3, 1, 2), padding=1))
        return y * y.permute(0, 2, 3, 1).view(-1, 6).mean()


class OfImagesAsWeights(nn.Module):
    """A convolution in groups whose weights another convolution puts out."""

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.randn(6, 3, 5, 5))
        self.weights = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        y = F.conv2d(x, self.weights(self.image * 1.0), padding=1, groups=2)
        return y.view(x.size(0), -1).view_as(x)


class InItsOwnOrder(nn.Module):
    """Adds convolutions of which only the first puts channels innermost, as their sum has them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        usual = self.first(x.contiguous())
        x = F.relu(self.last(x) + usual).permute(0, 2, 3, 1)
        return self.head(x.view(x.size(0) * 64, -1).view(x.size(0), 64, -1).mean(1))


class Head(nn.Sequential):
    """A classifier that writes in place, as VGG's and EfficientNet's do."""

    def __init__(self):
        norm, in_place = nn.BatchNorm2d(3), {"inplace": True}
        images = [nn.Conv2d(3, 6, 3), nn.ReLU(**in_place), nn.Conv2d(6, 3, 3), norm, nn.Flatten()]
        vectors = [nn.Linear(48, 8), nn.ReLU(**in_place), nn.Dropout(**in_place), nn.Linear(8, 4)]
        super().__init__(*images, nn.Dropout(**in_place), *vectors)


def written_behind_a_view(x):
    rows = x.view(x.size(0), 6, 64)
    rows.relu_()
    return x


def read_before_it_is_written(x):
    rows = x.view(x.size(0), 6, 64)
    x.relu_()
    return x + rows.view_as(x)


def shuffled(x):
    return x.view(x.size(0), 2, 3, 8, 8).transpose(1, 2).flatten(1, 2)


MODELS = {
    "residual, in place": Blocks,
    "head, in place": Head,
    "view": lambda: OfConvolutions(ByPosition()),
    "own order": lambda: OfConvolutions(Innermost()),
    "more axes": lambda: OfConvolutions(OnMoreAxes()),
    "other weights": lambda: OfConvolutions(OfOtherWeights()),
    "images as weights": lambda: OfConvolutions(OfImagesAsWeights()),
    "gate": lambda: OfConvolutions(Gate()),
    "dense": lambda: OfConvolutions(lambda x: torch.cat([x, F.relu(x)], 1), out=12),
    "shuffled": lambda: OfConvolutions(shuffled),
    "groups": lambda: OfConvolutions(F.relu, groups=2),
    "depthwise": lambda: OfConvolutions(F.relu, groups=6),
    "slices": lambda: OfConvolutions(lambda x: x[:, 1:4] * x[:, 2:5], out=3),
    "pooled": lambda: OfConvolutions(lambda x: F.max_pool2d(F.silu(x), 2)),
    "padded": lambda: OfConvolutions(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)), out=8),
    "written behind a view": lambda: OfConvolutions(written_behind_a_view),
    "read before it is written": lambda: OfConvolutions(read_before_it_is_written),
}


def traced_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    return model, trace(model, IMAGES, verify=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_in_the_fastest_order_computes_the_same(name):
    model, traced = traced_model(name)
    (found,) = Walk(traced, (IMAGES,), traced.state(), set(), fastest=True).finish()
    with torch.no_grad():
        torch.testing.assert_close(found, model(IMAGES), rtol=1e-5, atol=1e-5)


def orders_of_convolutions(name):
    """Return for each convolution whether what it reads and makes lies with channels innermost."""
    _, traced = traced_model(name)
    walk = Walk(traced, (IMAGES,), traced.state(), set(), fastest=True)
    made = {}
    for node in walk:
        if node.target is torch.ops.aten.conv2d.default:
            made[node.name] = is_channels_last(walk.value(node))
    return list(made.values())


@pytest.mark.parametrize(
    "name", ["residual, in place", "head, in place", "view", "gate", "dense", "depthwise"]
)
def test_convolutions_are_given_channels_innermost(name):
    found = orders_of_convolutions(name)
    # What a gate reads is one pixel, which lies in either order.
    assert found == [True, False, True] if name == "gate" else all(found)
    assert found


@pytest.mark.parametrize("name", ["read before it is written", "groups"])
def test_where_that_would_be_wrong_or_slow_they_are_not(name):
    assert orders_of_convolutions(name)[-1] is False


def test_dropout_that_draws_in_place_writes():
    _, traced = traced_model("head, in place")
    nodes = [
        one for one in traced.module.graph.nodes if one.target is torch.ops.aten.dropout_.default
    ]
    assert len(nodes) == 2
    for node in nodes:
        assert channels_last._writes_its_own(node)
        node.args = (*node.args[:2], True)
        assert not channels_last._writes_its_own(node)


def test_by_itself_a_walk_keeps_the_models_order():
    _, traced = traced_model("residual, in place")
    walk = Walk(traced, (IMAGES,), traced.state(), set())
    values = [walk.value(node) for node in walk]
    assert not any(is_channels_last(one) for one in values if isinstance(one, torch.Tensor))


def test_weights_that_lie_otherwise_decide_themselves():
    torch.manual_seed(0)
    model = Blocks().eval().to(memory_format=torch.channels_last)
    traced = trace(model, IMAGES, verify=False)
    (found,) = Walk(traced, (IMAGES,), traced.state(), set(), fastest=True).finish()
    with torch.no_grad():
        torch.testing.assert_close(found, model(IMAGES), rtol=1e-5, atol=1e-5)


def test_moments_do_not_depend_on_the_order():
    usual = channel_moments(IMAGES, 1)
    other = channel_moments(IMAGES.contiguous(memory_format=torch.channels_last), -3)
    for one, same in zip(usual, other, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-6)


def test_fusions_in_either_order_are_the_same(monkeypatch):
    torch.manual_seed(0)
    models = [Blocks(7, 3).eval(), Blocks(6, 2).eval()]
    for model in models:
        with torch.no_grad():
            for one in model.norms:
                one.running_mean.uniform_(-0.2, 0.2)
                one.running_var.uniform_(0.5, 2)

    def fused():
        result = fuse(models, IMAGES.repeat(2, 1, 1, 1), calibration="repair")
        return result.model.state_dict()

    fastest = fused()
    monkeypatch.setattr("clafusion.execution.walk.can_be_moved", lambda _: False)
    usual = fused()
    assert not all(torch.equal(fastest[name], usual[name]) for name in usual)  # by rounding
    for name in usual:
        torch.testing.assert_close(fastest[name], usual[name], rtol=1e-3, atol=1e-4)


def test_a_repaired_sum_lies_as_what_was_repaired():
    torch.manual_seed(0)
    images = IMAGES.repeat(2, 1, 1, 1).permute(0, 2, 3, 1).contiguous()
    result = fuse([InItsOwnOrder().eval() for _ in range(2)], images, calibration="repair")
    assert torch.isfinite(result.model(images)).all()


def test_what_is_added_may_lie_in_another_order():
    value, other = IMAGES.contiguous(memory_format=torch.channels_last), IMAGES.flip(0)
    lying = epilogues._lying_as(value, other, 1)
    assert torch.equal(lying, other.permute(0, 2, 3, 1))
    assert lying.is_contiguous()
