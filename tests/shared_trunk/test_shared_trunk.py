"""Classifiers of other classes: what is exact, where the trunk ends, files, labels and refusals."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import FusionConfig, FusionWarning, InputError, StructureError, fuse
from clafusion.assessment.nearness import FusionAssessment
from clafusion.shared_trunk.network import SharedTrunk
from clafusion.shared_trunk.result import SharedTrunkResult
from clafusion.shared_trunk.tasks import SIDE_BY_SIDE, task_scores
from clafusion.training import finetune
from tests.support.networks import mlp, permuted_copy, resnet, vgg

VECTORS = torch.randn(120, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def with_classes(model: nn.Module, classes: int, seed: int = 9) -> nn.Module:
    """Return a copy whose last linear layer puts out other classes."""
    made = copy.deepcopy(model)
    name, last = [one for one in made.named_modules() if isinstance(one[1], nn.Linear)][-1]
    torch.manual_seed(seed)
    path, _, child = name.rpartition(".")
    setattr(made.get_submodule(path), child, nn.Linear(last.in_features, classes))
    return made.eval()


def outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs)


def side_by_side(models, inputs):
    return torch.cat([outputs(one, inputs) for one in models], 1)


PAIRS = {
    "mlp": (mlp(12, 10, 9, 8, 5), mlp(12, 11, 7, 4, seed=1), VECTORS),
    "vgg": (vgg(2, 2), with_classes(vgg(1, 2, widths=(10, 9), seed=1), 3), IMAGES),
    "resnet": (resnet(2, 2), with_classes(resnet(1, 1, widths=(6, 10), seed=1), 3), IMAGES),
}


@pytest.mark.parametrize("name", PAIRS)
def test_with_nothing_shared_it_is_exactly_side_by_side(name):
    *models, inputs = PAIRS[name]
    result = fuse(models, inputs, outputs="both", shared=0)
    assert isinstance(result, SharedTrunkResult)
    assert result.split.is_empty
    assert torch.equal(outputs(result.model, inputs), side_by_side(models, inputs))
    assert result.assessment.result.agreement == 1.0
    assert "side by side" in result.assessment.verdict
    assert [one.agreement for one in result.nearness.values()] == [1.0, 1.0]


@pytest.mark.parametrize("calibration", ["least_squares", "repair", "none"])
@pytest.mark.parametrize("shared", [0.4, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_permuted_copies_of_a_trunk_with_unlike_heads_are_that_trunk_with_both(
    name, shared, calibration
):
    model, _, inputs = PAIRS[name]
    other = with_classes(permuted_copy(model, inputs), 3)
    models = [model, other]
    result = fuse(models, inputs, outputs="both", shared=shared, calibration=calibration)
    assert result.is_exact
    wanted = side_by_side(models, inputs)
    gap = (outputs(result.model, inputs) - wanted).abs().max()
    assert gap <= 1e-5 * wanted.abs().max()
    total = sum(one.numel() for of in models for one in of.parameters())
    assert sum(one.numel() for one in result.model.parameters()) < total


@pytest.mark.parametrize("name", PAIRS)
def test_a_branch_whose_parent_has_all_weight_stays_what_it_is(name):
    """With the deeper network alone in the trunk that network's outputs are its own."""
    *models, inputs = PAIRS[name]
    result = fuse(models, inputs, [1.0, 0.0], outputs="both", calibration="none")
    own = outputs(result.model, inputs)[:, : result.sizes[0]]
    wanted = outputs(models[0], inputs)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", PAIRS)
def test_the_more_is_shared_the_fewer_parameters_it_has(name):
    *models, inputs = PAIRS[name]
    sizes = []
    for shared in (0.0, 0.5, 1.0):
        result = fuse(models, inputs, outputs="both", shared=shared, calibration="none")
        sizes.append(sum(one.numel() for one in result.model.parameters()))
        assert outputs(result.model, inputs).shape == (len(inputs), sum(result.sizes))
    assert sizes[0] == sum(one.numel() for of in models for one in of.parameters())
    assert sizes[0] > sizes[1] > sizes[2]


