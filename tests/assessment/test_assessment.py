import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clafusion
from clafusion import (
    Assessment,
    AssessmentWarning,
    FusionAssessment,
    FusionConfig,
    InputError,
    fuse,
    fuse_pairs,
)
from clafusion.assessment import own_outputs
from clafusion.assessment.assess import warn_of
from clafusion.assessment.comparison import Comparison, is_nearer
from clafusion.assessment.nearness import Nearness
from clafusion.assessment.output_cache import OutputCache, OutputStream
from clafusion.fusion import align, fuse_aligned
from clafusion.profiling import moments
from clafusion.profiling.batches import Part, has_rows, keeps_order
from tests.support import networks

COUNT = 600
HELD = torch.arange(9, COUNT, 10)
VECTORS = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(5))


def pair(outputs=4):
    return [networks.mlp(6, 9, 8, outputs, seed=1), networks.mlp(6, 7, outputs, seed=2)]


def same_bytes(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


class Nested(nn.Module):
    """Puts out ids, logits of each position, and something else."""

    def __init__(self, *widths, seed=0):
        super().__init__()
        self.body = networks.mlp(*widths, seed=seed)

    def forward(self, x):
        logits = self.body(x)
        return {"ids": logits.argmax(-1), "logits": logits, "more": logits.mean(-1)}


class Keyword(nn.Module):
    def __init__(self, *widths, seed=0):
        super().__init__()
        self.body = networks.mlp(*widths, seed=seed)

    def forward(self, *, features):
        return self.body(features)


class Image(nn.Module):
    def __init__(self, width, depth=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        inner = [
            layer
            for _ in range(depth)
            for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        ]
        self.body = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 3, 1)
        )

    def forward(self, x):
        return self.body(x)


class Free(nn.Module):
    """The same for any batch size."""

    def __init__(self, *widths, seed=0):
        super().__init__()
        self.body = networks.mlp(*widths, seed=seed)

    def forward(self, x):
        return self.body(x.reshape(-1, 6))


class OneSize(nn.Module):
    """Admits the batch size 3 only."""

    def __init__(self, *widths, seed=0):
        super().__init__()
        self.body = networks.mlp(*widths, seed=seed)

    def forward(self, x):
        return self.body(x.reshape(3, 6))


# --- the figures --------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_equations():
    models, weights = pair(), [0.3, 0.7]
    result = fuse(models, VECTORS, weights, combine="probabilities")
    x = VECTORS[HELD]
    with torch.no_grad():
        outputs = [model(x).double().softmax(-1) for model in (*models, result.model)]
    mean = 0.3 * outputs[0] + 0.7 * outputs[1]
    found = result.assessment
    assert (found.kind, found.num_inputs, found.held_out) == ("classes", 60, True)
    assert list(found.parents) == ["models[0]", "models[1]"]
    for one, near in zip(outputs, (*found.parents.values(), found.result), strict=True):
        divergence = (mean * (mean / one).log()).sum(-1).mean()
        assert near.distance == pytest.approx(float(divergence), rel=1e-6)
        assert near.agreement == float((one.argmax(-1) == mean.argmax(-1)).double().mean())
    first, second = outputs[:2]
    apart = ((first - second) * (first / second).log()).sum(-1).mean() / 2
    assert found.between_parents.distance == pytest.approx(float(apart), rel=1e-6)
    alike = (first.argmax(-1) == second.argmax(-1)).double().mean()
    assert found.between_parents.agreement == float(alike)
    assert result.timings["assess"] > 0
    assert list(result.timings)[-1] == "assess"


def test_values_are_compared_by_their_relative_squared_error():
    models = pair()
    result = fuse(models, VECTORS, assessment="values")
    x = VECTORS[HELD]
    with torch.no_grad():
        first, second, fused = (model(x).double() for model in (*models, result.model))
    mean = (first + second) / 2
    scale = (mean - mean.mean(0)).square().sum()
    found = result.assessment
    assert found.kind == "values"
    assert found.result.agreement is None
    assert found.result.distance == pytest.approx(float((fused - mean).square().sum() / scale))
    expected = (first - mean).square().sum() / scale
    assert found.parents["models[0]"].distance == pytest.approx(float(expected))
    assert found.between_parents.distance == pytest.approx(
        float((first - second).square().sum() / scale)
    )


