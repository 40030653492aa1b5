"""Graph networks: what data may be, that nothing is cut, and that copies fuse to themselves."""

import numpy as np
import pytest
import torch
from torch import nn

import clafusion
from clafusion import InputError, fuse

geometric = pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import GCNConv, GINConv, GINEConv, SAGEConv, global_mean_pool  # noqa: E402

from clafusion.calibration.least_squares.places import regressed_places  # noqa: E402
from clafusion.cli.app import main  # noqa: E402
from clafusion.interop.inputs import readable  # noqa: E402
from clafusion.interop.torch_geometric import OnData  # noqa: E402
from clafusion.matching.activation_costs import _MEASURES, activation_costs  # noqa: E402
from clafusion.merging.mean import average  # noqa: E402
from clafusion.profiling.few_nodes import MOST_NODES, few_nodes  # noqa: E402
from clafusion.weights.state_files import save_model  # noqa: E402
from tests.support.architectures import randomise  # noqa: E402
from tests.support.graphs import (  # noqa: E402
    CLASSES,
    FEATURES,
    LAYERS,
    OF_EDGES,
    RESIDUAL,
    Graphs,
    Nodes,
    graph,
    graphs,
    mlp,
    network,
    of,
)
from tests.support.networks import permuted_copy  # noqa: E402

SETTINGS = {"assessment": {"outputs": "none"}}


def far(model, other, given):
    """Return how far two networks' outputs are apart, relative to the largest."""
    with torch.no_grad():
        one, two = model(**of(other, given)), other(**of(other, given))
    return float((one - two).abs().max() / two.abs().max())


def often(names, *kept):
    """Return names, of which all but some are for the nightly run."""
    return [one if one in kept else pytest.param(one, marks=pytest.mark.nightly) for one in names]


@pytest.mark.parametrize("name", often(LAYERS, "GCN", "GAT", "graphs, mean of nodes"))
def test_a_permuted_copy_fuses_to_the_network(name):
    model = network(name)
    given = of(model, graph(graphs=4 if "graph" in name else 1))
    copy = permuted_copy(model, given)
    assert clafusion.trace(model, given).groups
    assert (
        far(fuse([model, copy], given, calibration="least_squares", **SETTINGS).model, model, given)
        < 1e-5
    )


@pytest.mark.parametrize("name", often(RESIDUAL, "GCN"))
def test_another_depth_keeps_each_parent(name):
    torch.manual_seed(0)
    deep, shallow = (randomise(RESIDUAL[name](layers, 8), layers) for layers in (3, 2))
    given = of(deep, graph())
    for model, weights in ((deep, [1, 0]), (shallow, [0, 1])):
        fused = fuse([deep, shallow], given, weights, calibration="none", **SETTINGS).model
        assert far(fused, model, given) < 1e-5


@pytest.mark.parametrize("calibration", ["repair", "least_squares", "batchnorm"])
def test_other_depth_and_width_give_finite_outputs(calibration):
    deep, shallow = RESIDUAL["GCN, BatchNorm"](3, 8), RESIDUAL["GCN, BatchNorm"](2, 12)
    models = [randomise(deep, 1), randomise(shallow, 2)]
    given = of(deep, graph())
    result = fuse(models, given, calibration=calibration)
    assert bool(result.model(**given).isfinite().all())
    assert result.assessment is not None
    assert not result.assessment.held_out  # of one graph nothing can be held out


class SumsInside(nn.Module):
    """Residual blocks with a sum inside: of a node and its neighbours, or of a node and an edge."""

    def __init__(self, kind, layers, width):
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)
        make = {
            "GraphSAGE": lambda: SAGEConv(width, width),
            "GINE": lambda: GINEConv(mlp(width, width), edge_dim=OF_EDGES),
        }[kind]
        self.has_edges = kind == "GINE"
        self.convs = nn.ModuleList(make() for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))
        self.leave = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x, edge_index, edge_attr):
        x = self.enter(x).relu()
        given = (edge_index, edge_attr) if self.has_edges else (edge_index,)
        for conv, norm, leave in zip(self.convs, self.norms, self.leave, strict=True):
            x = x + leave(norm(conv(x, *given)).relu())
        return self.head(x)


