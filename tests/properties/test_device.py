"""From profile to calibration on another device: no tensor is where it must not be."""

import copy
import mmap

import pytest
import torch
from torch import nn

from clafusion import Barycentre, FusionConfig, Matching, Shallower, fuse, trace
from clafusion.correspondence import inserted
from clafusion.execution.heap import held_by_process
from clafusion.fusion import align_profiles, fuse_aligned
from clafusion.stages import Clock, profile_traced
from clafusion.targets import target
from clafusion.tracing.groups import find_channels
from clafusion.weights import build, storage
from clafusion.weights.build import with_state
from tests.support import networks
from tests.support.simulated_gpu import FarTensor, move, simulated_gpu

PAIRS = {
    "mlp": (lambda: (networks.mlp(12, 9, 8, 7, 5), networks.mlp(12, 6, 5, seed=1)), (12,)),
    "vgg": (lambda: (networks.vgg(2, 2), networks.vgg(1, 1, seed=1)), (3, 8, 8)),
    "resnet": (lambda: (networks.resnet(2, 2), networks.resnet(1, 1, seed=1)), (3, 8, 8)),
}


def near(tensor):
    return tensor.near if isinstance(tensor, FarTensor) else tensor


def run(graphs, data, config):
    profiles = profile_traced(graphs, data, config)
    names = [f"models[{i}]" for i in range(len(graphs))]
    aligned = align_profiles(names, profiles, config)
    return fuse_aligned(aligned, data, config=config).model.state_dict()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("calibrated", "layer_cost", "cost", "solver", "importance"),
    [
        ("repair", "cka", "correlation", "zip", "uniform"),
        ("none", "cka", "correlation", "zip", "uniform"),
        *(
            (calibrated, *others)
            for calibrated in ("repair", "least_squares", "batchnorm", "none")
            for others in (
                ("cka", "correlation", "auto", "uniform"),
                ("wasserstein", "euclidean", "sinkhorn", "uniform"),
            )
        ),
        ("repair", "cka", "correlation", "auto", "activation"),
        ("repair", "cka", "correlation", "auto", "sensitivity"),
        ("repair", "cka", "both", "exact", "norm"),
    ],
)
def test_no_devices_are_mixed(pair, calibrated, layer_cost, cost, solver, importance, monkeypatch):
    make, shape = PAIRS[pair]
    models = [model.eval() for model in make()]
    data = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    config = FusionConfig(
        calibration=calibrated,
        alignment={"cost": layer_cost},
        matching=Matching(cost=cost, solver=solver, importance=importance),
        profiling={"alignment_samples": 30, "matching_rows": 100},
    )
    assert_same_there(models, data, config, monkeypatch)