@pytest.mark.parametrize("outputs", ["auto", "values"])
@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_a_network_fused_with_itself_is_as_near_as_can_be(outputs, calibration):
    model = networks.mlp(6, 9, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fuse([model, model], VECTORS, calibration=calibration, assessment=outputs)
    found = result.assessment
    assert found.result.distance == pytest.approx(0, abs=1e-5)
    assert found.result.agreement in (None, 1.0)
    assert found.between_parents.distance == 0
    assert not found.nearer
    assert "No parent alone comes clearly nearer" in found.verdict


def test_all_the_weight_on_one_parent_is_that_parent():
    result = fuse(pair(), VECTORS, [1, 0], calibration="none")
    found = result.assessment
    assert found.parents["models[0]"].distance == 0
    assert found.nearest_parent == "models[0]"
    assert found.result.distance == pytest.approx(0, abs=1e-9)


def test_networks_that_put_out_probabilities_are_compared_by_these():
    logits = pair()
    soft = [nn.Sequential(*one, nn.Softmax(-1)) for one in logits]
    plain = fuse(logits, VECTORS, calibration="none").assessment
    found = fuse(soft, VECTORS, calibration="none").assessment
    for name in found.parents:
        distance = plain.parents[name].distance
        assert found.parents[name].distance == pytest.approx(distance, rel=1e-3)


def test_a_result_that_is_not_finite_is_infinitely_far():
    class Broken(clafusion.Calibration, name="broken_by_test"):
        """Make everything NaN."""

    @clafusion.calibrates(Broken)
    def _broken(problem, *_, **__):
        return {name: one * math.nan for name, one in clafusion.average(problem).items()}

    try:
        with pytest.warns(AssessmentWarning, match=r"Try calibration='least_squares', more data"):
            result = fuse(pair(), VECTORS, calibration=Broken())
    finally:
        clafusion.Calibration._variants.pop("broken_by_test")
    assert result.assessment.result.distance == math.inf
    sent = json.loads(json.dumps(result.assessment.to_dict(), allow_nan=False))
    assert FusionAssessment.from_dict(sent) == result.assessment


# --- the warning --------------------------------------------------------------------------------


class Destroy(clafusion.Calibration, name="destroy_by_test"):
    """Make the result of no use."""


@clafusion.calibrates(Destroy)
def _destroy(problem, *_, **__):
    return {name: -5 * one for name, one in clafusion.average(problem).items()}


clafusion.Calibration._variants.pop("destroy_by_test")  # no choice in other tests' lists


def test_a_destroyed_result_is_told_with_what_to_try():
    models = dict(zip(("a", "b"), pair(), strict=True))
    with pytest.warns(AssessmentWarning) as told:
        result = fuse(models, VECTORS, calibration=Destroy())
    (one,) = told
    assert one.filename == __file__
    text = str(one.message)
    assert " alone comes nearer to the parents together than the result, on 60 inputs" in text
    assert "Try calibration='least_squares', more data, a wider target" in text
    assert text.endswith("training (clafusion.distill)")
    assert result.assessment.nearer
    assert text.startswith(f"{result.assessment.verdict}. Try ")
    shown = clafusion.summary(result)
    assert f"assessed     {result.assessment.verdict}" in shown
    assert "to the parents together" in shown
    assert f"{result.assessment.result.distance:.3g}" in shown


def test_least_squares_is_not_advised_to_who_has_it():
    bad = FusionAssessment(
        kind="values",
        result=Nearness(2.0),
        parents={"a": Nearness(0.5), "b": Nearness(0.4)},
        between_parents=Nearness(1.0),
        num_inputs=9,
        held_out=False,
        nearer=("a", "b"),
    )
    with pytest.warns(AssessmentWarning, match="Try more data, a wider target") as told:
        warn_of(bad, FusionConfig(calibration="least_squares"))
    assert str(told[0].message).startswith(
        "b alone comes nearer to the parents together than the result, on 9 inputs that the fusion "
        "has seen: relative"
    )


def test_a_difference_within_the_noise_is_no_reason_to_warn():
    parent = torch.rand(50, generator=torch.Generator().manual_seed(1)).double()
    noise = torch.randn(50, generator=torch.Generator().manual_seed(2)).double()
    noise = (noise - noise.mean()) / noise.std()
    error = 50**-0.5
    assert not is_nearer(parent, parent + 1.9 * error + noise)
    assert is_nearer(parent, parent + 2.1 * error + noise)
    assert not is_nearer(parent, parent + 0.9e-4)
    assert is_nearer(parent[:1], parent[:1] + 1.1e-4)
    assert is_nearer(parent, parent * math.inf)
    assert not is_nearer(parent * math.inf, parent * math.inf)


# --- what is held out ---------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
@pytest.mark.parametrize("strategy", ["many_to_one", "barycentre"])
@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")
def test_what_is_held_out_does_not_reach_the_result(calibration, strategy):
    options = {"calibration": calibration, "merging": {"strategy": strategy}}
    example = VECTORS[:2]
    changed = VECTORS.clone()
    changed[HELD] = 100 * torch.randn(len(HELD), 6)
    usual = fuse(pair(), VECTORS, example_inputs=example, **options)
    other = fuse(pair(), changed, example_inputs=example, **options)
    assert same_bytes(usual.model, other.model)
    assert usual.assessment != other.assessment
    seen = changed
    seen[10] *= 2
    assert not same_bytes(usual.model, fuse(pair(), seen, example_inputs=example, **options).model)


def test_three_models_one_after_another_are_assessed_as_all_at_once():
    models = [*pair(), networks.mlp(6, 8, 4, seed=3)]
    example = VECTORS[:2]
    changed = VECTORS.clone()
    changed[HELD] = 100 * torch.randn(len(HELD), 6)
    results = [
        fuse(models, one, [2, 1, 1], example_inputs=example, merging={"strategy": "iterative"})
        for one in (VECTORS, changed)
    ]
    assert same_bytes(results[0].model, results[1].model)
    at_once = fuse(models, VECTORS, [2, 1, 1])
    assert results[0].assessment.parents == at_once.assessment.parents
    assert results[0].assessment.between_parents == at_once.assessment.between_parents
    assert [step.assessment for step in results[0].steps] == [None, None]


def test_any_form_of_the_data_holds_out_the_same_rows():
    labels = torch.zeros(COUNT)
    forms = {
        "list": list(VECTORS.split(7)),
        "tuples": list(zip(VECTORS.split(30), labels.split(30), strict=True)),
        "loader": DataLoader(TensorDataset(VECTORS, labels), batch_size=16),
        "single rows": [(VECTORS[i : i + 1],) for i in range(COUNT)],
    }
    usual = fuse(pair(), VECTORS, calibration="none", example_inputs=VECTORS).assessment
    assert usual.held_out
    for name, form in forms.items():
        found = fuse(pair(), form, calibration="none", example_inputs=VECTORS).assessment
        assert (found.num_inputs, found.held_out) == (60, True), name
        assert found.parents["models[0]"].distance == pytest.approx(
            usual.parents["models[0]"].distance
        ), name


def test_keyword_inputs_are_held_out_by_rows():
    models = [Keyword(6, 9, 8, 4, seed=1), Keyword(6, 7, 4, seed=2)]
    data = [{"features": one, "other": "text"} for one in VECTORS.split(25)]
    found = fuse(models, data, example_inputs={"features": VECTORS[:4]}, calibration="none")
    plain = fuse([one.body for one in models], VECTORS, calibration="none")
    assert found.assessment.held_out
    assert found.assessment.parents == plain.assessment.parents


def test_data_in_another_order_each_time_is_not_held_out():
    loader = DataLoader(TensorDataset(VECTORS), batch_size=20, shuffle=True)
    found = fuse(pair(), loader, calibration="none").assessment
    assert (found.num_inputs, found.held_out) == (100, False)
    assert "kept out" not in found.verdict


@pytest.mark.parametrize(("count", "held_out"), [(49, False), (499, False), (500, True)])
def test_of_few_inputs_none_is_held_out(count, held_out):
    found = fuse(pair(), VECTORS[:count], calibration="none").assessment
    assert found.held_out is held_out
    assert found.num_inputs == (50 if held_out else min(count, 100))


def test_models_of_one_batch_size_see_whole_batches():
    batches = list(VECTORS.split(3))
    models = {"one": OneSize(6, 9, 8, 4, seed=1), "other": OneSize(6, 7, 4, seed=2)}
    found = fuse(models, batches).assessment
    assert (found.num_inputs, found.held_out) == (102, False)
    models["free"] = Free(6, 8, 8, 4, seed=3)
    mixed = {name: models[name] for name in ("one", "free")}
    result = fuse(mixed, batches)
    assert not result.assessment.held_out
    (paired,) = fuse_pairs(mixed, batches)
    assert paired.error is None
    assert paired.assessment == result.assessment


def test_the_share_is_an_option_and_nothing_need_be_assessed():
    models = pair()
    half = fuse(models, VECTORS, assessment=Assessment(held_out=0.5)).assessment
    assert (half.num_inputs, half.held_out) == (300, True)
    none = fuse(models, VECTORS, assessment=Assessment(held_out=0))
    assert (none.assessment.num_inputs, none.assessment.held_out) == (100, False)
    off = fuse(models, VECTORS, assessment="none")
    assert off.assessment is None
    assert "assess" not in off.timings
    assert same_bytes(off.model, none.model)
    assert "to the parents together" not in clafusion.summary(off)
    paper = fuse(models, VECTORS, config=FusionConfig.paper(match_outputs=False))
    assert not paper.assessment.held_out


def test_what_is_wrong_with_a_row_that_is_held_out_shows_before_the_fusion():
    bad = list(VECTORS.clone().split(50))
    bad[2][9] = math.nan  # of which a profile would see nothing
    with pytest.raises(InputError, match="data, batch 2 holds 6 NaN"):
        align(pair(), bad)


def test_parts_are_disjoint_whole_and_iterable():
    batches = [(one, "text") for one in VECTORS.split(33)]
    kept, held = (list(Part(batches, 0.1, held=one)) for one in (False, True))
    assert all(text == "text" for _, text in (*kept, *held))
    assert torch.equal(torch.cat([one for one, _ in held]), VECTORS[HELD])
    assert sum(len(one) for one, _ in kept) + len(HELD) == COUNT
    assert has_rows(batches, COUNT)
    assert not has_rows(batches, COUNT + 1)
    assert keeps_order(batches)

    class Changing:
        def __iter__(self):
            return iter([torch.randn(5, 3)])

    assert not keeps_order(Changing())


# --- all ways to fuse ---------------------------------------------------------------------------


def test_every_way_to_fuse_gives_the_same_figures(tmp_path):
    models = dict(zip(("a", "b"), pair(), strict=True))
    usual = fuse(models, VECTORS, [2, 1])
    assert fuse(models, VECTORS, [2, 1]).assessment == usual.assessment
    in_parts = fuse_aligned(align(models, VECTORS), VECTORS, [2, 1])
    assert in_parts.assessment == usual.assessment
    (paired,) = fuse_pairs(models, VECTORS, weights=[2, 1], out_dir=tmp_path)
    assert paired.assessment == usual.assessment
    assert paired.distance == usual.assessment.result.distance
    assert paired.agreement == usual.assessment.result.agreement
    assert same_bytes(paired.model, usual.model)
    (again,) = fuse_pairs(models, VECTORS, weights=[2, 1], out_dir=tmp_path)
    assert again.resumed
    assert again.assessment == usual.assessment
    table = clafusion.summary([paired])
    assert "agreement" in table
    assert f"{paired.distance:.3g}" in table


def test_a_pair_that_failed_has_no_figures():
    models = {"a": networks.mlp(6, 9, 4), "b": networks.mlp(6, 9, 5)}
    (paired,) = fuse_pairs(models, VECTORS)
    assert paired.error is not None
    assert paired.assessment is None
    assert paired.distance == math.inf
    assert "failed" in clafusion.summary([paired])


def test_the_result_keeps_its_mode_and_what_trains_in_it():
    models = [one.train() for one in pair()]
    result = fuse(models, VECTORS)
    assert result.model.training
    assert all(one.training for one in models)
    assert all(one.requires_grad and one.grad is None for one in result.model.parameters())


def test_matched_outputs_are_compared_in_the_order_of_the_result():
    model = networks.mlp(6, 9, 8, 4, seed=1)
    order = [2, 0, 3, 1]
    moved = networks.mlp(6, 9, 8, 4, seed=1)
    with torch.no_grad():
        for one in (moved[-1].weight, moved[-1].bias):
            one.copy_(one[order])
    config = FusionConfig.paper()
    found = fuse([model, moved], VECTORS, config=config).assessment
    assert found.between_parents.distance == pytest.approx(0, abs=1e-9)
    assert found.result.distance == pytest.approx(0, abs=1e-9)


# --- which output -------------------------------------------------------------------------------


def test_of_several_outputs_the_first_floating_one_counts():
    models = [Nested(6, 9, 8, 4, seed=1), Nested(6, 7, 4, seed=2)]
    found = fuse(models, VECTORS, calibration="none").assessment
    plain = fuse([one.body for one in models], VECTORS, calibration="none").assessment
    assert found == plain


def test_images_are_values_unless_an_axis_is_named():
    images = torch.randn(60, 2, 5, 5, generator=torch.Generator().manual_seed(3))
    models = [Image(4, 2, seed=1), Image(5, 1, seed=2)]
    assert fuse(models, images).assessment.kind == "values"
    for given in (Assessment(axis=1), Assessment("classes", axis=1)):
        found = fuse(models, images, assessment=given).assessment
        assert found.kind == "classes"
        with torch.no_grad():
            first, second = (one(images[9::10]).softmax(1) for one in models)
        alike = (first.argmax(1) == second.argmax(1)).double().mean()
        assert found.between_parents.agreement == pytest.approx(float(alike))


def test_one_number_for_each_input_is_a_value():
    assert fuse(pair(1), VECTORS).assessment.kind == "values"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axis": 0}, r"assessment.axis=0 must be an axis with at least 2 classes; the outputs"),
        ({"axis": 2}, r"assessment.axis=2 .* have the shape \(batch, 4\)"),
        ({"outputs": "classes", "axis": -2}, "assessment.axis=-2 must"),
        ({"outputs": "labels"}, "assessment.outputs must be one of 'auto', 'classes'"),
        ({"held_out": 0.95}, r"assessment.held_out must be in \[0, 0.9\]; got 0.95"),
        ({"share": 0.1}, "assessment has no option 'share'"),
        (0.2, r"assessment must be Assessment\(...\)"),
    ],
)
def test_bad_options_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        fuse(pair(), VECTORS, assessment=given)


