"""Finetuning and distillation: the losses, the loop, exact resumption and what is refused."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import clafusion
from clafusion import DivergenceError, InputError, distill, finetune
from tests.support import networks

X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
DATA = (X[:64], Y[:64])
HELD_OUT = (X[64:], Y[64:])


def classifier(seed=0, dropout=0.0, norm=False):
    torch.manual_seed(seed)
    inner = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(
        nn.Linear(6, 16), *inner, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    ).eval()


def half_frozen():
    model = classifier()
    model[0].requires_grad_(False)
    return model


def with_tanh():
    model = classifier()
    model[1] = nn.Tanh()
    return model


def spoilt(model):
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def numbered_batches():
    sampler = RandomSampler(range(64), generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(*DATA), batch_sampler=BatchSampler(sampler, 16, False))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class StopError(Exception):
    pass


def stop_at(step):
    def progress(_, done):
        if done == step:
            raise StopError

    return progress


def test_finetuning_learns_and_leaves_the_model_and_the_generators_alone():
    model = classifier()
    before, rng = state(model), torch.get_rng_state()
    of_python = random.getstate()
    of_numpy = np.random.get_state()[1].copy()  # noqa: NPY002
    seen = []
    result = finetune(
        model,
        DATA,
        epochs=30,
        learning_rate=0.1,
        batch_size=16,
        validation=HELD_OUT,
        progress=lambda stage, done: seen.append((stage, done)),
    )
    assert_same(state(model), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == of_numpy).all()  # noqa: NPY002
    assert random.getstate() == of_python
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert max(result.accuracies) > 0.8
    assert result.accuracies[result.best_epoch] == max(result.accuracies)
    assert len(result.losses) == len(result.accuracies) == 30
    assert result.steps == 120
    assert seen == [("finetune", i + 1) for i in range(120)]
    assert not result.model.training
    assert not result.stopped_early


def finetuned_ref(model, order, lr, momentum, decay):
    """SGD with momentum and weight decay as in the books, on whole tensors."""
    model = copy.deepcopy(model).train()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step, chosen in enumerate(order):
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        loss = F.cross_entropy(model(DATA[0][chosen]), DATA[1][chosen])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(momentum).add_(g + decay * p)
                p -= rate * v
    return model


def test_the_steps_are_those_of_sgd_on_the_batches_of_the_loader():
    batches = [torch.arange(64)[i::4] for i in range(4)]
    loader = [(DATA[0][b], DATA[1][b]) for b in batches]
    model = classifier()
    found = finetune(model, loader, epochs=2, learning_rate=0.2, weight_decay=0.01).model
    wanted = finetuned_ref(model, batches * 2, 0.2, 0.9, 0.01)
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32 rounding of 8 steps


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"schedule": "constant"}, [1] * 6),
        ({"schedule": "step", "milestones": (1, 2), "decay": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(6)]),
    ],
)
def test_the_schedules(schedule, factors):
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    finetune(
        classifier(),
        DATA,
        epochs=3,
        batch_size=32,
        optimizer=lambda parameters: Recorder(parameters, 0.3),
        **schedule,
    )
    assert rates == pytest.approx([0.3 * factor for factor in factors])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    def run(seed):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever was drawn before
        return state(finetune(classifier(dropout=0.5), DATA, steps=7, seed=seed, held_out=0).model)

    assert_same(run(1), run(1))
    assert not torch.equal(run(1)["0.weight"], run(2)["0.weight"])


def loader(generator=None):
    return DataLoader(TensorDataset(*DATA), batch_size=16, shuffle=True, generator=generator)


@pytest.mark.parametrize("stop", [1, 6, 17, 19])
@pytest.mark.parametrize(
    "make",
    [lambda: DATA, loader, lambda: loader(torch.Generator().manual_seed(5)), numbered_batches],
    ids=["pair", "loader", "loader with generator", "batch sampler with generator"],
)
@pytest.mark.parametrize("kind", ["sgd", "adamw", "distill"])
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path, make, stop, kind):
    model = classifier(dropout=0.3, norm=True)
    settings = {"steps": 19, "batch_size": 16, "validation": HELD_OUT, "patience": 4}
    if kind == "adamw":
        settings["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, 1e-2)

    def run(**more):
        if kind == "distill":
            return distill(model, classifier(3), make(), **settings, **more)
        return finetune(model, make(), **settings, **more)

    whole = run()
    path = tmp_path / "run.pt"
    with pytest.raises(StopError):
        run(checkpoint=path, progress=stop_at(stop))
    steps = []
    resumed = run(checkpoint=path, progress=lambda _, done: steps.append(done))
    assert steps[0] == 1 + 4 * ((stop - 1) // 4)  # from the end of the last whole epoch
    assert_same(state(whole.model), state(resumed.model))
    assert (whole.losses, whole.accuracies) == (resumed.losses, resumed.accuracies)
    again = run(checkpoint=path, progress=stop_at(1))  # nothing is left to do
    assert_same(state(whole.model), state(again.model))
    assert (again.steps, again.stopped_early) == (whole.steps, whole.stopped_early)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"model": classifier(1)},
        {"model": half_frozen()},
        {"model": with_tanh()},
        {"data": (X[1:65], Y[1:65])},
        {"validation": DATA},
        {"validation": [DATA, DATA]},
        {"seed": 1},
        {"learning_rate": 0.02},
        {"optimizer": lambda parameters: torch.optim.Adam(parameters)},
        {"optimizer": lambda p: torch.optim.SGD([{"params": p, "lr": 0.3}], 0.01, 0.9, 0, 1e-4)},
    ],
    ids=[
        "model",
        "frozen",
        "activation",
        "data",
        "validation",
        "validation batches",
        "seed",
        "learning rate",
        "optimizer",
        "its groups",
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    path = tmp_path / "run.pt"
    finetune(classifier(), DATA, epochs=1, checkpoint=path)
    before = path.read_bytes()
    arguments = {"model": classifier(), "data": DATA, "epochs": 1, "checkpoint": path, **change}
    with pytest.raises(InputError, match="another model, other data or other settings"):
        finetune(arguments.pop("model"), arguments.pop("data"), **arguments)
    assert path.read_bytes() == before


def test_workers_that_stay_are_refused_with_a_checkpoint(tmp_path):
    data = DataLoader(TensorDataset(*DATA), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(InputError, match="persistent_workers=False"):
        finetune(classifier(), data, epochs=1, checkpoint=tmp_path / "run.pt")


def test_numbers_of_numpy_are_numbers(tmp_path):
    path = tmp_path / "run.pt"
    one = finetune(classifier(), DATA, epochs=np.int64(1), learning_rate=0.5, checkpoint=path)
    other = finetune(classifier(), DATA, epochs=1, learning_rate=np.float32(0.5), checkpoint=path)
    assert_same(state(one.model), state(other.model))


def test_teachers_may_be_a_list_of_modules():
    teachers = [classifier(1), classifier(2)]
    one = distill(classifier(), teachers, DATA, epochs=1)
    other = distill(classifier(), nn.ModuleList(teachers), DATA, epochs=1)
    assert_same(state(one.model), state(other.model))


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    distill(classifier(1), classifier(), DATA, epochs=1, checkpoint=path)
    with pytest.raises(InputError, match="another model, other data or other settings"):
        distill(classifier(1), with_tanh(), DATA, epochs=1, checkpoint=path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(InputError, match="not written by this function"):
        finetune(classifier(), DATA, epochs=1, checkpoint=path)
    path.write_bytes(b"PK broken")
    with pytest.raises(InputError, match="checkpoint"):
        finetune(classifier(), DATA, epochs=1, checkpoint=path)
    with pytest.raises(InputError, match=r"\.pt"):
        finetune(classifier(), DATA, epochs=1, checkpoint=tmp_path / "run.txt")


class Spoiler(torch.optim.SGD):
    """Leaves the weights as they are in its first step and sets them to 0 in the others."""

    steps = 0

    def step(self, closure=None):  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(float(self.steps == 0))
        self.steps += 1


def test_early_stopping_returns_the_best_epoch():
    model = finetune(classifier(), DATA, epochs=30, learning_rate=0.1, batch_size=16).model
    settings = {"epochs": 50, "validation": HELD_OUT, "optimizer": Spoiler}
    result = finetune(model, DATA, patience=3, **settings)
    assert result.stopped_early
    assert result.best_epoch == 0
    assert len(result.accuracies) == 4
    assert result.accuracies[0] > max(result.accuracies[1:])
    assert_same(state(result.model), state(model))
    last = finetune(model, DATA, **settings)
    assert not last.stopped_early
    assert len(last.accuracies) == 50
    assert not last.model[0].weight.any()


def distilled_ref(z, teachers, y, temperature, alpha, combine):
    def softmax(t):
        return np.exp(t / temperature) / np.exp(t / temperature).sum(1, keepdims=True)

    if combine == "probabilities":
        p = sum(map(softmax, teachers)) / len(teachers)
    else:
        p = softmax(sum(teachers) / len(teachers))
    q = np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True)
    one = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1).mean()
    ce = -np.log(one[np.arange(len(y)), y]).mean()
    return alpha * temperature**2 * kl + (1 - alpha) * ce


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("count", "combine"), [(1, "auto"), (3, "probabilities"), (3, "logits"), (3, "auto")]
)
def test_the_loss_of_distillation(temperature, alpha, count, combine):
    student, teachers = classifier(), [classifier(i + 1) for i in range(count)]
    given = teachers[0] if count == 1 else teachers
    result = distill(
        student, given, [DATA], steps=1, temperature=temperature, alpha=alpha, combine=combine
    )
    found = result.losses[0]
    assert result.combination.means == ("probabilities" if combine == "probabilities" else "logits")
    with torch.no_grad():
        logits = [one(DATA[0]).double().numpy() for one in (student, *teachers)]
    wanted = distilled_ref(logits[0], logits[1:], DATA[1].numpy(), temperature, alpha, combine)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "data",
    [X, [X[:40], X[40:]], [(X,)], (X, Y)],
    ids=["tensor", "batches", "tuples", "with labels"],
)
def test_a_student_learns_its_teacher_without_labels(data):
    teacher, student = classifier(1, dropout=0.5), classifier(2)
    teacher.train()
    before = state(teacher)
    result = distill(student, teacher, data, epochs=200, alpha=1.0, learning_rate=0.2)
    assert teacher.training
    assert_same(state(teacher), before)
    assert result.losses[-1] < 0.05 * result.losses[0]
    agree = (result.model(X).argmax(1) == teacher.eval()(X).argmax(1)).double().mean()
    assert agree > 0.8


def test_a_student_that_is_its_teacher_stays_so():
    model = classifier()
    result = distill(model, model, X, epochs=2, alpha=1.0, weight_decay=0.0, learning_rate=0.1)
    assert max(result.losses) < 1e-6
    torch.testing.assert_close(state(result.model), state(model), rtol=0, atol=1e-5)


def test_frozen_parameters_stay_and_modes_are_kept():
    model = classifier(norm=True).train()
    model[1].eval()
    model[0].requires_grad_(False)
    before = state(model)
    result = finetune(model, DATA, epochs=2, held_out=0)
    assert_same(state(model), before)
    after = state(result.model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["4.weight"], before["4.weight"])
    assert [one.training for one in result.model] == [one.training for one in model]
    assert [one.requires_grad for one in result.model.parameters()] == [
        one.requires_grad for one in model.parameters()
    ]


def test_one_sample_that_is_left_over_is_dropped_for_batchnorm():
    result = finetune(classifier(norm=True), (X[:33], Y[:33]), epochs=2, batch_size=16)
    assert result.steps == 4


def test_models_with_named_inputs_and_outputs_of_transformers():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    images = torch.randn(12, 3, 8, 8)
    data = [{"pixel_values": images, "labels": torch.arange(12) % 3}]
    result = finetune(model, data, epochs=20, learning_rate=0.1, validation=data)
    assert result.accuracies[-1] == 1.0
    assert distill(model, result.model, data, epochs=2).steps == 2


def test_a_fused_model_can_be_finetuned():
    deep, shallow = networks.mlp(6, 9, 8, 7, 3, seed=1), networks.mlp(6, 10, 3, seed=2)
    fused = clafusion.fuse([deep, shallow], X).model
    result = finetune(fused, DATA, epochs=40, learning_rate=0.1, batch_size=16)
    assert result.losses[-1] < result.losses[0]


class Endless:
    """Batches without a length."""

    def __iter__(self):
        return iter([DATA] * 3)


def test_data_without_a_length_needs_steps():
    assert finetune(classifier(), Endless(), steps=5).steps == 5
    with pytest.raises(InputError, match="give steps"):
        finetune(classifier(), Endless(), epochs=2)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_advice():
    model = classifier()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"step 0 .*check the model's weights"):
        finetune(model, DATA, epochs=1)
    broken = [DATA, (torch.full_like(DATA[0], math.inf), DATA[1])]
    with pytest.raises(DivergenceError, match=r"step 1 .*batch itself holds NaN") as caught:
        finetune(classifier(), broken, epochs=1)
    assert caught.value.step == 1
    with pytest.raises(DivergenceError, match=r"lower learning_rate"):
        finetune(classifier(), DATA, epochs=50, learning_rate=1e30, batch_size=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either epochs or steps"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"epochs": 1, "batch_size": 0}, "batch_size"),
        ({"epochs": 1, "seed": -1}, "seed"),
        ({"epochs": 1, "learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"epochs": 1, "learning_rate": math.nan}, "learning_rate"),
        ({"epochs": 1, "momentum": 1.1}, "momentum"),
        ({"epochs": 1, "weight_decay": -1}, "weight_decay"),
        ({"epochs": 1, "schedule": "linear"}, "schedule must be one of"),
        ({"epochs": 1, "schedule": "step"}, "milestones"),
        ({"epochs": 1, "milestones": (1,)}, "milestones"),
        ({"epochs": 1, "schedule": "step", "milestones": (0,)}, "milestones"),
        ({"epochs": 1, "schedule": "step", "milestones": (1,), "decay": 0}, "decay"),
        ({"epochs": 1, "patience": 2}, "patience needs validation"),
        ({"epochs": 1, "patience": 0, "validation": HELD_OUT}, "patience"),
        ({"epochs": 1, "mixed_precision": True}, "mixed_precision needs a GPU"),
        ({"epochs": 1, "optimizer": lambda parameters: parameters}, "optimizer must be"),
        ({"epochs": 1, "optimizer": "adam"}, "optimizer must be a function .*; got str"),
        ({"epochs": 1, "optimizer": torch.optim.LBFGS}, "LBFGS does not"),
        (
            {"epochs": 1, "optimizer": lambda _: torch.optim.SGD(classifier().parameters())},
            "parameters that it is called with",
        ),
        ({"epochs": 1, "learning_rate": True}, "learning_rate must be"),
        ({"epochs": 1, "milestones": 5}, "milestones must be a list"),
        ({"epochs": 1, "device": "foo"}, "device 'foo' cannot be used here"),
        ({"epochs": 1, "validation": X}, "validation must be a pair"),
        ({"epochs": 1, "validation": []}, "validation is empty"),
        ({"epochs": 1, "validation": (X, Y + 7)}, "validation holds the label 9"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        finetune(classifier(), DATA, **settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, "pair of tensors"),
        (3, "pair of tensors"),
        ({"x": X}, "pair of tensors"),
        (iter([DATA]), "only once"),
        ([], "data is empty"),
        ((X[:0], Y[:0]), "data is empty"),
        ((X, Y[:5]), "90 inputs, but labels"),
        ((X, "labels"), "second entry is str"),
        ((X, Y.float()), "labels of a batch must be int64"),
        ((X, Y[:, None]), "labels of a batch must be int64"),
        ((X, Y + 1), "holds the label 3, but the model tells 3 classes"),
        ((X, Y - 1), "holds the label -1"),
        ([X], r"batch 0, must be tensors \(input, \.\.\., labels\)"),
        ([(X, [1, 2])], "batch 0"),
        ([{"x": X}], r"mapping with 'x' \(Tensor\)"),
        ([{"x": X, "labels": [1, 2]}], r"'labels' \(list\)"),
        ([X, Y], r"pair of tensors .*; got a list of tensors"),
        ((X, X, Y), r"pair of tensors .*; got a tuple of tensors"),
        ((X.double(), Y), "the model does not run on a batch of data .*float64 of shape"),
        ([{"x": X, "labels": Y}], "does not run on a batch of data .*'x', torch.float32"),
    ],
)
def test_wrong_data_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        finetune(classifier(), data, epochs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"teachers": []}, "teachers"),
        ({"teachers": [3]}, "teachers"),
        ({"teachers": networks.mlp(6, 5, 4)}, "needs the same classes"),
        ({"data": X}, "with alpha=0.9 labels are needed"),
        ({"data": (X, X), "alpha": 1}, "two batches of inputs as a list"),
        ({"teachers": 5}, "teachers must be"),
        ({"teachers": spoilt(classifier())}, "teacher 0 gives NaN"),
        ({"teachers": [classifier(), networks.mlp(5, 3)]}, "teacher 1 does not run on a batch"),
        ({"combine": "votes"}, "combine must be one of 'auto', 'logits', 'probabilities'"),
        ({"teachers": [classifier(), networks.mlp(6, 4)]}, "teacher 1 gives outputs of shape"),
        ({"student": nn.ReLU()}, "student has no parameter"),
        ({"student": "net"}, "student must be"),
    ],
)
def test_wrong_inputs_of_distillation_are_refused(change, message):
    arguments = {"student": classifier(), "teachers": classifier(1), "data": DATA, **change}
    with pytest.raises(InputError, match=message):
        distill(
            *itertools.islice(arguments.values(), 3),
            epochs=1,
            **dict(itertools.islice(arguments.items(), 3, None)),
        )


def test_training_in_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(InputError, match="keeps no gradients"):
        finetune(classifier(), DATA, epochs=1)


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(InputError, match="no parameter that can be trained"):
        finetune(classifier().requires_grad_(False), DATA, epochs=1)
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        finetune("net", DATA, epochs=1)
    with pytest.raises(InputError, match="must return logits"):
        finetune(nn.Sequential(nn.Linear(6, 3), nn.Flatten(0)), DATA, epochs=1)


# --- never worse --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [finetune, distill])
def test_training_never_returns_a_worse_state_than_it_began_with(train):
    teacher = finetune(classifier(norm=True), DATA, epochs=20, learning_rate=0.1).model
    data = DATA if train is finetune else (teacher, DATA[0])
    options = {} if train is finetune else {"alpha": 1.0}
    given = (data,) if train is finetune else data
    found = train(teacher, *given, epochs=3, learning_rate=50.0, **options)
    assert found.kept == 0
    assert found.held_out_losses[0] == min(found.held_out_losses)
    assert len(found.held_out_losses) == 4
    assert_same(state(found.model), state(teacher))


def test_the_weights_with_the_lowest_loss_on_what_is_kept_out_are_returned():
    model = classifier(norm=True)
    found = finetune(model, DATA, epochs=6, learning_rate=0.3, batch_size=16, held_out=0.25)
    assert found.kept == int(np.argmin(found.held_out_losses)) > 0
    chosen = torch.linspace(0, 63, 16).long()
    with torch.no_grad():
        loss = F.cross_entropy(found.model(X[chosen]), Y[chosen])
    assert float(loss) == pytest.approx(min(found.held_out_losses), rel=1e-6)
    every = finetune(model, DATA, epochs=1, batch_size=16, held_out=0)
    assert (every.held_out_losses, every.kept, every.steps) == ((), 1, 4)
    by_validation = finetune(model, numbered(), epochs=2, validation=HELD_OUT)
    with torch.no_grad():
        before = F.cross_entropy(model(HELD_OUT[0]), HELD_OUT[1])
    assert by_validation.held_out_losses[0] == pytest.approx(float(before), rel=1e-6)


def numbered():
    return DataLoader(TensorDataset(*DATA), batch_size=16)


@pytest.mark.parametrize(
    ("norms", "is_new", "moves"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("batch", False, True),
        ("frozen", True, False),
    ],
)
def test_norms_that_have_statistics_keep_them(norms, is_new, moves):
    model = classifier(norm=True)
    if not is_new:
        model[1].running_mean.fill_(0.1)
    found = finetune(model, DATA, epochs=1, batch_size=16, norms=norms, held_out=0).model
    assert torch.equal(found[1].running_mean, model[1].running_mean) != moves
    assert not torch.equal(found[1].weight, model[1].weight)


class Keeps(nn.Module):
    """Keeps a product of its weights in eval mode, as an attention of LeViT does."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 16), nn.Linear(16, 3), kind
        self.kept = kind()

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = self.kind()
        return self

    def forward(self, values):
        weight = self.last.weight * 2
        if not self.training:
            if not self.kept:
                self.kept = self.kind([weight])
            (weight,) = self.kept
        return self.first(values).relu() @ weight.T


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_a_model_keeps_of_its_weights_is_that_of_the_result(kind):
    model = Keeps(kind).eval()
    model(X)  # which leaves a result with a history behind
    result = finetune(model, DATA, epochs=2, learning_rate=30)
    assert result.kept == 0  # so that the weights are not those that were looked at last
    fresh = Keeps(kind).eval()
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(result.model(X), fresh(X))


def test_teachers_may_have_names():
    teachers = {"a": classifier(1), "b": classifier(2)}
    settings = {"alpha": 1, "epochs": 1}
    named, listed = (
        distill(classifier(), one, X, **settings) for one in (teachers, [*teachers.values()])
    )
    assert named.losses == listed.losses
    with pytest.raises(InputError, match="a list or a mapping of at least one"):
        distill(classifier(), {}, X, **settings)
