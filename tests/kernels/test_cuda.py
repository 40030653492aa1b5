"""The way to the GPU: checks, addresses, errors; and, where one is, answers like the CPU's."""

import contextlib
import importlib
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clafusion import ConvergenceWarning, InputError, _native
from clafusion.transport.sinkhorn import sinkhorn
from clafusion.transport.solve import solve_transport
from tests.support.transport_problems import problem, weights

kernels = pytest.mark.skipif(_native.cuda.module is None, reason="this build has no CUDA kernels")


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU, or this PyTorch has no CUDA")
    if _native.cuda.module is None:
        pytest.skip("this build has no CUDA kernels")
    names, reason = _native.cuda_devices()
    assert names, reason
    return torch.device("cuda", torch.cuda.current_device())


# --- without a GPU ------------------------------------------------------------------------------


class HostDevice:
    """In place of the compiled module: solves by the same inner loops, in the host's memory."""

    def __init__(self, library):
        self.library = library

    def sinkhorn_workspace(self, shapes, _device):
        return 1024 * len(shapes)

    def sinkhorn(self, shapes, costs, plans, a, b, initial, f, g, *others):
        totals, errors, iterations, status, epsilon, tolerance, most, relaxation, *rest = others
        assert rest[1:] == [1024 * len(shapes), None, 1234]
        for i, (n, m) in enumerate(shapes.tolist()):
            self.library.solve(
                *(False, False, 1, 1, 1, int(costs[i]), n, m, a, b, initial or None),
                *(epsilon, tolerance, most, relaxation, int(plans[i]), f, g),
                *(one + 8 * i for one in (totals, errors, iterations, status)),
            )
            a, f, b, g = a + 8 * n, f + 8 * n, b + 8 * m, g + 8 * m
            initial += 8 * m if initial else 0


@pytest.fixture
def host_device(compiled, monkeypatch):
    """Make the way to the GPU end in the host's memory."""
    monkeypatch.setattr(_native.cuda, "module", HostDevice(compiled))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=1234)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    module = "clafusion.transport.sinkhorn"
    monkeypatch.setattr(f"{module}._solve_on_cpu", importlib.import_module(module)._solve_on_gpu)


def assert_close(found, expected):
    # Both meet the tolerance of 1e-6; the distance is that over one minus the contraction.
    assert float((found.plan.double() - expected.plan.double()).abs().sum()) < 5e-5
    assert float(found.cost) == pytest.approx(float(expected.cost), rel=1e-4)
    assert found.plan.dtype == expected.plan.dtype
    assert found.source_potential.dtype == expected.source_potential.dtype
    assert found.iterations.dtype == expected.iterations.dtype
    assert found.converged.dtype == expected.converged.dtype
    assert found.status == expected.status


RAGGED = [(20, 30), (1, 7), (33, 18)]


def ragged(dtype=torch.float32):
    costs = [problem(*shape).to(dtype) for shape in RAGGED]
    return costs, [weights(n, 1) for n, _ in RAGGED], [weights(m, 2) for _, m in RAGGED]


def test_ragged_batches_come_back_in_place(request):
    costs, a, b = ragged(torch.float64)
    expected = sinkhorn(costs, a, b, epsilon=0.01)
    soft = sinkhorn(costs, a, b, epsilon=0.05, marginal_relaxation=0.5)
    request.getfixturevalue("host_device")
    found = sinkhorn(costs, a, b, epsilon=0.01)
    warm = sinkhorn(
        costs, a, b, epsilon=0.01, initial_potential=[one.target_potential for one in found]
    )
    softly = sinkhorn(costs, a, b, epsilon=0.05, marginal_relaxation=0.5)
    for one, other, again in zip(found, expected, warm, strict=True):
        assert_close(one, other)
        assert_close(again, other)
        assert int(again.iterations) <= 3
    for one, other in zip(softly, soft, strict=True):
        assert_close(one, other)


def test_batches_and_single_problems(request):
    cost = problem(20, 30)
    batch = torch.stack([cost, cost.flip(0), cost.flip(1)])
    expected = sinkhorn(batch, epsilon=0.02)
    request.getfixturevalue("host_device")
    found = sinkhorn(batch, epsilon=0.02)
    assert found.plan.shape == (3, 20, 30)
    assert found.target_potential.shape == (3, 30)
    assert float((found.plan - expected.plan).abs().sum()) < 5e-5
    assert torch.equal(sinkhorn(cost, epsilon=0.02).plan, found.plan[0])
    strided = torch.zeros(20, 60)[:, ::2]
    strided.copy_(cost)
    assert torch.equal(sinkhorn(strided, epsilon=0.02).plan, found.plan[0])


@pytest.mark.usefixtures("host_device")
def test_what_the_device_tells_becomes_errors_and_warnings():
    bad = problem(20, 30)
    bad[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"costs\[1\] must be finite; got NaN at \[3, 4\]"):
        sinkhorn([problem(20, 30), bad])
    with pytest.warns(ConvergenceWarning, match="raise epsilon, tolerance or max_iterations"):
        found = sinkhorn(problem(20, 30), epsilon=1e-3, max_iterations=5)
    assert not bool(found.converged)
    assert "did not converge in 5 iterations" in found.status