def test_classes_need_a_floating_output():
    class Ids(Nested):
        def forward(self, x):
            return self.body(x).argmax(-1)

    models = [Ids(6, 9, 8, 4, seed=1), Ids(6, 7, 4, seed=2)]
    with pytest.raises(InputError, match=r"assessment.outputs='classes' needs a floating output"):
        fuse(models, VECTORS, assessment="classes", verify=False, calibration="none")


# --- outputs that are kept ----------------------------------------------------------------------


def test_known_outputs_are_those_of_the_same_inputs():
    aligned = align(pair(), VECTORS)
    other_data = VECTORS.flip(0).clone()
    known = OutputCache()
    for data, share in ((VECTORS, 0.1), (VECTORS, 0.2), (other_data, 0.1), (VECTORS, 0.1)):
        config = FusionConfig(assessment=Assessment(held_out=share), calibration="none")
        wanted = fuse_aligned(aligned, data, config=config).assessment
        found = fuse_aligned(aligned, data, config=config, known_outputs=known).assessment
        assert found == wanted


def test_known_outputs_hold_nothing_else():
    class View(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)[:, :2]

    traced = clafusion.trace(View(networks.mlp(6, 9, 4)), VECTORS)
    known = OutputCache()
    inputs = (VECTORS[:10],)
    found = known.get(traced, inputs, 0)
    assert known.num_bytes == 10 * 2 * 4
    again = known.get(traced, inputs, 0)
    assert torch.equal(again, found)
    assert again.untyped_storage().nbytes() == known.num_bytes
    known.forget()
    assert known.num_bytes == 0


