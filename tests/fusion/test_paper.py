"""``FusionConfig.paper()`` against the published algorithm, written here in plain NumPy.

CLAFusion (arXiv 2110.15538, sections 3 and 4) on OTFusion (arXiv 1910.05653, algorithm 1), from
the formulas, for fully connected networks with ReLU.
"""

import itertools

import numpy as np
import ot
import pytest
import torch

import clafusion
from clafusion import FusionConfig, InputError, Merging, StructureError, align, fuse
from clafusion.fusion import fuse_aligned
from tests.support import networks
from tests.support.results import moved_parent

SAMPLES = 200
DATA = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
PAIRS = {
    "equal widths": (
        networks.mlp(6, 9, 9, 9, 9, 9, 4, seed=1),
        networks.mlp(6, 9, 9, 9, 4, seed=2),
    ),
    "other widths": (
        networks.mlp(6, 12, 9, 7, 8, 5, 4, seed=3),
        networks.mlp(6, 8, 10, 6, 4, seed=4),
    ),
}


def layers(model):
    """Return weights and biases, in float64."""
    tensors = [one.detach().double().numpy() for one in model.parameters()]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def preactivations(weights, x):
    found = []
    for i, (weight, bias) in enumerate(weights):
        x = (np.maximum(x, 0) if i else x) @ weight.T + bias
        found.append(x)
    return found


def cka_cost(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.square(y.T @ x).sum()
    return 1 - cross / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())


def aligned_ref(costs):
    """Try all increasing maps of the shallow layers that keep the first and last in place."""
    m, n = costs.shape
    maps = ((0, *inner, m - 1) for inner in itertools.combinations(range(1, m - 1), n - 2))
    return min(maps, key=lambda one: sum(costs[layer, k] for k, layer in enumerate(one)))


def deepened_ref(shallow, chosen, depth):
    """Put identity layers where no layer of the shallow network is matched."""
    deepened = []
    for layer in range(depth):
        if layer in chosen:
            deepened.append(shallow[chosen.index(layer)])
        else:
            width = len(deepened[-1][1])
            deepened.append((np.eye(width), np.zeros(width)))
    return deepened


def transport_ref(source, target):
    """Match channels exactly by the distance of their pre-activations, uniform masses."""
    distance = np.sqrt(np.square(source.T[:, None] - target.T[None]).sum(2))
    masses = [np.full(count, 1 / count) for count in distance.shape]
    return ot.emd(*masses, distance)


def averaged_ref(deepened, deep, plans, weight):
    """Average after aligning: divide each plan by its column sums, once."""
    fused, before = [], np.eye(deep[0][0].shape[1])
    for (w_a, b_a), (w_b, b_b), plan in zip(deepened, deep, plans, strict=True):
        after = plan / plan.sum(0)
        fused.append(
            (
                (1 - weight) * after.T @ w_a @ before + weight * w_b,
                (1 - weight) * after.T @ b_a + weight * b_b,
            )
        )
        before = after
    return fused