def test_least_squares_brings_every_branch_nearer_to_its_own_parent():
    *models, inputs = PAIRS["vgg"]
    wanted = side_by_side(models, inputs)
    gaps = {}
    for calibration in ("none", "least_squares"):
        made = fuse(models, inputs, outputs="both", calibration=calibration).model
        gaps[calibration] = (outputs(made, inputs) - wanted).split((5, 3), 1)
    for plain, solved in zip(*gaps.values(), strict=True):
        assert solved.square().mean() < 0.5 * plain.square().mean()


def test_three_parents_of_unlike_classes():
    models = [mlp(12, 10, 9, 5), mlp(12, 8, 4, seed=1), mlp(12, 9, 9, 2, seed=2)]
    result = fuse(models, VECTORS, outputs="both")
    assert result.sizes == (5, 4, 2)
    assert outputs(result.model, VECTORS).shape == (120, 11)
    copies = [models[0], *(with_classes(permuted_copy(models[0], VECTORS, s), s) for s in (3, 4))]
    result = fuse(copies, VECTORS, outputs="both")
    wanted = side_by_side(copies, VECTORS)
    assert (outputs(result.model, VECTORS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class Encoder(nn.Module):
    """Transformer layers over the twelve entries of a vector, three at a time."""

    def __init__(self, layers: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.unflatten(1, (4, 3)))
        for one in self.layers:
            x = one(x)
        return self.head(x.mean(1))


def test_heads_of_attention_change_places_within_a_trunk():
    model = Encoder(2, 5).eval()
    models = [model, with_classes(permuted_copy(model, VECTORS), 3)]
    result = fuse(models, VECTORS, outputs="both")
    wanted = side_by_side(models, VECTORS)
    assert result.is_exact
    assert (outputs(result.model, VECTORS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_transformers_of_unlike_depth_share_a_trunk_on_batches_of_unlike_size():
    models = [Encoder(2, 5).eval(), Encoder(1, 3, seed=1).eval()]
    wanted = side_by_side(models, VECTORS)
    gaps = []
    for calibration in ("none", "least_squares"):
        data = list(VECTORS.split([70, 50]))
        result = fuse(models, data, outputs="both", shared=1.0, calibration=calibration)
        gaps.append((outputs(result.model, VECTORS) - wanted).square().mean())
    assert gaps[1] < 0.5 * gaps[0]


def test_a_trunk_has_no_mean_of_unmatched_channels():
    *models, inputs = PAIRS["mlp"]
    for shared in (0, 1.0):
        result = fuse(models, inputs, outputs="both", shared=shared)
        with pytest.raises(InputError, match="other classes have no mean"):
            clafusion.naive_average(result.problem)


# --- where the trunk ends -----------------------------------------------------------------------


def test_the_trunk_ends_where_it_is_asked_to():
    *models, inputs = PAIRS["vgg"]
    fused = {
        one: fuse(models, inputs, outputs="both", shared=one, calibration="none").split
        for one in (0.34, 1.0)
    }
    names = [one.layers[0] for one in fused.values()]
    for name, one in zip(names, fused.values(), strict=True):
        by_name = fuse(models, inputs, outputs="both", shared=name, calibration="none").split
        assert by_name == one
    assert len(set(names)) == 2
    with pytest.raises(InputError, match=r"shared='conv9' is the name of no layer.*'0'"):
        fuse(models, inputs, outputs="both", shared="conv9")


def test_the_summary_says_what_is_shared_and_what_stays_each_parents_own():
    models = {"brief": mlp(12, 10, 8, 5), "long": mlp(12, 10, 10, 10, 10, 4, seed=1)}

    def told(shared):
        result = fuse(models, VECTORS, outputs="both", shared=shared, calibration="none")
        text = clafusion.summary(result)
        lines = text.split("\n\n")[-1].splitlines()
        facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
        return result, text, facts

    result, text, facts = told(1.0)
    rows = text.partition("\n\n")[0].splitlines()[2:-1]
    assert [row.split()[0] for row in rows] == [one.name for one in result.problem.target.layers]
    inserted = text.count("(inserted)")
    assert f"inserted     {inserted} into brief" in text
    assert inserted == result.split.counts[1] - result.split.counts[0] > 0
    of_brief, of_long = (k - one for k, one in zip((3, 5), result.split.counts, strict=True))
    shown = f"branch: {of_brief} layer of brief, {of_long} layer"
    assert facts["target"].startswith(f"a trunk of {result.split.counts[1]} layers, and for each")
    assert shown in facts["target"]
    assert result.assessment.between_parents is None
    assert result.to_dict()["assessment"]["between_parents"] is None
    again = FusionAssessment.from_dict(json.loads(json.dumps(result.assessment.to_dict())))
    assert again == result.assessment

    result, text, facts = told("0")
    assert result.split.counts == (1, 1)
    assert "inserted" not in text
    assert facts["target"].startswith("a trunk of 1 layer, and for each parent a branch: 2 layers")

    _, text, facts = told(0)
    assert facts["target"] == "the parents side by side"
    assert text.startswith("layers ")  # no table
    assert "inserted" not in text
    assert facts["calibration"].endswith("all outputs are the parents' own already")


def test_it_is_told_where_nothing_can_be_shared():
    models = [mlp(12, 5), mlp(12, 4, seed=1)]
    with pytest.warns(FusionWarning, match=r"nothing is shared, where 1\.0 of the layers"):
        result = fuse(models, VECTORS, outputs="both")
    assert result.split.is_empty
    assert torch.equal(outputs(result.model, VECTORS), side_by_side(models, VECTORS))


# --- files, export, training --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt2", "safetensors", "pt"])
def test_it_is_written_and_comes_back(tmp_path, ending):
    *models, inputs = PAIRS["resnet"]
    result = fuse(models, inputs, outputs="both", shared=0.5)
    path = tmp_path / f"both.{ending}"
    result.save(path)
    again = clafusion.load(path)
    torch.testing.assert_close(outputs(again, inputs[:7]), outputs(result.model, inputs[:7]))
    record = json.loads((tmp_path / f"both.{ending}.json").read_text())
    assert record["settings"]["outputs"] == "both"
    assert record["settings"]["shared"] == 0.5


def test_it_is_exported_and_trained():
    *models, inputs = PAIRS["mlp"]
    result = fuse(models, inputs, outputs="both")
    batch = torch.export.Dim("batch")
    program = torch.export.export(result.model, (inputs,), dynamic_shapes=(({0: batch},),))
    torch.testing.assert_close(program.module()(inputs[:9]), outputs(result.model, inputs[:9]))
    labels = side_by_side(models, inputs).argmax(1)
    before = (outputs(result.model, inputs).argmax(1) == labels).double().mean()
    trained = finetune(result.model, (inputs, labels), epochs=20, held_out=0).model
    assert isinstance(trained, SharedTrunk)
    assert (outputs(trained, inputs).argmax(1) == labels).double().mean() > before


def test_inputs_by_name():
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            return self.inner(pixels)

    models = [Named(one) for one in PAIRS["mlp"][:2]]
    data = [{"pixels": VECTORS}]
    for shared in (0.0, 1.0):
        made = fuse(models, data, outputs="both", shared=shared).model
        with torch.no_grad():
            assert made(pixels=VECTORS).shape == (120, 9)


# --- labels -------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_equations():
    """Against numpy, over all classes and on each task's own inputs."""
    generator = torch.Generator().manual_seed(4)
    own, first, second = (torch.randn(50, k, generator=generator) for k in (5, 3, 2))
    labels = torch.randint(0, 5, (50,), generator=generator)
    labels[:4] = -100
    runs = {"a": lambda _: first, "b": lambda _: second}
    found = task_scores(lambda _: own, runs, (3, 2), [(own,)], labels).scores

    def log_softmax(z):
        z = z.double().numpy()
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    y = labels.numpy()
    for name, parts in (("the result", [own[:, :3], own[:, 3:]]), (SIDE_BY_SIDE, [first, second])):
        joint = log_softmax(torch.cat(parts, 1))
        mixed = np.concatenate([log_softmax(one) for one in parts], 1) - np.log(2)
        for row, logs in ((name, joint), (f"{name}, by probabilities", mixed)):
            counts = y >= 0
            assert found[row].accuracy == np.mean(logs.argmax(1)[counts] == y[counts])
            loss = -np.mean(logs[counts, y[counts]])
            assert found[row].loss == pytest.approx(loss)
    inside = y >= 3
    assert found["b"].accuracy == np.mean(second.numpy().argmax(1)[inside] == y[inside] - 3)
    on_own = own[:, 3:].numpy().argmax(1)[inside]
    assert found["the result on b's classes"].accuracy == np.mean(on_own == y[inside] - 3)


def test_labels_are_evaluated_over_all_classes_and_wrong_ones_refused():
    *models, inputs = PAIRS["mlp"]
    labels = side_by_side(models, inputs).argmax(1)
    result = fuse(models, inputs, outputs="both", shared=0, labels=labels)
    scores = result.evaluation.scores
    assert scores["the result"].accuracy == scores[SIDE_BY_SIDE].accuracy == 1.0
    assert result.evaluate(inputs, labels).scores["the result"].accuracy == 1.0
    facts = json.loads(result.to_json())
    assert facts["sizes"] == [5, 4]
    assert facts["evaluation"]["scores"]["the result"]["accuracy"] == 1.0
    assert "by probabilities" in clafusion.summary(result)
    rows = dict(zip(result.table.columns, zip(*result.table.rows, strict=True), strict=True))
    assert rows["accuracy"][0] == 1.0
    with pytest.raises(InputError, match=r"classes from 0 to 8, of 5 \+ 4 .*got 9"):
        result.evaluate(inputs, torch.full((120,), 9))
    with pytest.raises(InputError, match="one whole number for each input"):
        result.evaluate(inputs, torch.zeros(120, 9))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": 1.5}, r"shared must be a share of the layers in \[0, 1\].*1.5"),
        ({"shared": -0.1}, "shared must be"),
        ({"shared": float("nan")}, "shared must be"),
        ({"shared": None}, "shared must be text or a number; got None"),
        ({"outputs": "all"}, "outputs must be one of 'same', 'both'"),
        ({"outputs": "same", "shared": 0.5}, "shared=0.5 needs outputs='both'"),
        ({"target": "shallower"}, "outputs='both' needs target"),
        ({"target": clafusion.Wider(1.5)}, "outputs='both' needs target"),
        ({"combine": "probabilities"}, "outputs='both' needs combine='auto'"),
        ({"calibration": "batchnorm"}, "outputs='both' does not go with calibration='batchnorm'"),
        ({"matching": {"solver": "orthogonal"}}, "does not go with matching.solver='orthogonal'"),
        (
            {"calibration": clafusion.LeastSquares(toward="any")},
            "outputs='both' needs calibration.toward='auto'",
        ),
        ({"merging": "iterative"}, "does not go with merging.strategy='iterative'"),
        (
            {
                "matching": clafusion.Matching(outputs=True),
                "profiling": clafusion.Profiling(layer_values="preactivation"),
            },
            "needs matching.outputs=False",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        FusionConfig(**{"outputs": "both", **options})


def test_unusable_networks_are_refused_by_name():
    first = mlp(12, 10, 5)
    segmenting = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(InputError, match=r"models\['b'\] puts out \('batch', 2, 8, 8\)"):
        fuse({"a": vgg(1, 1), "b": segmenting}, IMAGES, outputs="both")
    with pytest.raises(InputError, match=r"models\[1\] puts out \('batch', 1\)"):
        fuse([first, mlp(12, 8, 1)], VECTORS, outputs="both")
    with pytest.raises(InputError, match="does not go with memory_limit"):
        fuse([first, mlp(12, 8, 4)], VECTORS, outputs="both", memory_limit="4GB")
    with pytest.raises(StructureError, match=r"clafusion\.fuse with outputs='both' gives one"):
        fuse([first, mlp(12, 8, 4)], VECTORS)