@pytest.mark.parametrize(
    ("shown", "kind"),
    [
        (lambda y: y[:, 0], "values"),  # no axis but the batch's
        (lambda y: y.squeeze(-1) if y.size(-1) == 1 else y.sum(-1), "values"),
        (lambda y: (None, y), "classes"),
        (lambda y: (y > 0, y), "classes"),
        (lambda y: y > 0, None),
    ],
    ids=["column", "sum", "nothing beside", "flags beside", "flags"],
)
def test_outputs_of_any_form_are_assessed_or_left_out(shown, kind):
    class Shown(nn.Module):
        def __init__(self, hidden, seed):
            super().__init__()
            self.inner = networks.mlp(12, hidden, 5, seed=seed)

        def forward(self, x):
            return shown(self.inner(x))

    data = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    for calibration in ("none", "repair", "least_squares"):
        models = [Shown(9, 0).eval(), Shown(7, 1).eval()]
        found = clafusion.fuse(models, data, calibration=calibration).assessment
        assert (None if found is None else found.kind) == kind


def test_of_many_positions_with_many_classes_some_are_compared():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(3, 100, 5000, generator=generator) for _ in range(3)]
    every, some = (Comparison("classes", -1, (0.5, 0.5)) for _ in range(2))
    every.add(outputs[:2], outputs[2])
    some.add([one[:, ::2] for one in outputs[:2]], outputs[2][:, ::2])
    assert every.assessment(["a", "b"], True) == some.assessment(["a", "b"], True)