@pytest.mark.parametrize("calibrated", ["repair", "least_squares", "batchnorm", "none"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merging": {"strategy": Barycentre(max_rounds=2)}},
        {"merging": {"layer_weights": "sensitivity"}},
        {"target": "shallower"},
        {"target": Shallower(merge="average")},
        {"matching": {"solver": "zip"}},
        {"matching": {"cost": "weights", "importance": "activation"}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::clafusion.ConvergenceWarning")
def test_no_devices_are_mixed_with_three_networks(settings, calibrated, monkeypatch):
    if calibrated == "least_squares" and settings.get("matching") == {"solver": "zip"}:
        pytest.skip("zip has no least squares")
    models = [
        networks.mlp(12, 9, 8, 7, 5),
        networks.mlp(12, 6, 5, seed=1),
        networks.mlp(12, 7, 8, 5, seed=2),
    ]
    data = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    config = FusionConfig(calibration=calibrated, **settings)
    assert_same_there(models, data, config, monkeypatch)


def assert_same_there(models, data, config, monkeypatch):
    """Fuse here and on the simulated GPU, and compare."""
    graphs = [trace(copy.deepcopy(model), data[:4], verify=False) for model in models]
    expected = run(graphs, data, config)
    made = []
    originals = {id(graph.model): copy.deepcopy(graph.model) for graph in graphs}
    for graph in graphs:
        move(graph.model)
        vars(graph)["example_inputs"] = tuple(FarTensor(one) for one in graph.example_inputs)
        vars(graph)["constants"] = {k: FarTensor(v) for k, v in graph.constants.items()}

    def far_with_state(module, state, aliases):  # it sets .data
        assert all(isinstance(one, FarTensor) for one in state.values())
        values = {name: near(one) for name, one in state.items()}
        built = with_state(originals[id(module)], values, aliases)
        originals[id(built)] = copy.deepcopy(built)
        move(built)
        made.append(built)  # so that no other module gets its id
        return built

    for place in (build, storage, inserted, target):
        monkeypatch.setattr(place, "with_state", far_with_state)
    with simulated_gpu():
        found = run(graphs, data, config)
    for name, one in expected.items():
        assert isinstance(found[name], FarTensor)
        # Gram matrices are added up in another order than by the compiled kernels, and least
        # squares divides by them.
        torch.testing.assert_close(near(found[name]), one, rtol=1e-3, atol=1e-3)


class Transposing(nn.Module):
    """Its parameters are read through views."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 12, generator=draw))
        self.bias = nn.Parameter(torch.randn(8, generator=draw))
        self.both = nn.Parameter(torch.randn(16, 8, generator=draw))
        self.last = nn.Parameter(torch.randn(8, 3, generator=draw))

    def forward(self, x):
        h = torch.relu(x @ self.first.t() + self.bias)
        left, right = self.both.chunk(2, 0)
        return torch.relu(h @ left.t() + h @ right.transpose(0, 1)) @ self.last


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: networks.mlp(12, 9, 8, 5), (12,)),
        (lambda: networks.resnet(2, 2), (3, 8, 8)),
        (Transposing, (12,)),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (5, 16)),
    ],
)
def test_the_analysis_finds_the_same_channels_there(make, shape):
    data = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    graph = trace(make().eval(), data)
    state = graph.state()
    buffers = frozenset(state) - set(dict(graph.model.named_parameters()))

    def find(state, inputs):
        with torch.no_grad():
            return find_channels(graph.module, graph.placeholders, state, buffers, inputs)

    expected = find(state, graph.example_inputs)
    with simulated_gpu():
        found = find(
            {name: FarTensor(one) for name, one in state.items()},
            tuple(FarTensor(one) for one in graph.example_inputs),
        )
    assert len(expected.groups) > 0
    for one, other in zip(found.groups, expected.groups, strict=True):
        assert one.size == other.size
        for group_axis, partner in zip(one.axes, other.axes, strict=True):
            assert group_axis.direction == partner.direction
            assert torch.equal(group_axis.positions, partner.positions)


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated_gpu() as gpu:
        far = torch.ones(3, 4).to(gpu)
        with pytest.raises(RuntimeError, match="same device"):
            far @ torch.ones(4, 2)
        with pytest.raises(RuntimeError, match="same device"):
            far[torch.tensor([0])] = torch.zeros(4)
        with pytest.raises(RuntimeError, match="numpy"):
            far.numpy()
        assert (far * torch.tensor(2.0)).device == far[torch.tensor([0])].device == gpu
        assert type(far.cpu()) is torch.Tensor


def test_the_stages_memory_is_that_of_the_gpu_or_of_the_process(monkeypatch):
    """The device's counters are stood in for: here is none."""
    held = iter([300, 200])
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(held))
    clock = Clock(torch.device("cuda", 0), {"trace": 1.5}, {"trace": 100})
    for name in ("profile", "align"):
        with clock.stage(name):
            calls.append(name)
    assert calls == ["reset", "profile", "wait", "reset", "align", "wait"]
    assert clock.peak_memory == {"trace": 100, "profile": 300, "align": 200}
    assert list(clock.seconds) == ["trace", "profile", "align"]
    held = iter([(100, 500), (300, 500), (300, 500), (100, 800)])
    monkeypatch.setattr("clafusion.stages.held_by_process", lambda: next(held))
    clock = Clock(torch.device("cpu"))
    for name in ("profile", "align"):
        with clock.stage(name):
            pass
    assert clock.peak_memory == {"profile": 300, "align": 800}
    assert len(calls) == 6


def test_the_memory_of_the_process_is_what_the_system_counts():
    size, page = 1 << 26, mmap.PAGESIZE
    before, _ = held_by_process()
    with mmap.mmap(-1, size) as block:  # new pages, where a tensor may get ones that are held
        block[::page] = b"1" * (size // page)
        now, most = held_by_process()
    assert now - before > 0.9 * size
    assert most >= 0.99 * now  # the system brings its counters up to date now and then


@pytest.mark.cuda
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("calibrated", ["repair", "least_squares", "batchnorm"])
def test_a_gpu_fuses_as_the_cpu_does(pair, calibrated):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU, or this PyTorch has no CUDA")
    make, shape = PAIRS[pair]
    models = make()
    data = torch.randn(200, *shape, generator=torch.Generator().manual_seed(0))
    expected = fuse(models, data, calibration=calibrated)
    far = fuse(models, data, calibration=calibrated, device="cuda")
    there = fuse([model.cuda() for model in models], data, calibration=calibrated)
    for found in (far, there):
        assert {one.device.type for one in found.model.parameters()} == {"cuda"}
        assert found.peak_memory.keys() == found.timings.keys()
        assert all(found.peak_memory.values())
        with torch.no_grad():
            ours, theirs = expected.model(data), found.model(data.cuda()).cpu()
        # Convolutions may round their factors to TF32's 10 bits, through a few layers.
        assert float((ours - theirs).norm() / ours.norm()) < 2e-2


@pytest.mark.cuda
def test_a_gpus_gram_matrices_and_cka_equal_the_cpus():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU, or this PyTorch has no CUDA")
    from clafusion.alignment.layer_costs import linear_cka

    layers = [
        torch.randn(100, size, generator=torch.Generator().manual_seed(size))
        for size in (30, 5000, 20_000)
    ]
    for unbiased in (False, True):
        expected = linear_cka(layers, layers[:2], unbiased=unbiased)
        found = linear_cka(
            [x.cuda() for x in layers], [x.cuda() for x in layers[:2]], unbiased=unbiased
        )
        # Float32 sums over 4096 features: 4096 * 2^-24 of the products' magnitudes at worst.
        assert abs(expected - found).max() < 3e-4
