"""What others add: calibrations, costs of channels and options, each in the places named."""

from dataclasses import dataclass

import pytest
import torch

from clafusion import (
    Calibrated,
    Calibration,
    FusionConfig,
    InputError,
    LeastSquares,
    Matching,
    average,
    calibrates,
    channel_cost,
    fuse,
    trace,
)
from clafusion.calibration import methods
from clafusion.config import CHANNEL_COSTS, flag, number, options_of
from clafusion.matching import activation_costs
from tests.support import networks
from tests.support.assertions import assert_same_function
from tests.support.attention import TOKENS, Encoder, shuffled
from tests.support.data import VECTORS
from tests.support.results import moved_parent


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(Calibration, "_variants", dict(Calibration._variants))
    monkeypatch.setattr(CHANNEL_COSTS, "_values", dict(CHANNEL_COSTS._values))
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(activation_costs, "_MEASURES", dict(activation_costs._MEASURES))


def models(count=3):
    widths = [(9, 9, 9), (9,), (8, 7)]
    return [networks.mlp(12, *one, 5, seed=seed) for seed, one in enumerate(widths[:count])]


# --- calibrations ---------------------------------------------------------------------------------


def shrinking():
    @dataclass(frozen=True)
    class Shrink(Calibration, name="shrink"):
        """Make all weights smaller."""

        factor: float = number(0.5, "by how much", high=1.0)
        biases: bool = flag(False, "whether biases get smaller, too")

    @calibrates(Shrink)
    def shrink(problem, data, settings, *, seed, progress):
        assert data is VECTORS
        assert seed == 11
        if progress is not None:
            progress("calibrate", len(VECTORS))
        return {
            name: tensor * settings.factor if settings.biases or tensor.dim() > 1 else tensor
            for name, tensor in average(problem).items()
        }

    return Shrink


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("strategy", ["many_to_one", "barycentre"])
@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")
def test_a_calibration_of_others_is_a_class_and_a_function(count, strategy):
    kind = shrinking()
    told = []
    for given, factor, biases in [
        ("shrink", 0.5, False),
        (kind(factor=0.25), 0.25, False),
        ({"name": "shrink", "factor": 0.75, "biases": True}, 0.75, True),
    ]:
        result = fuse(
            models(count),
            VECTORS,
            calibration=given,
            merging=strategy,
            seed=11,
            progress=lambda *one: told.append(one),
        )
        assert result.config.calibration == kind(factor, biases)
        assert result.anchor is None
        plain = average(result.problem)
        for name, tensor in result.model.state_dict().items():
            shrunk = biases or tensor.dim() > 1
            assert torch.equal(tensor, plain[name] * factor if shrunk else plain[name])
    assert told.count(("calibrate", len(VECTORS))) == 3


def test_its_options_are_checked_listed_and_written_as_all_others():
    kind = shrinking()
    config = FusionConfig(calibration={"name": "shrink", "factor": 0.75})
    assert FusionConfig.parse(config.to_dict(), "config") == config
    assert config.to_dict()["calibration"] == {"name": "shrink", "factor": 0.75, "biases": False}
    options = {one.path: one for one in options_of(FusionConfig)}
    assert options["calibration"].choices["shrink"] == "Make all weights smaller"
    factor = options["calibration.factor"]
    assert (factor.flag, factor.default, factor.of) == ("--calibration-factor", 0.5, ("shrink",))
    for given, message in [
        ({"name": "shrink", "factor": 2.0}, r"calibration\.factor must be in \[0, 1\]; got 2.0"),
        ({"name": "shrink", "biases": 1}, r"calibration\.biases must be True or False; got 1"),
        ({"name": "shrink", "fator": 1}, "calibration has no option 'fator'; did you mean 'factor"),
        ("shrnk", "calibration must be one of 'auto', .*'shrink'; got 'shrnk'"),
    ]:
        with pytest.raises(InputError, match=f"^{message}"):
            fuse(models(), VECTORS, calibration=given)
    assert Calibration.variants()["shrink"] is kind