class Several(nn.Module):
    """A network that puts out something else before its classes."""

    def __init__(self, outputs, seed):
        super().__init__()
        self.net, self.outputs = networks.mlp(12, 9, 5, seed=seed), outputs
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x):
        return self.outputs(self, x, self.net(x) * self.scale)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda _, x, y: (x, y),
        lambda _, x, y: {"inputs": x.relu(), "none": None, "logits": [y]},
        lambda net, _, y: (net.constant * 2, y),
        lambda net, _, y: (net.scale.exp(), y),
    ],
)
def test_an_output_that_no_weight_or_no_input_enters_does_not_count(outputs):
    inputs = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    alone = [Several(lambda _, __, y: y, seed).eval() for seed in range(2)]
    models = [Several(outputs, seed).eval() for seed in range(2)]
    wanted = fuse(alone, inputs, calibration="none").assessment
    found = fuse(models, inputs, calibration="none").assessment
    assert found.result == wanted.result
    assert found.result.distance > 0


def test_the_verdict_names_a_parent_that_agrees_more_often_though_it_is_further():
    near, far = Nearness(0.5, 0.3), Nearness(0.9, 0.6)
    found = FusionAssessment("classes", near, {"a": far, "b": Nearness(1.0, 0.2)}, far, 100, True)
    assert found.verdict.endswith("But a alone agrees more often: 60.0 %")
    same = FusionAssessment("classes", near, {"a": Nearness(0.9, 0.31)}, far, 100, True)
    assert "But" not in same.verdict