@pytest.mark.parametrize("kind", ["GraphSAGE", "GINE"])
def test_sums_inside_a_block_that_a_parent_lacks_are_no_sums_with_its_stream(kind):
    deep, shallow = (randomise(SumsInside(kind, *size), size[1]) for size in ((2, 8), (1, 12)))
    given = of(deep, graph())
    result = fuse([deep, shallow], given, **SETTINGS)
    assert bool(result.model(**given).isfinite().all())
    problem = result.problem
    (lacked,) = problem.parents[1].correspondence.passing
    block = problem.target.layers[lacked]
    shown = {
        place.point.weight
        for place in regressed_places(problem, average(problem))
        if place.point in block.calibration_points and place.views[1] is not None
    }
    assert shown == {name for name in block.last_write if name.endswith("weight")}


def test_a_plain_layer_is_no_identity_but_can_be_left_out():
    deep, shallow = (randomise(Nodes(GCNConv, layers=layers), layers) for layers in (3, 2))
    given = of(deep, graph())
    with pytest.raises(clafusion.StructureError, match="takes values of other nodes along the"):
        fuse([deep, shallow], given)
    fused = fuse([deep, shallow], given, [0, 1], target="shallower", **SETTINGS).model
    assert far(fused, shallow, given) < 1e-5
    assert len(fused.convs) == 2


@pytest.mark.parametrize("jump", ["cat", "max"])
def test_jumping_knowledge_needs_as_many_layers(jump):
    deep, shallow = (
        randomise(Nodes(GCNConv, layers=layers, residual=True, jump=jump), layers)
        for layers in (3, 2)
    )
    with pytest.raises(clafusion.StructureError, match=r"what 3 layers put out together, and .* 2"):
        fuse([deep, shallow], of(deep, graph()))