def test_it_may_return_a_network_and_an_anchor_and_use_what_is_there():
    @dataclass(frozen=True)
    class Leaning(LeastSquares, name="leaning"):
        """Least squares that leans."""

    @calibrates(Leaning)
    def leaning(problem, data, settings, *, seed, progress):
        assert settings.samples == 50
        inner = LeastSquares(anchor=0.5, samples=settings.samples)
        found = methods.calibrate(problem, data, inner, seed=seed, progress=progress)
        return Calibrated(found.model, found.anchor)

    given = {"name": "leaning", "samples": 50}
    result = fuse(models(), VECTORS, calibration=given)
    wanted = fuse(models(), VECTORS, calibration=LeastSquares(anchor=0.5, samples=50))
    assert result.anchor == wanted.anchor == 0.5
    for one, other in zip(result.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_calibration_that_no_function_does_is_refused():
    @dataclass(frozen=True)
    class Forgotten(Calibration, name="forgotten"):
        """Nobody does it."""

    with pytest.raises(InputError, match="no function does the calibration 'forgotten': register"):
        fuse(models(), VECTORS, calibration=Forgotten())


# --- costs of channels ----------------------------------------------------------------------------


def register_angle():
    @channel_cost("angle", "one minus the cosine of the channels' values")
    def angle(x, y):
        x, y = x.double(), y.double()
        return 1 - (x / x.norm(dim=0)).T @ (y / y.norm(dim=0))

    return angle


def test_a_cost_of_others_is_a_function():
    angle = register_angle()
    first, second = networks.mlp(12, 9, 8, 5), networks.mlp(12, 9, 8, 5, seed=1)
    result = fuse([first, second], VECTORS, matching=Matching(cost="angle", solver="assignment"))
    parent = moved_parent(result)
    correspondence = parent.correspondence
    assert len(parent.plans) == 2
    for group, plan in enumerate(parent.plans):
        (pair,) = correspondence.hooks[group]
        x = parent.profile.rows[pair.source][:, pair.source_columns]
        y = result.aligned.profiles[0].rows[pair.target][:, pair.target_columns]
        costs = angle(x, y)
        best = float((costs * (plan.dense() > 0)).sum())
        draw = torch.Generator().manual_seed(0)
        for _ in range(200):
            other = costs[torch.arange(len(costs)), torch.randperm(len(costs), generator=draw)]
            assert best <= float(other.sum()) + 1e-9
    option = next(one for one in options_of(FusionConfig) if one.path == "matching.cost")
    assert option.choices["angle"] == "one minus the cosine of the channels' values"
    config = FusionConfig(matching="angle")
    assert FusionConfig.parse(config.to_dict(), "config") == config


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_permuted_copies_are_recovered_by_it_also_heads(calibration):
    register_angle()
    model = networks.mlp(12, 20, 17, 5)
    copies = [networks.permuted_copy(model, VECTORS, seed) for seed in (1, 2)]
    settings = {"matching": "angle", "calibration": calibration}
    assert_same_function(
        fuse([model, *copies], VECTORS, **settings).model, model, VECTORS, calibration
    )
    torch.manual_seed(0)
    encoder = networks.randomise(Encoder()).eval()
    result = fuse([encoder, moved_heads(encoder)], TOKENS, **settings)
    assert_same_function(result.model, encoder, TOKENS, calibration)
    assert moved_parent(result).head_orders


def moved_heads(model):
    return shuffled(model, trace(model, TOKENS))


def test_a_cost_may_be_made_of_the_mean_over_the_hook_points():
    @channel_cost("again", "as the correlation", of_mean=lambda mean: 1.0 - mean)
    def again(x, y):
        return activation_costs.correlations(x, y)

    resnets = [networks.resnet(2, 1), networks.resnet(1, 1, seed=1), networks.resnet(1, 2, seed=2)]
    images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one = fuse(resnets, images, matching="again").model.state_dict()
    other = fuse(resnets, images, matching="correlation").model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["correlation", "weights", "both", "angle"])
def test_a_cost_is_not_replaced(name):
    register_angle()
    helps = dict(CHANNEL_COSTS)
    with pytest.raises(ValueError, match=f"there is a channel cost '{name}' already"):
        channel_cost(name, "another one")(lambda x, y: x.T @ y)
    assert dict(CHANNEL_COSTS) == helps


def test_a_cost_of_others_needs_a_line_of_help():
    with pytest.raises(ValueError, match="channel cost 'mute' needs a line of help"):
        channel_cost("mute")(lambda x, y: x.T @ y)
    assert "mute" not in CHANNEL_COSTS


def test_what_a_test_registers_is_forgotten():
    assert "angle" not in CHANNEL_COSTS
    assert "shrink" not in Calibration.variants()
    with pytest.raises(InputError, match=r"matching\.cost must be one of 'correlation', "):
        FusionConfig(matching="angle")
