"""Each rule against plain NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

import clafusion
from clafusion.config import Average, Dare, MergeMethod, TaskArithmetic, Ties
from clafusion.merging import task_vectors
from clafusion.merging.task_vectors import TaskVectors, magnitude_threshold

WEIGHTS = (0.5, 0.3, 0.2)
NAMES = {"first.weight": (7, 5), "first.bias": (7,), "second.weight": (3, 7)}


def networks(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
    return [
        base,
        *(
            {
                name: one + 0.1 * torch.randn(one.shape, generator=generator)
                for name, one in base.items()
            }
            for _ in range(count - 1)
        ),
    ]


def merged(method: MergeMethod, seed: int = 0) -> dict[str, np.ndarray]:
    base, *models = networks()
    thresholds: tuple[float, ...] = ()
    if isinstance(method, Ties):
        thresholds = tuple(
            magnitude_threshold(
                lambda own=own: (own[name].double() - base[name].double() for name in base),
                method.density,
            )
            for own in models
        )
    rule = TaskVectors(method, WEIGHTS, thresholds, seed)
    return {
        name: rule.merged(name, base[name], [one[name] for one in models]).numpy() for name in base
    }


def flat(network: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([one.numpy().astype(np.float64).reshape(-1) for one in network.values()])


def vectors() -> tuple[np.ndarray, np.ndarray]:
    base, *models = networks()
    return flat(base), np.stack([flat(one) for one in models]) - flat(base)


def elected(tau: np.ndarray) -> np.ndarray:
    weights = np.array(WEIGHTS)[:, None]
    sign = np.sign((weights * tau).sum(0))
    agree = (np.sign(tau) == sign) & (sign != 0)
    total = (weights * agree).sum(0)
    return (weights * agree * tau).sum(0) / np.where(total > 0, total, 1)


def by_numpy(method: MergeMethod) -> np.ndarray:
    base, tau = vectors()
    weights = np.array(WEIGHTS)[:, None]
    if isinstance(method, Average):
        return base + (weights * tau).sum(0)
    if isinstance(method, TaskArithmetic):
        return base + method.scaling * (3 * weights * tau).sum(0)
    assert isinstance(method, Ties)
    kept = int(np.ceil(method.density * tau.shape[1]))
    order = np.argsort(-np.abs(tau), axis=1)
    trimmed = np.zeros_like(tau)
    for own, places, out in zip(tau, order, trimmed, strict=True):
        out[places[:kept]] = own[places[:kept]]
    return base + method.scaling * elected(trimmed)


@pytest.mark.parametrize(
    "method",
    [
        Average(),
        TaskArithmetic(),
        TaskArithmetic(scaling=1.0),
        Ties(),
        Ties(density=0.63, scaling=0.7),
        Ties(density=1.0),
    ],
    ids=str,
)
def test_rules_are_those_of_numpy(method: MergeMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_vectors, "PART", 4)  # so that tensors have several parts
    found = np.concatenate([one.reshape(-1) for one in merged(method).values()])
    np.testing.assert_allclose(found, by_numpy(method), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_drops_and_rescales(elect: bool) -> None:
    method = Dare(density=0.4, scaling=0.8, elect=elect)
    base, tau = vectors()
    # What is dropped shows where one model alone is merged by the same draws.
    _, *models = networks()
    alone = TaskVectors(Dare(density=0.4, scaling=1.0), (1.0,))
    rows = []
    for i, own in enumerate(models):
        generators = {name: TaskVectors(method, WEIGHTS)._generator(i, name) for name in NAMES}
        keeps = [
            torch.rand(own[name].numel(), generator=generators[name], dtype=torch.float64) < 0.4
            for name in NAMES
        ]
        rows.append(np.concatenate([one.numpy() for one in keeps]))
    kept = np.stack(rows)
    assert 0.2 < kept.mean() < 0.6
    assert not np.array_equal(kept[0], kept[1])
    dropped = np.where(kept, tau / 0.4, 0)
    added = elected(dropped) if elect else (3 * np.array(WEIGHTS)[:, None] * dropped).sum(0)
    found = np.concatenate([one.reshape(-1) for one in merged(method).values()])
    np.testing.assert_allclose(found, base + 0.8 * added, rtol=1e-6, atol=1e-7)
    first = alone.merged("first.bias", networks()[0]["first.bias"], [models[0]["first.bias"]])
    changed = first.numpy() != networks()[0]["first.bias"].numpy()
    np.testing.assert_array_equal(changed, kept[0][35:42])


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_is_the_kth_largest(density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(1000, generator=generator) * torch.logspace(-30, 30, 1000)
    found = magnitude_threshold(lambda: iter(numbers.double().split(77)), density)
    kept = int(np.ceil(density * 1000))
    wanted = float(numbers.abs().sort(descending=True).values[kept - 1])
    assert found == (wanted if density < 1 else 0.0)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_decides(seed: int) -> None:
    method = Dare(density=0.5)
    threads = torch.get_num_threads()
    first = merged(method, seed)
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = merged(method, seed)
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(first[name], again[name]) for name in NAMES)
    other = merged(method, seed + 1)
    assert not np.array_equal(first["first.weight"], other["first.weight"])


@pytest.mark.parametrize(
    "method", [Average(), TaskArithmetic(1.0), Ties(density=1.0), Dare(1.0, density=1.0)], ids=str
)
def test_one_model_with_scaling_1_is_that_model(method: MergeMethod) -> None:
    base, model, *_ = networks()
    far = {
        name: one * torch.logspace(-25, 25, one.numel()).view_as(one) for name, one in model.items()
    }
    rule = TaskVectors(method, (1.0,), (0.0,))
    for name, one in far.items():
        assert torch.equal(rule.merged(name, base[name], [one]), one)


@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(), Dare(elect=True)], ids=str)
def test_the_base_alone_is_the_base(method: MergeMethod) -> None:
    base = networks()[0]
    rule = TaskVectors(method, (0.5, 0.5), (0.0, 0.0))
    for name, one in base.items():
        assert torch.equal(rule.merged(name, one, [one, one]), one)


def test_equal_models_elect_themselves() -> None:
    base, model, *_ = networks()
    rule = TaskVectors(Ties(density=1.0), WEIGHTS, (0.0,) * 3)
    for name, one in model.items():
        assert torch.equal(rule.merged(name, base[name], [one] * 3), one)


def test_a_type_too_small_is_refused() -> None:
    base = torch.zeros(3, dtype=torch.float16)
    model = torch.full((3,), 6e4, dtype=torch.float16)
    with pytest.raises(clafusion.InputError, match=r"'w' of the result is beyond .* float16"):
        TaskVectors(TaskArithmetic(2.0), (1.0,)).merged("w", base, [model])
