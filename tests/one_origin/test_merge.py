"""Merging models of one base: what comes out, what is refused, and where it is kept."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import (
    Dare,
    FusionWarning,
    InputError,
    ModelFile,
    Sensitivity,
    TaskArithmetic,
    Ties,
    merge,
)
from clafusion.cli.app import main
from clafusion.merging.sensitivity import alignments, relative_sensitivities, shares
from clafusion.weights.checkpoints import load_state
from tests.support.in_files import IMAGES, TOKENS, VECTORS, in_file
from tests.support.networks import mlp, resnet

EVERY = [
    "average",
    TaskArithmetic(0.7),
    Ties(density=0.4),
    Dare(0.7, density=0.6),
    Dare(density=0.6, elect=True),
    Sensitivity(0.7),
]
METHODS = ["average", TaskArithmetic(1.0), Ties(density=1.0), Dare(1.0, density=1.0)]


def changed(base: nn.Module, seed: int, by: float = 0.05) -> nn.Module:
    """Return a copy of a network as if it were trained further."""
    made = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in (*made.parameters(), *made.buffers()):
            if one.is_floating_point():
                one.add_(by * one.abs().mean() * torch.rand(one.shape, generator=generator))
            else:
                one.add_(seed)
    return made


def family(count: int = 3, *, images: bool = False) -> tuple[nn.Module, list[nn.Module]]:
    base = resnet(1, 1, widths=(8, 12)) if images else mlp(12, 20, 16, 4)
    return base, [changed(base, seed) for seed in range(1, count + 1)]


def same(one: nn.Module, other: nn.Module) -> bool:
    state, others = one.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(
        torch.equal(value, others[name]) for name, value in state.items()
    )


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_model_with_scaling_1_is_that_model(method, calibration, images):
    base, (model,) = family(1, images=images)
    data = IMAGES if images else VECTORS
    result = merge(base, [model], data, method=method, calibration=calibration)
    if calibration == "repair":  # its factors of 1 are rounded
        assert torch.allclose(result.model(data), model(data), rtol=1e-4, atol=1e-5)
    else:
        assert same(result.model, model)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare"])
def test_the_base_alone_is_the_base(method):
    base, _ = family(images=True)
    assert same(merge(base, [base, copy.deepcopy(base)], method=method).model, base)


def test_statistics_are_averaged_and_counters_are_the_bases():
    base, models = family(images=True)
    state = merge(base, models, method=TaskArithmetic(3.0)).model.state_dict()
    name = next(one for one in state if one.endswith("running_var"))
    mean = torch.stack([one.state_dict()[name].double() for one in models]).mean(0)
    assert torch.allclose(state[name].double(), mean, rtol=1e-6)
    counter = next(one for one in state if one.endswith("num_batches_tracked"))
    assert state[counter] == base.state_dict()[counter]


def test_weights_are_relative():
    base, models = family()
    state = merge(base, models, weights=[2, 0, 2], method=TaskArithmetic(0.5)).model.state_dict()
    first, _, third = (one.state_dict() for one in models)
    for name, own in base.state_dict().items():
        wanted = own + 0.5 * ((first[name] - own) + (third[name] - own))
        assert torch.allclose(state[name], wanted, atol=1e-6)


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_model_of_weight_0_is_left_out_exactly(method, calibration):
    images = calibration == "none"
    base, models = family(images=images)
    names = ("a", "b", "c")
    data = {name: (IMAGES if images else VECTORS) + i for i, name in enumerate(names)}
    kept = merge(
        base,
        {"a": models[0], "c": models[2]},
        {"a": data["a"], "c": data["c"]},
        [3, 1],
        method=method,
        calibration=calibration,
    )
    left = merge(
        base,
        dict(zip(names, models, strict=True)),
        data,
        [3, 0, 1],
        method=method,
        calibration=calibration,
    )
    assert same(kept.model, left.model)
    assert left.weights == (0.75, 0.0, 0.25)
    assert left.distances.keys() == set(names)
    assert kept.assessment.result == left.assessment.result


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_a_calibration_comes_nearer_to_the_models_together(calibration):
    base = mlp(12, 40, 30, 4)
    models = [changed(base, seed, by=1.0) for seed in range(1, 4)]
    data = torch.randn(600, 12, generator=torch.Generator().manual_seed(2))
    plain, better = (
        merge(base, models, data, method=Dare(density=0.2), calibration=one)
        for one in ("none", calibration)
    )
    assert better.assessment.result.distance < plain.assessment.result.distance
    assert "agreement" in repr(better)
    assert better.table.columns[:3] == ("network", "weight", "distance from the base")
    assert json.loads(better.to_json())["distances"].keys() == better.distances.keys()
    assert not same(plain.model, better.model)


@pytest.mark.parametrize("calibration", ["repair", "least_squares"])
def test_each_model_alone_counts_on_its_own_task(calibration):
    base = mlp(12, 40, 30, 4)
    models = {name: changed(base, seed, by=1.0) for name, seed in (("a", 1), ("b", 2))}
    generator = torch.Generator().manual_seed(2)
    data = {
        name: torch.randn(300, 12, generator=generator) + shift
        for name, shift in (("a", 2.0), ("b", -2.0))
    }

    @torch.no_grad()
    def far(result):
        return sum(
            float((result.model(own) - models[name](own)).square().mean())
            for name, own in data.items()
        )

    settings = {"method": "average", "calibration": calibration}
    by_task = merge(base, models, data, **settings)
    together = merge(base, models, torch.cat([*data.values()]), **settings)
    assert far(by_task) < 0.9 * min(far(together), far(merge(base, models, method="average")))
    assert set(by_task.problem.owners) == {0, 1}
    again = merge(base, models, data, **settings)
    assert same(by_task.model, again.model)


def test_data_by_task_name_the_models():
    base, models = family(2)
    with pytest.raises(InputError, match="data as a mapping must have one entry for each model"):
        merge(base, models, {"x": VECTORS}, calibration="repair")
    with pytest.raises(InputError, match=r"data\['b'\]: data, batch 0 has shape"):
        merge(base, {"a": models[0], "b": models[1]}, {"a": VECTORS, "b": VECTORS[:, :5]})


def test_no_model_is_modified_and_the_mode_is_the_bases():
    base, models = family(images=True)
    before = [copy.deepcopy(one) for one in (base, *models)]
    result = merge(base.train(), models, IMAGES, calibration="repair")
    assert result.model.training
    assert all(same(one, other) for one, other in zip(before, (base, *models), strict=True))


def test_tied_weights_stay_tied():
    base = nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 60, bias=False))
    base[1].weight = base[0].weight
    models = [changed(base, seed) for seed in (1, 2)]
    result = merge(base, models)
    assert result.model[1].weight is result.model[0].weight


# --- by sensitivity -----------------------------------------------------------------------------


def test_sensitivity_does_what_its_equations_say():
    base = mlp(12, 10, 4)
    models = {name: changed(base, seed, by=1.0) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    generator = torch.Generator().manual_seed(5)
    data = {name: torch.randn(40, 12, generator=generator) + i for i, name in enumerate(models)}
    method = Sensitivity(0.7, temperature=0.05)
    weights = np.array([0.5, 0.3, 0.2])
    result = merge(base, models, data, [5, 3, 2], method=method)
    assert result.timings.keys() >= {"trace", "sensitivity", "merge"}

    layers = ["0", "2"]
    alpha, logits = np.empty((3, 2)), np.empty((3, 3), object)
    for i, (name, model) in enumerate(models.items()):
        model.zero_grad()
        model(data[name]).square().sum().backward()
        for n, layer in enumerate(layers):
            own = model.get_submodule(layer)
            alpha[i, n] = sum(
                float((one.detach() * one.grad).abs().sum()) for one in own.parameters()
            )
        for j, other in enumerate(data.values()):
            found = model(other).detach().double().numpy()
            logits[i, j] = found - found.mean(1, keepdims=True)
    alpha /= np.sqrt((alpha**2).sum(1, keepdims=True))
    near = np.zeros((3, 3))
    for i in range(3):
        for j in {0, 1, 2} - {i}:
            far = np.linalg.norm(logits[i, j] - logits[j, j]) / np.linalg.norm(logits[j, j])
            near[i, j] = 1 / (1 + far)
    tau = near.sum(1) / near.sum()
    sigma = weights[:, None] * np.exp(alpha * tau[:, None] / 0.05)
    sigma /= sigma.sum(0)
    for n, layer in enumerate(layers):
        for kind in ("weight", "bias"):
            name = f"{layer}.{kind}"
            first = base.state_dict()[name].double().numpy()
            added = sum(
                sigma[i, n] * (one.state_dict()[name].double().numpy() - first)
                for i, one in enumerate(models.values())
            )
            found = result.model.state_dict()[name].numpy()
            np.testing.assert_allclose(found, first + 0.7 * 3 * added, atol=1e-6)


def test_a_large_temperature_is_task_arithmetic_and_a_small_one_takes_one_model():
    base, models = family(2)
    named = {"a": models[0], "b": models[1]}
    data = {"a": VECTORS, "b": VECTORS + 1}
    soft = merge(base, named, data, method=Sensitivity(0.5, temperature=1e9)).model
    plain = merge(base, named, method=TaskArithmetic(0.5)).model
    for name, one in plain.state_dict().items():
        assert torch.allclose(soft.state_dict()[name], one, atol=1e-6)
    hard = merge(base, named, data, method=Sensitivity(0.5, temperature=1e-9)).model
    for name, one in hard.state_dict().items():
        assert any(torch.allclose(one, model.state_dict()[name], atol=1e-6) for model in models)


def test_sensitivity_needs_inputs_of_each_task_and_gradients():
    base, models = family(2)
    with pytest.raises(InputError, match=r"each model's own task: .* got no data"):
        merge(base, models, method="sensitivity")
    with pytest.raises(InputError, match="got data of all tasks together"):
        merge(base, models, VECTORS, method="sensitivity")
    broken = {"a": VECTORS, "b": torch.full_like(VECTORS, 3e38)}
    with pytest.raises(InputError, match="not finite"):
        merge(base, dict(zip("ab", models, strict=True)), broken, method="sensitivity")

    class Chosen(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).argmax(1)

    chosen = {name: Chosen(one) for name, one in zip("ab", models, strict=True)}
    with pytest.raises(InputError, match="needs a floating output with a gradient"):
        merge(Chosen(base), chosen, {"a": VECTORS, "b": VECTORS}, method="sensitivity")


def test_shares_of_layers_that_say_nothing_are_the_weights():
    nothing = relative_sensitivities({"a": 0.0, "b": 0.0})
    assert nothing["a"] == nothing["b"] == pytest.approx(0.5**0.5)
    even = alignments([[0.0, 0.0], [0.0, 0.0]])
    assert even == [0.5, 0.5]
    assert shares([nothing, nothing], even, [0.25, 0.75], 0.1)["a"] == pytest.approx((0.25, 0.75))
    assert alignments([[0.0]]) == [1.0]
    with pytest.raises(InputError, match="sensitivity of 'a' is not finite"):
        relative_sensitivities({"a": float("nan")})
    with pytest.raises(InputError, match="outputs of the models are not finite"):
        alignments([[0.0, float("inf")], [1.0, 0.0]])


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_within_a_limit_of_memory_come_the_same_bytes(method, tmp_path):
    base = in_file("Language(2)", tmp_path / "base.safetensors")
    models = {}
    for name, seed in (("maths", 1), ("code", 2)):
        clafusion.save_model(changed(base.load(), seed), tmp_path / f"{name}.safetensors")
        models[name] = ModelFile(base.factory, tmp_path / f"{name}.safetensors")
    free = merge(base, models, method=method)
    within = merge(base, models, method=method, memory_limit="4GB")
    assert same(free.model, within.model)
    assert next(within.model.parameters()).dtype is torch.bfloat16
    with pytest.raises(InputError, match="memory_limit"):
        merge(base, models, memory_limit=1000)
    for ending in ("safetensors", "safetensors.index.json", "pt"):
        within.save(tmp_path / f"merged.{ending}")
        found = load_state(tmp_path / f"merged.{ending}")
        assert all(torch.equal(found[name], one) for name, one in free.model.state_dict().items())
    loaded = clafusion.load(tmp_path / "merged.pt", trust_code=True)
    assert torch.equal(loaded(TOKENS), free.model(TOKENS))
    record = json.loads((tmp_path / "merged.pt.json").read_text())
    assert record["settings"]["method"]["name"] == method
    assert [one["name"] for one in record["parents"]] == ["maths", "code"]


@pytest.mark.parametrize("ending", ["safetensors", "pt", "safetensors.index.json", "pt2"])
@pytest.mark.parametrize("given", ["data", "example"])
def test_what_plain_modules_make_loads_again(given, ending, tmp_path):
    base, models = family(images=True)
    arguments = {"data": IMAGES} if given == "data" else {"example_inputs": IMAGES[:1]}
    result = merge(base, models, **arguments)
    result.save(tmp_path / f"merged.{ending}")
    loaded = clafusion.load(tmp_path / f"merged.{ending}")
    with torch.no_grad():
        assert torch.allclose(loaded(IMAGES), result.model.eval()(IMAGES), atol=1e-6)
    record = json.loads(
        (tmp_path / f"merged.{ending.removesuffix('.index.json')}.json").read_text()
    )
    assert record["architecture"]["kind"] == "program"


def test_what_nothing_can_build_again_is_told(tmp_path):
    base, models = family()
    result = merge(base, models)
    with pytest.warns(FusionWarning, match="without inputs to export it with"):
        result.save(tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match=r"holds weights alone: .* without inputs"):
        clafusion.load(tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match="no inputs to export the network with"):
        result.save(tmp_path / "merged.pt2")
    with pytest.raises(InputError, match="dtype='float16' is for files of weights"):
        merge(base, models, VECTORS).save(tmp_path / "merged.pt2", dtype="float16")
    with pytest.raises(InputError, match="example_inputs must be a tensor"):
        merge(base, models, example_inputs=3)


def test_directories_in_and_out(tmp_path, capsys):
    pytest.importorskip("transformers")
    from tests.support.hugging_face import directory, network, tokenizer

    base = network("Llama", 2)
    directory(tmp_path / "base", base, tokenizer())
    for name, seed in (("maths", 1), ("code", 2)):
        directory(tmp_path / name, changed(base, seed), tokenizer())
    paths = [str(tmp_path / name) for name in ("base", "maths", "code")]
    out = tmp_path / "merged"
    command = ["merge", *paths, "--method=ties", "--method-density=0.5", f"--out={out}"]
    assert main([*command, "--memory-limit=4GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["method"]["density"] == 0.5
    models = [clafusion.load(one) for one in paths]
    expected = merge(models[0], models[1:], method=Ties(density=0.5)).model
    assert same(clafusion.load(out), expected)
    assert (out / "tokenizer.json").is_file()
    assert "| first |" in (out / "README.md").read_text()


# --- refusals -----------------------------------------------------------------------------------


def test_models_of_other_origins_are_refused_with_the_figure():
    base, models = family()
    other = mlp(12, 20, 16, 4, seed=9)
    with pytest.raises(InputError, match=r"models\['x'\] does not come from this base: .* 1\.\d+"):
        merge(base, {"x": other})
    assert merge(base, [other], furthest=2.0).distances["models[0]"] > 1
    assert max(merge(base, models).distances.values()) < 0.1


def test_other_entries_shapes_and_numbers_are_refused():
    base, _ = family()
    with pytest.raises(InputError, match=r"models\[0\] lacks '4.bias', '4.weight'"):
        merge(base, [mlp(12, 20, 4)])
    with pytest.raises(InputError, match=r"models\[0\] has besides those of the base '6.bias'"):
        merge(base, [mlp(12, 20, 16, 8, 4)])
    with pytest.raises(InputError, match=r"'0.weight' in the shape \(24, 12\), .* \(20, 12\)"):
        merge(base, [mlp(12, 24, 16, 4)])
    tables = [nn.Sequential(nn.Embedding(rows, 4)) for rows in (20, 30)]
    with pytest.raises(InputError, match="another vocabulary"):
        merge(tables[0], tables[1:])
    counting = [copy.deepcopy(base) for _ in range(3)]
    for i, one in enumerate(counting):
        one.register_buffer("places", torch.arange(3) + i)
    with pytest.raises(InputError, match=r"'places' holds int64 and differs"):
        merge(counting[0], counting[1:])
    with pytest.raises(InputError, match="same in all models but not in the base"):
        merge(counting[0], [counting[1], copy.deepcopy(counting[1])])
    alike = merge(counting[0], [counting[0], copy.deepcopy(counting[0])]).model
    assert torch.equal(alike.places, torch.arange(3))
    assert same(merge(counting[0], [counting[0], counting[1]], weights=[1, 0]).model, counting[0])


def test_what_is_not_finite_is_refused_by_name_biases_and_buffers_too():
    base, (model,) = family(1)
    for name in ("0.weight", "0.bias"):
        broken = copy.deepcopy(model)
        broken.get_parameter(name).data.view(-1)[0] = torch.nan
        with pytest.raises(InputError, match=rf"'{name}' of models\[0\] holds NaN or infinite"):
            merge(base, [broken])
    broken = copy.deepcopy(base)
    broken[0].bias.data[0] = torch.inf
    with pytest.raises(InputError, match=r"'0.bias' of the base holds NaN or infinite"):
        merge(broken, [model])
    base, (model,) = family(1, images=True)
    name = next(name for name, _ in model.named_buffers() if name.endswith("running_var"))
    model.get_buffer(name)[0] = torch.nan
    with pytest.raises(InputError, match=rf"'{name}' of models\[0\] holds NaN or infinite"):
        merge(base, [model])
    base, (model,) = family(1)
    for one in (base, model):
        one.register_buffer("mask", torch.full((3,), -torch.inf))
    assert torch.equal(merge(base, [model]).model.mask, base.mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "slerp"},
            "method must be one of 'average', 'task_arithmetic', 'ties', 'dare',",
        ),
        ({"method": {"name": "ties", "density": 0}}, "method.density must be in"),
        ({"calibration": "repair"}, "calibration='repair' needs data"),
        ({"calibration": clafusion.LeastSquares(anchor=0.5)}, "leans towards no model"),
        ({"calibration": clafusion.LeastSquares(toward="any")}, "leans towards no model"),
        ({"densty": 0.1}, "has no option 'densty'|'densty' is no option"),
        ({"config": clafusion.FusionConfig()}, "config must be a MergeConfig"),
        ({"weights": [1]}, "weights must have one entry for each model"),
    ],
)
def test_unusable_arguments_are_named(arguments, message):
    base, models = family()
    with pytest.raises(InputError, match=message):
        merge(base, models, **arguments)


def test_no_models_and_names_are_refused():
    base, models = family()
    with pytest.raises(InputError, match="at least one; got 0"):
        merge(base, [])
    with pytest.raises(InputError, match="no model can be called 'base'"):
        merge(base, {"base": models[0]})


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = in_file("perceptron(20, 16)", tmp_path / "base.safetensors")
    for name, seed in (("one", 1), ("two", 2)):
        clafusion.save_model(changed(base.load(), seed), tmp_path / f"{name}.pt")
    np.save("data.npy", VECTORS.numpy())
    return base


MERGE = [
    *("merge", "base.safetensors", "one.pt", "b=two.pt", "--out=merged.safetensors"),
    "--arch=tests.support.in_files:perceptron(20, 16)",
]


def test_the_command_does_what_merge_does(place, capsys):
    more = ["--data=data.npy", "--calibration=repair", "--method=dare", "--seed=3", "--weights=2,1"]
    assert main([*MERGE, *more]) == 0
    shown = capsys.readouterr().out
    assert "2 models by dare" in shown
    assert "written      merged.safetensors" in shown
    models = {"first": ModelFile(place.factory, "one.pt"), "b": ModelFile(place.factory, "two.pt")}
    settings = {"method": "dare", "calibration": "repair", "seed": 3}
    expected = merge(place, models, VECTORS, [2, 1], **settings).model.state_dict()
    found = load_state("merged.safetensors")
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_the_help_says_the_default_of_each_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["merge", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    scalings = "0.4 with task_arithmetic, 1.0 with ties, 0.4 with dare, 0.4 with sensitivity"
    assert f"[default: {scalings}]" in shown
    assert "[default: 0.2 with ties, 0.5 with dare]" in shown


def test_the_command_takes_inputs_of_each_task(place, capsys):
    np.save("more.npy", (VECTORS + 1).numpy())
    tasks = ["--data=first=data.npy", "--data=b=more.npy", "--method=sensitivity"]
    assert main([*MERGE, *tasks, "--method-temperature=0.2", "--json"]) == 0
    method = json.loads(capsys.readouterr().out)["config"]["method"]
    assert method == {"name": "sensitivity", "scaling": 0.4, "temperature": 0.2, "samples": 500}
    models = {"first": ModelFile(place.factory, "one.pt"), "b": ModelFile(place.factory, "two.pt")}
    data = {"first": VECTORS, "b": VECTORS + 1}
    wanted = merge(place, models, data, method=Sensitivity(temperature=0.2)).model.state_dict()
    found = load_state("merged.safetensors")
    assert all(torch.equal(found[name], one) for name, one in wanted.items())


@pytest.mark.usefixtures("place")
def test_settings_come_from_a_file(capsys):
    Path("how.yaml").write_text("method: {name: ties, density: 0.3}\nfurthest: 2\n")
    assert main([*MERGE, "--config=how.yaml", "--method-scaling=0.5", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["method"] == {"name": "ties", "scaling": 0.5, "density": 0.3}
    assert config["furthest"] == 2


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method=slerp"], "--method must be one of"),
        (["--method=average", "--method-density=0.1"], "--method-density is for --method ties"),
        (["--furthest=0.0001"], "does not come from this base"),
        (["--calibration=repair"], "--calibration repair needs data"),
        (["--out=base.safetensors"], "--out"),
        (["--out=merged.pt2"], "needs inputs to export"),
        (["--method=sensitivity"], "--method sensitivity needs inputs of each model's own task"),
        (["--data=first=data.npy"], "give --data once, or once for each model as NAME=FILE"),
        (["--memory-limit=1KB"], "--memory-limit"),
    ],
)
def test_refusals_name_the_flags(more, message, capsys):
    assert main([*MERGE, *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path("merged.safetensors").exists()


def test_other_values_outside_of_the_state_are_refused():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.kept = None

        def forward(self, x):
            if self.kept is None:
                self.kept = self.layer.weight.detach() * 2
            return x @ self.kept.T

    base = nn.Sequential(Keeps())
    model = changed(base, 1)
    fresh = merge(base, [model], method="average").model
    assert fresh[0].kept is None
    inputs = torch.randn(4, 5)
    assert torch.equal(fresh(inputs), model(inputs))
    base(inputs)
    with pytest.raises(InputError, match=r"models\[0\] and the base hold other values in '0.kept'"):
        merge(base, [model], method="average")


def test_a_merge_is_evaluated_beside_its_models_as_a_fusion_is(tmp_path):
    base, models = family()
    labels = torch.arange(len(VECTORS)) % 4
    named = dict(zip("abc", models, strict=True))
    merged = merge(base, named, weights=[2, 1, 1], method="average")
    found = merged.evaluate(VECTORS, labels)
    alone = clafusion.evaluate(named, VECTORS, labels, weights=[2, 1, 1])
    assert list(found.scores) == ["the result", *alone.scores]
    for name, score in alone.scores.items():
        assert found.scores[name].loss == pytest.approx(score.loss)
        assert found.scores[name].accuracy == score.accuracy
    own = clafusion.evaluate(merged.model, VECTORS, labels).scores["the network"]
    assert found.scores["the result"].loss == pytest.approx(own.loss)
    fused = clafusion.fuse(named, VECTORS, [2, 1, 1], calibration="none")
    assert list(fused.evaluate(VECTORS, labels).scores) == list(found.scores)
    batches = [(VECTORS, labels)]
    assert merged.evaluate(batches) == found
    with_data = merge(base, named, VECTORS, [2, 1, 1], method="average", calibration="none")
    assert with_data.evaluate(VECTORS, labels) == found
    files = {}
    for name, one in named.items():
        clafusion.save_model(one, tmp_path / f"{name}.safetensors")
        files[name] = ModelFile(
            "tests.support.networks:mlp(12, 20, 16, 4)", tmp_path / f"{name}.safetensors"
        )
    of_files = merge(base, files, weights=[2, 1, 1], method="average")
    assert of_files.evaluate(VECTORS, labels) == found
    with pytest.raises(InputError, match="labels must have one entry for each input"):
        merged.evaluate(VECTORS, labels[:3])
    with pytest.raises(InputError, match="the result does not run on a batch of data"):
        merged.evaluate(VECTORS[:, :5], labels)