def test_costs_along_edges():
    model = network("GCN")
    given = of(model, graph())
    copy = permuted_copy(model, given)
    energy = {"matching": {"cost": "energy"}, "calibration": "none"}
    assert far(fuse([model, copy], given, **energy, **SETTINGS).model, model, given) < 1e-5
    other = network("GCN", 1)
    head, tail = given["edge_index"]
    changes = []
    for one in (model, other):
        value = one.convs[0](given["x"], given["edge_index"]).detach()
        changes.append(value[head] - value[tail])
        rows = clafusion.profile(one, given, **energy).rows[0, 0]
        assert torch.allclose(rows, changes[-1], atol=1e-5)
    expected = (changes[0][:, :, None] - changes[1][:, None]).square().mean(0).double()
    assert torch.allclose(_MEASURES["energy"].at_hook(*changes), expected, atol=1e-5)
    with pytest.raises(InputError, match="along the edges of a graph"):
        fuse([nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(60, 3), **energy)


def test_costs_by_structure():
    model = network("GCN")
    given = of(model, graph())
    settings = {"matching": {"cost": "fused_gromov_wasserstein"}, "calibration": "none"}
    copy = permuted_copy(model, given)
    assert far(fuse([model, copy], given, **settings, **SETTINGS).model, model, given) < 1e-5
    profile = clafusion.profile(model, given, **settings)
    value = model.convs[0](given["x"], given["edge_index"]).detach()
    nodes, distances = few_nodes(given["edge_index"], 60)
    assert torch.equal(profile.structure, distances)
    assert torch.allclose(profile.rows[0, 0], value[nodes], atol=1e-5)
    with pytest.raises(InputError, match="'fused_gromov_wasserstein' is measured along the edges"):
        fuse([nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(60, 3), **settings)


class Pooled(nn.Module):
    """A layer along edges, and a hidden one on whole graphs."""

    def __init__(self, seed, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.hidden, self.head = (
            GCNConv(FEATURES, 10),
            nn.Linear(10, 12),
            nn.Linear(12, classes),
        )

    def forward(self, x, edge_index, batch):
        pooled = global_mean_pool(self.conv(x, edge_index).relu(), batch)
        return self.head(self.hidden(pooled).relu())


def test_as_many_graphs_as_nodes_of_the_structure_are_no_nodes():
    draw = torch.Generator().manual_seed(0)
    graphs = [
        Data(x=torch.randn(5, FEATURES, generator=draw), edge_index=torch.randint(0, 5, (2, 9)))
        for _ in range(MOST_NODES)
    ]
    settings = {"matching": {"cost": "fused_gromov_wasserstein"}, "calibration": "none"}
    result = fuse([Pooled(0), Pooled(1)], [Batch.from_data_list(graphs)], **settings)
    target, source = (one.profile for one in result.parents)
    (group,) = (one.index for one in target.traced.groups if one.size == 12)
    costs = activation_costs(
        result.parents[1].correspondence, target, source, metric="fused_gromov_wasserstein"
    )
    places = [place for place, one in target.rows.items() if one.size(1) == 12]
    assert {place: target.structure_at(place) for place in places} == dict.fromkeys(places)
    assert target.of_structure
    assert all(target.rows[place].size(1) == 10 for place in target.of_structure)
    x, y = (one.rows[places[0]].double() for one in (source, target))
    assert len(x) == MOST_NODES
    scale = torch.cat([x, y], 1).square().mean(0).amax()
    wanted = (x[:, :, None] - y[:, None]).square().mean(0) / (2 * scale)
    assert torch.allclose(costs[group], wanted, atol=1e-6)


# --- data ---------------------------------------------------------------------------------------


def test_one_graph_in_any_form():
    model = network("GCN")
    given = of(model, graph())
    forms = [
        given,
        (given["x"], given["edge_index"]),
        [(given["x"], given["edge_index"])],
        Data(**given, y=torch.zeros(60)),
        [Data(**given)],
        dict(reversed(given.items())),
    ]
    for data in forms:
        (found,) = readable(data, {"first": model})
        assert list(found) == ["x", "edge_index"]
        assert all(torch.equal(found[name], one) for name, one in given.items())


def test_many_graphs_from_a_list_and_a_loader():
    torch.manual_seed(0)
    first, second = (
        randomise(Graphs(lambda a, b: GINConv(mlp(a, b)), layers=i), i) for i in (2, 2)
    )
    data = graphs(600)
    whole = Batch.from_data_list(data)
    labels = first(whole.x, whole.edge_index, whole.batch).argmax(1)
    result = fuse([first, second], DataLoader(data, batch_size=100), labels=labels)
    assert result.assessment.held_out
    assert result.assessment.num_inputs == 60  # every tenth graph
    assert result.evaluation.scores["models[0]"].accuracy == 1.0
    of_list = fuse([first, second], data, labels=labels)
    assert of_list.assessment.num_inputs == 60
    given = list(DataLoader(data[:7], batch_size=1))  # batches of one graph
    fused = fuse([first, second], given, calibration="repair").model
    assert fused(whole.x, whole.edge_index, whole.batch).shape == (600, 3)


def test_outputs_of_nodes_are_held_out_by_whole_graphs():
    first, second = network("GCN"), network("GCN", 1)
    data = graphs(100)
    nodes = sum(one.num_nodes for one in data)
    labels = torch.arange(nodes) % 3
    result = fuse([first, second], data, labels=labels, calibration="none")
    held = sum(one.num_nodes for i, one in enumerate(data, 1) if i % 10 == 0)
    assert result.assessment.held_out
    assert result.assessment.num_inputs == held
    assert result.evaluation.num_inputs == held


def test_a_network_that_takes_a_data_object():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Nodes(GCNConv)

        def forward(self, data):
            return self.inner(data.x, data.edge_index)

    models = [OnData(randomise(Whole(), seed)) for seed in (0, 1)]
    given = Data(**of(models[0].network.inner, graph()))
    fused = fuse(models, given, **SETTINGS).model
    assert fused.network(given).shape == (60, 3)
    with pytest.raises(InputError, match="OnData"):
        fuse([one.network for one in models], given)


def test_objects_of_the_library_are_traced_and_explained():
    models = [network("GCN"), network("GCN", 1)]
    data = graphs(3)
    traced = clafusion.trace(models[0], data[0])
    assert traced.keywords == ("x", "edge_index")
    assert clafusion.trace(models[0], Batch.from_data_list(data)).graph is not None
    assert "can match" in clafusion.explain(models, data)


def test_a_written_network_takes_its_inputs_by_place_in_the_order_of_its_forward(tmp_path):
    class Turned(Nodes):
        def forward(self, edge_index, x):
            return self.head(self.run(x, edge_index))

    models = [randomise(Turned(GCNConv), seed) for seed in (0, 1)]
    given = of(models[0], graph())
    result = fuse(models, given, calibration="none", **SETTINGS)
    result.save(tmp_path / "fused.safetensors")
    found = clafusion.load(tmp_path / "fused.safetensors")
    wanted = result.model(**given)
    assert torch.equal(found(**given), wanted)
    assert torch.equal(found(given["edge_index"], given["x"]), wanted)
    assert torch.equal(found(given["edge_index"], x=given["x"]), wanted)
    assert torch.equal(found(x=given["x"], edge_index=given["edge_index"]), wanted)


# --- bad input ----------------------------------------------------------------------------------


def test_a_network_of_whole_graphs_needs_several():
    models = [Pooled(0), Pooled(1)]
    with pytest.raises(InputError, match="compared on many graphs: give several"):
        fuse(models, graphs(1)[0])
    empty = [Data(x=torch.randn(2, FEATURES), edge_index=torch.zeros(2, 0, dtype=torch.long))] * 64
    fused = fuse(models, [*empty, *graphs(60)], calibration="none", **SETTINGS).model
    assert fused is not None  # traced along the edges of the second batch


def test_layers_that_keep_the_edges_of_the_graph_they_ran_on_are_traced_without_them():
    def conv(before, after):
        return GCNConv(before, after, cached=True)

    models = [randomise(Nodes(conv), seed) for seed in (0, 1)]
    given = of(models[0], graph(nodes=160, edges=500))
    wanted = [model(**given) for model in models]  # which fills the caches
    result = fuse(models, given, [1, 0], calibration="none", **SETTINGS)
    assert torch.allclose(result.model(**given), wanted[0], atol=1e-5)
    assert models[0].convs[0]._cached_edge_index is not None


def test_graphs_are_trained_on_by_name():
    student, teacher = network("GCN"), network("GCN", 1)
    given = of(student, graph())
    batch = {**given, "labels": torch.arange(60) % 3}
    result = clafusion.distill(student, teacher, [batch], epochs=1)
    assert result.model(**given).shape == (60, 3)
    for data in (Data(**given), [Data(**given)], DataLoader([Data(**given)])):
        with pytest.raises(InputError, match="is a graph of torch_geometric: for training give"):
            clafusion.distill(student, teacher, data, epochs=1)


def test_no_trunk_of_graph_networks_ends_anywhere():
    with pytest.raises(InputError, match="outputs='both' is not for graph networks"):
        fuse([Pooled(0), Pooled(1)], graphs(60), outputs="both")
    with pytest.raises(clafusion.StructureError, match=r"into one output$"):  # so no word of it
        fuse([Pooled(0), Pooled(1, classes=4)], graphs(60))


def changed(**inputs):
    given = {**graph(), **inputs}
    return {name: one for name, one in given.items() if one is not None}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "GCN",
            changed(edge_index=torch.zeros(2, 0, dtype=torch.long)),
            "'edge_index' .* is empty",
        ),
        (
            "GCN",
            changed(edge_index=torch.tensor([[0, 60], [1, 2]])),
            "names the node 60, but there",
        ),
        ("GCN", changed(edge_index=torch.tensor([[0, -1], [1, 2]])), "names the node -1"),
        ("GCN", changed(edge_index=torch.zeros(3, 5, dtype=torch.long)), r"shape \(2, num_edges\)"),
        ("GCN", changed(edge_index=torch.zeros(2, 5)), "int64"),
        ("GCN with weights of edges", changed(edge_weight=None), "needs 'edge_weight', which"),
        ("GINE", changed(edge_attr=torch.zeros(5, 4)), "a row for each of the 200 edges"),
        (
            "graphs, mean of nodes",
            changed(batch=torch.arange(60) % 2),
            "'batch' must be the number",
        ),
    ],
)
def test_what_is_no_graph_is_refused_by_name(name, data, message):
    models = [network(name), network(name, 1)]
    with pytest.raises(InputError, match=message):
        fuse(models, data)