class Rows(nn.Module):
    """A model that puts out two rows for each input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(torch.stack([x, -x], 1)).flatten(0, 1)


@pytest.mark.parametrize("wrapped", [nn.Identity, Rows])
@pytest.mark.parametrize("batch", [80, 30, 1])
def test_what_a_profile_puts_out_is_assessed(wrapped, batch, monkeypatch):
    models = [wrapped(one).eval() if wrapped is Rows else one for one in pair()]
    data = list(VECTORS[:80].split(batch))
    monkeypatch.setattr(moments, "_FEWEST_INPUTS", 7)
    monkeypatch.setattr(moments, "_SIDE_BY_SIDE", 0)  # other parts than where a network runs alone
    made = []
    plain = OutputStream.take

    def counted(self, inputs):
        kept = [len(one) for one in self._known._outputs.values()]
        found = plain(self, inputs)
        made.append([len(one) for one in self._known._outputs.values()] == kept)
        return found

    monkeypatch.setattr(OutputStream, "take", counted)
    found = fuse(models, data, calibration="none").assessment
    assert made
    assert all(made)
    aligned = align(models, data)
    config = FusionConfig(calibration="none")
    assert found == fuse_aligned(aligned, data, config=config).assessment


def test_images_are_assessed_alike_where_the_parents_run_again():
    def network(width, seed):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
        return nn.Sequential(*layers, *pooled).eval()

    models = [network(8, 1), network(6, 2)]
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = fuse(models, images, calibration="none").assessment
    config = FusionConfig(calibration="none")
    assert found == fuse_aligned(align(models, images), images, config=config).assessment


@pytest.mark.parametrize("batches", [1, 2])
def test_what_repair_puts_out_last_is_assessed_and_the_network_does_not_run_again(
    batches, monkeypatch
):
    models, data = pair(), list(VECTORS[:60].chunk(batches))
    sizes = []
    run = own_outputs.call_model

    def counted(model, inputs, keywords):
        sizes.append(len(inputs[0]))
        return run(model, inputs, keywords)

    monkeypatch.setattr(own_outputs, "call_model", counted)
    found = fuse(models, data, calibration="repair")
    # Of several batches each has statistics of its own, and so other outputs than the result.
    assert sum(sizes) == (2 if batches == 1 else 60)
    # What is known and is not true does not count.
    monkeypatch.setattr(own_outputs, "_NEAR", -1.0)
    again = fuse(models, data, calibration="repair")
    assert same_bytes(found.model, again.model)
    assert found.assessment.result.distance == pytest.approx(again.assessment.result.distance)
    assert found.assessment.result.agreement == again.assessment.result.agreement