@pytest.mark.usefixtures("host_device")
def test_the_first_door_refuses_what_does_not_fit():
    cost, a, b = torch.ones(4, 5), torch.ones(4).double(), torch.ones(5).double()
    settings = {
        "epsilon": 0.05,
        "tolerance": 1e-6,
        "max_iterations": 10,
        "marginal_relaxation": np.inf,
    }
    for costs, source, target, start, message in [
        ([cost.double()], a, b, None, r"costs\[0\] must be contiguous, torch.float32"),
        ([torch.ones(5, 4).T], a, b, None, r"costs\[0\] must be contiguous"),
        ([cost, cost.to("meta")], a, b, None, r"costs\[1\] is on meta but costs\[0\] on cpu"),
        ([cost], a.float(), b, None, "source_weights must be contiguous, torch.float64"),
        ([cost], a, torch.ones(6).double(), None, "target_weights must be .* with 5 entries"),
        ([cost], a, b.to("meta"), None, "target_weights is on meta"),
        ([cost], a, b, torch.ones(10).double()[::2], "initial_potential must be contiguous"),
    ]:
        with pytest.raises(InputError, match=message):
            _native.sinkhorn_on_device(costs, source, target, start, **settings)


@pytest.mark.usefixtures("host_device")
def test_too_little_memory_is_told_in_bytes(monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(InputError, match=r"costs need 0.00 GiB more on cpu .* solve fewer"):
        sinkhorn(problem(20, 30))


def test_cuda_tensors_without_cuda_kernels_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(_native.cuda, "module", None)
    monkeypatch.setattr(_native.cuda, "missing", "this build of clafusion has no CUDA kernels")
    with FakeTensorMode():
        cost = torch.empty(4, 5, device="cuda")
        with pytest.raises(InputError, match=r"costs are on cuda:0, but this build .* no CUDA"):
            sinkhorn(cost)


def test_devices_are_not_mixed():
    with FakeTensorMode():
        first, second = torch.empty(4, 5), torch.empty(4, 5, device="cuda")
        with pytest.raises(InputError, match=r"costs\[0\] is on cpu but costs\[1\] on cuda:0"):
            sinkhorn([first, second])


def arguments(**changes):
    given = {
        "shapes": np.array([[4, 5]]),
        "costs": np.array([4096]),
        "plans": np.array([4096]),
        "source_weights": 4096,
        "target_weights": 4096,
        "initial_potential": 0,
        "source_potentials": 4096,
        "target_potentials": 4096,
        "totals": 4096,
        "errors": 4096,
        "iterations": 4096,
        "status": 4096,
        "epsilon": 0.05,
        "tolerance": 1e-6,
        "max_iterations": 100,
        "marginal_relaxation": float("inf"),
        "workspace": 4096,
        "workspace_bytes": 4096,
        "device": 0,
        "stream": 0,
    }
    return given | changes


@kernels
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shapes": np.array([4, 5])}, ValueError, "shapes must have shape"),
        ({"shapes": np.array([[0, 5]])}, ValueError, "shapes must be positive"),
        ({"shapes": np.array([[4, 5]], dtype=np.int32)}, TypeError, "incompatible"),
        ({"costs": np.array([4096, 4096])}, ValueError, "one address a problem"),
        ({"costs": np.array([0])}, ValueError, "costs must be the address of device memory"),
        ({"plans": np.array([4097])}, ValueError, "plans must be the address .* aligned"),
        ({"totals": 4100}, ValueError, "totals must be the address .* aligned"),
        ({"workspace": 0}, ValueError, "workspace must be the address"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a positive number"),
        ({"epsilon": np.nan}, ValueError, "epsilon must be a positive number"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be positive"),
        ({"marginal_relaxation": -1.0}, ValueError, "marginal_relaxation must be positive"),
        ({"device": 1000}, RuntimeError, "choosing the CUDA device: cudaError"),
    ],
)
def test_the_compiled_door_refuses_too(changes, error, message):
    with pytest.raises(error, match=message):
        _native.cuda.module.sinkhorn(**arguments(**changes))


@kernels
def test_an_empty_batch_needs_no_gpu():
    none = np.empty(0, dtype=np.int64)
    shapes = np.empty((0, 2), dtype=np.int64)
    _native.cuda.module.sinkhorn(**arguments(shapes=shapes, costs=none, plans=none))


@kernels
def test_the_kernels_import_and_tell_why_there_is_no_gpu():
    names, reason = _native.cuda_devices()
    assert bool(names) != bool(reason)
    if not names:
        with pytest.raises(RuntimeError, match="choosing the CUDA device: cudaError"):
            _native.cuda.module.sinkhorn_workspace(np.array([[4, 5]]), 0)


def test_without_kernels_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(_native.cuda, "module", None)
    monkeypatch.setattr(_native.cuda, "missing", "built without")
    assert _native.cuda_devices() == ([], "built without")
    info = _native.build_info()
    assert (info["cuda"], info["cuda_architectures"], info["cuda_runtime"]) == (False, "", "")


# --- with a GPU ---------------------------------------------------------------------------------

# One for each way to solve: warps with 1 to 32 columns a lane, a cluster, stripes, wide stripes.
SHAPES = [(1, 1), (128, 128), (100, 250), (90, 500), (50, 1000), (512, 512), (700, 900), (8, 6000)]


def on(device, values):
    return [one.to(device) for one in values]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("epsilon", "relaxation"), [(0.05, None), (0.01, None), (0.02, 0.5), (0.001, None)]
)
def test_a_gpu_finds_what_the_cpu_does(gpu, shape, epsilon, relaxation):
    cost, a, b = problem(*shape), weights(shape[0], 1), weights(shape[1], 2)
    settings = {
        "epsilon": epsilon,
        "marginal_relaxation": relaxation,
        "tolerance": 1e-6 if epsilon > 0.005 else 1e-4,
        "max_iterations": 100_000,
    }
    expected = sinkhorn(cost, a, b, **settings)
    found = sinkhorn(cost.to(gpu), a.to(gpu), b.to(gpu), **settings)
    assert {getattr(found, one).device for one in ("plan", "cost", "converged")} == {gpu}
    assert bool(found.converged)
    # Both meet the tolerance; the distance is that over one minus the contraction.
    apart = float((found.plan.cpu() - expected.plan).abs().sum())
    assert apart < 100 * settings["tolerance"] + 1e-6 / epsilon
    assert float(found.cost) == pytest.approx(float(expected.cost), rel=1e-3, abs=1e-6)