@pytest.mark.parametrize("match_outputs", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_each_step_is_the_published_one(name, match_outputs):
    deep, shallow = PAIRS[name]
    config = FusionConfig.paper(match_outputs=match_outputs)
    result = fuse([deep, shallow], DATA, config=config)

    inputs = DATA[:SAMPLES].double().numpy()
    of_deep, of_shallow = layers(deep), layers(shallow)
    profiles = preactivations(of_deep, inputs), preactivations(of_shallow, inputs)
    costs = np.array([[cka_cost(x, y) for y in profiles[1]] for x in profiles[0]])
    np.testing.assert_allclose(
        result.aligned.pairs[0].costs, costs, rtol=0, atol=1e-5
    )  # float32 activations

    chosen = aligned_ref(costs)
    assert tuple(deep for deep, _ in result.alignment.pairs) == chosen
    assert not result.alignment.forced

    deepened = deepened_ref(of_shallow, chosen, len(of_deep))
    flowing = preactivations(deepened, inputs)
    np.testing.assert_allclose(flowing[-1], profiles[1][-1])  # identity layers change nothing
    plans = [transport_ref(x, y) for x, y in zip(flowing, profiles[0], strict=True)]
    if not match_outputs:
        plans[-1] = np.eye(4) / 4
    moved = moved_parent(result)
    found = sorted(
        (one.name, plan.dense().numpy())
        for one, plan in zip(moved.correspondence.target.groups, moved.plans, strict=True)
    )
    for (_, plan), wanted in zip(found, plans[:-1], strict=True):
        np.testing.assert_allclose(plan, wanted, rtol=0, atol=1e-12)
    if match_outputs:
        np.testing.assert_allclose(moved.output_plan.dense().numpy(), plans[-1], rtol=0, atol=1e-12)
    else:
        assert moved.output_plan is None

    fused = averaged_ref(deepened, of_deep, plans, 0.5)
    for (weight, bias), (wanted_weight, wanted_bias) in zip(
        layers(result.model), fused, strict=True
    ):
        np.testing.assert_allclose(weight, wanted_weight, rtol=0, atol=1e-6)
        np.testing.assert_allclose(bias, wanted_bias, rtol=0, atol=1e-6)


def test_a_classifier_with_shuffled_outputs_is_matched():
    model = networks.mlp(6, 9, 7, 4)
    shuffled = networks.mlp(6, 9, 7, 4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        shuffled[-1].weight.copy_(model[-1].weight[order])
        shuffled[-1].bias.copy_(model[-1].bias[order])
    fused = fuse([model, shuffled], DATA, config=FusionConfig.paper()).model
    torch.testing.assert_close(fused(DATA), model(DATA))
    all_of_them = fuse([shuffled, model, shuffled], DATA, config=FusionConfig.paper()).model
    torch.testing.assert_close(all_of_them(DATA), shuffled(DATA))
    kept = fuse([model, shuffled], DATA, config=FusionConfig.paper(match_outputs=False)).model
    assert not torch.allclose(kept(DATA), model(DATA))


def test_the_single_normalisation_shrinks_where_widths_differ():
    model = networks.mlp(6, 10, 7, 4)
    wide = networks.widened(model, 2)
    config = FusionConfig.paper()
    two = Merging(normalisation="two")
    ours = fuse([model, wide], DATA, config=config, merging=two).model
    torch.testing.assert_close(ours(DATA), model(DATA), rtol=0, atol=1e-5)
    published = fuse([model, wide], DATA, **config.to_dict(), device="cpu").model
    assert not torch.allclose(published(DATA), model(DATA), atol=1e-2)


@pytest.mark.parametrize(
    ("deep", "shallow"),
    [
        (networks.vgg(3, 2, seed=1), networks.vgg(1, 2, seed=2)),
        (networks.resnet(3, 2, seed=1), networks.resnet(2, 1, seed=2)),
    ],
)
def test_the_published_steps_serve_convolutions(deep, shallow):
    images = torch.randn(230, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    config = FusionConfig.paper()
    result = fuse([deep, shallow], images, config=config)
    assert [one.num_inputs for one in result.aligned.profiles] == [SAMPLES, SAMPLES]
    again = fuse([deep, shallow], images[:SAMPLES].split(7), config=config).model
    for one, other in zip(result.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_apart", [False, True])
def test_outputs_of_a_product_with_a_matrix_are_matched(is_apart):
    """As those of a linear layer; the outputs lie on the second axis of a matrix."""

    class Products(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.first = model[0]
            self.matrix = torch.nn.Parameter(model[-1].weight.detach().T.clone())
            self.bias = torch.nn.Parameter(model[-1].bias.detach().clone())

        def forward(self, x):
            x = torch.relu(self.first(x))
            return x @ self.matrix + self.bias if is_apart else self.bias.addmm(x, self.matrix)

    models = [networks.mlp(6, 9, 4, seed=seed).eval() for seed in (1, 2)]
    wanted = fuse(models, DATA, config=FusionConfig.paper()).model
    found = fuse([Products(one).eval() for one in models], DATA, config=FusionConfig.paper()).model
    torch.testing.assert_close(networks.output(found, DATA), networks.output(wanted, DATA))


def test_many_pairs_take_the_published_steps():
    deep, shallow = PAIRS["other widths"]
    config = FusionConfig.paper()
    models = {"deep": deep, "shallow": shallow}
    (found,) = clafusion.fuse_pairs(models, DATA, config=config)
    wanted = fuse(models, DATA, config=config).model
    for one, other in zip(found.model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)


def test_wrong_settings_are_refused():
    for stage, name in (("profiling", "layer_values"), ("merging", "normalisation")):
        with pytest.raises(InputError, match=rf"{stage}\.{name} must be one of"):
            FusionConfig(**{stage: {name: "both"}})
    with pytest.raises(InputError, match=r"profiling\.inputs must be a whole number"):
        FusionConfig(profiling={"inputs": 1})
    with pytest.raises(InputError, match=r"profiling\.layer_values='preactivation'; got 'output'"):
        fuse(PAIRS["equal widths"], DATA, matching={"outputs": True})
    aligned = align(PAIRS["equal widths"], DATA)
    with pytest.raises(StructureError, match="layer_values='preactivation'"):
        fuse_aligned(aligned, DATA, config=FusionConfig.paper())