def test_a_later_batch_is_checked_too():
    models = [network("GCN"), network("GCN", 1)]
    good = of(models[0], graph())
    bad = {**good, "edge_index": good["edge_index"] + 10}
    with pytest.raises(InputError, match="batch 1: 'edge_index' names the node"):
        fuse(models, [good, bad])
    beside = {**good, "edge_index": good["edge_index"][:, :0]}  # fine beside one with edges
    assert fuse(models, [good, beside], **SETTINGS).model is not None


def test_a_sparse_matrix_is_refused():
    class Sparse(Nodes):
        def forward(self, x, adj_t):
            return self.head(self.run(x, adj_t))

    given = Data(**of(Nodes(GCNConv), graph()))
    with pytest.raises(InputError, match="takes 'adj_t', a sparse matrix"):
        fuse([Sparse(GCNConv).eval(), Sparse(GCNConv).eval()], given)


# --- the command line ---------------------------------------------------------------------------

FACTORY = """
from torch_geometric.nn import GCNConv
from tests.support.graphs import Nodes

def gcn(layers):
    return Nodes(GCNConv, 8, layers, residual=True)
"""


@pytest.mark.parametrize("ending", ["npz", "pt"])
def test_a_file_with_a_graph_is_fused_and_evaluated(ending, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    for layers in (3, 2):
        save_model(randomise(Nodes(GCNConv, 8, layers, residual=True), layers), f"{layers}.pt")
    given = of(Nodes(GCNConv), graph()) | {"y": torch.arange(60) % 3}
    if ending == "npz":
        np.savez("graph.npz", **{name: one.numpy() for name, one in given.items()})
    else:
        torch.save(given, "graph.pt")
    archs = ["--arch", "nets.py:gcn(layers=3)", "--arch", "nets.py:gcn(layers=2)"]
    data = ["--data", f"graph.{ending}", "--limit", "20", "--labels", "y"]
    assert main(["fuse", "3.pt", "2.pt", *archs, *data, "--out", "fused.pt"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert torch.load("fused.pt", weights_only=True)["convs.2.lin.weight"].shape == (8, 8)
    capsys.readouterr()
    assert main(["inspect", "3.pt", *archs[:2], *data[:2]]) == 0
    assert main(["explain", "3.pt", "2.pt", *archs, *data[:2]]) == 0
    assert "cannot be analysed" not in capsys.readouterr().out
    assert main(["fuse", "3.pt", "2.pt", *archs, *data[:2], "--scale=2", "--out=f.pt"]) == 2
    assert "--scale does not fit the data" in capsys.readouterr().err


@pytest.mark.parametrize("calibration", ["none", "repair", "least_squares"])
def test_a_merge_takes_graphs_whole(calibration):
    base, model = (randomise(Graphs(GCNConv), 0) for _ in range(2))
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.05)
    data = graphs(130)
    options = {"method": "average", "calibration": calibration}
    assert_same(clafusion.merge(base, [model], data, **options).model, model)
    tasks = {"first": data[:100], "second": data[100:]}
    found = clafusion.merge(base, {"first": model, "second": model}, tasks, **options)
    assert found.problem.owners == (0, 1, 0)
    assert_same(found.model, model)


def assert_same(model, other):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_blocks_of_graph_networks_are_refused():
    models = [randomise(Graphs(GCNConv, width), width) for width in (8, 12)]
    with pytest.raises(InputError, match="is a graph network, whose blocks cannot be reassembled"):
        clafusion.reassemble(models, graphs(20))