@pytest.mark.cuda
def test_a_gpus_bytes_depend_on_the_problem_alone(gpu):
    costs = [problem(*shape).to(gpu) for shape in [*SHAPES, *SHAPES[::-1]]]
    found = sinkhorn(costs, epsilon=0.02)
    for i, cost in enumerate(costs):
        assert torch.equal(sinkhorn(cost, epsilon=0.02).plan, found[i].plan)
        assert torch.equal(found[i].plan, found[-1 - i].plan)


@pytest.mark.cuda
def test_a_gpu_takes_zero_weights_warm_starts_and_any_layout(gpu):
    cost, a, b = problem(40, 50).to(gpu), weights(40, 1), weights(50, 2)
    a[[0, 7]] = b[[3, 49]] = 0.0
    a, b = (a / a.sum()).to(gpu), (b / b.sum()).to(gpu)
    cold = sinkhorn(cost, a, b, epsilon=0.01)
    assert bool(torch.isneginf(cold.source_potential[[0, 7]]).all())
    assert float(cold.plan[:, [3, 49]].sum()) == 0.0
    warm = sinkhorn(cost, a, b, epsilon=0.01, initial_potential=cold.target_potential)
    assert int(warm.iterations) <= 3
    strided = torch.zeros(40, 100, device=gpu)[:, ::2]
    strided.copy_(cost)
    assert torch.equal(sinkhorn(strided, a, b, epsilon=0.01).plan, cold.plan)
    assert torch.equal(sinkhorn(cost.double(), a, b, epsilon=0.01).plan.float(), cold.plan)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(40, 50), (300, 300), (900, 900)])
def test_a_gpu_tells_what_is_wrong(gpu, shape):
    cost = problem(*shape).to(gpu)
    bad = cost.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"costs\[1\] must be finite; got NaN at \[3, 4\]"):
        sinkhorn([cost, bad])
    with pytest.warns(ConvergenceWarning):
        found = sinkhorn(cost, epsilon=1e-3, max_iterations=5)
    assert int(found.iterations) == 5
    assert bool(sinkhorn(cost).converged)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(128, 128), (900, 900)])
def test_a_gpu_works_on_the_current_stream(gpu, shape):
    cost = problem(*shape)
    expected = sinkhorn(cost.to(gpu), epsilon=0.02).plan
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        late = torch.zeros(*shape, device=gpu)
        torch.cuda._sleep(50_000_000)
        late.copy_(cost, non_blocking=True)
        found = sinkhorn(late, epsilon=0.02).plan
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.cuda
def test_a_gpu_that_is_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    found = sinkhorn(problem(40, 50).to(other))
    assert found.plan.device == other
    assert torch.cuda.current_device() == gpu.index
    with pytest.raises(InputError, match="costs must be on one device"):
        sinkhorn([problem(4, 5).to(gpu), problem(4, 5).to(other)])


@pytest.mark.cuda
def test_a_gpu_solves_for_solve_transport_too(gpu):
    cost = problem(30, 40)
    expected = solve_transport([cost], solver="sinkhorn")[0]
    found = solve_transport([cost.to(gpu)], solver="sinkhorn")[0]
    assert float((found.plan.cpu() - expected.plan).abs().sum()) < 5e-5
