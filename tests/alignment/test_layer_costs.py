"""Similarities of layers against their definitions, by known answers, and their refusals."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch
from torch import nn

from clafusion import InputError, _core, _native, num_threads, set_num_threads
from clafusion.alignment.layer_costs import (
    _hsic_all_pairs,
    cka,
    gram,
    layer_costs,
    linear_cka,
    mean_cca,
)
from clafusion.fusion import profile


def layers(count, samples=30, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(samples, 5 + 3 * i)) + 1.0 for i in range(count)]


def grams(features):
    return [x @ x.T for x in features]


def cka_ref(x, y):
    """By features, Kornblith et al., equation 4; not by Gram matrices."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.sum((y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def unbiased_hsic_ref(k, m):
    """Song et al., JMLR 2012, equation 5, as it stands there."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_cka_equals_the_feature_formula():
    a, b = layers(4), layers(3, seed=1)
    expected = [[cka_ref(x, y) for y in b] for x in a]
    np.testing.assert_allclose(cka(grams(a), grams(b)), expected, rtol=1e-12)


@pytest.mark.parametrize("samples", [4, 5, 16, 17, 30, 65])
def test_unbiased_cka_equals_the_published_formula(samples):
    a, b = grams(layers(3, samples)), grams(layers(2, samples, seed=1))
    expected = [
        [
            unbiased_hsic_ref(k, m)
            / np.sqrt(np.abs(unbiased_hsic_ref(k, k) * unbiased_hsic_ref(m, m)))
            for m in b
        ]
        for k in a
    ]
    np.testing.assert_allclose(cka(a, b, unbiased=True), np.clip(expected, -1, 1), atol=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
def test_rotation_scale_and_shift_change_nothing(unbiased):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    moved = 3.0 * x @ rotation + rng.normal(size=12)
    assert cka(grams([x]), grams([moved]), unbiased=unbiased)[0, 0] == pytest.approx(1, abs=1e-12)


def test_only_unbiased_cka_sees_that_wide_layers_are_independent():
    a, b = (np.random.default_rng(seed).normal(size=(60, 2000)) for seed in (0, 1))
    assert cka(grams([a]), grams([b]))[0, 0] > 0.9
    # 60 * 57 / 2 independent entries: its standard deviation is 0.024
    assert abs(cka(grams([a]), grams([b]), unbiased=True)[0, 0]) < 0.1


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("features", [3, 40], ids=["by features", "by Gram matrices"])
def test_cka_of_activations_is_that_of_their_gram_matrices(features, unbiased):
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(60, features, generator=draw)
    sides = [
        [common * scale + torch.randn(60, features, generator=draw) for scale in scales]
        for scales in ((0.5, 1.0, 2.0), (1.0, 0.1))
    ]
    sides[0].append(torch.randn(60, 2, 2, generator=draw) + 5)
    grams_a, grams_b = ([gram(one.flatten(1)) for one in side] for side in sides)
    expected = cka(grams_a, grams_b, unbiased=unbiased)
    found = linear_cka(*sides, unbiased=unbiased)
    # float32 Gram sums of centred values near 1, off by 2^-24 a product
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (4, 2)


def test_cka_of_activations_refuses_by_name():
    x = torch.randn(10, 3)
    for a, b, message in [
        ([x], [], "layers_b must be a list with at least one"),
        (x, [x], "layers_a must be a list"),
        ([x], [x, x.long()], r"layers_b\[1\] must be a floating-point tensor"),
        ([x], [None], r"layers_b\[0\] must be .* got NoneType"),
        ([x], [x[:5]], r"layers_b\[0\] is over 5 samples; all layers .* same"),
        ([x[:1]], [x[:1]], "at least 2"),
        ([x], [torch.ones(10, 3)], r"layers_b\[0\] is of a layer that is constant"),
        ([x / 0.0], [x], r"layers_a\[0\] must hold finite numbers"),
    ]:
        with pytest.raises(InputError, match=message):
            linear_cka(a, b)


def test_mean_cca_by_known_answers():
    rng = np.random.default_rng(4)
    whole = np.linalg.qr(np.column_stack([np.ones(30), rng.normal(size=(30, 8))]))[0][:, 1:]
    left = whole[:, :4]
    mixed = left @ rng.normal(size=(4, 4))  # the same space, another basis
    other = whole[:, 4:]  # orthogonal to it
    half = whole[:, 2:6]  # shares two of four directions
    found = mean_cca(grams([left]), grams([left, mixed, other, half]))
    np.testing.assert_allclose(found, [[1, found[0, 1], 0, 0.5]], atol=1e-12)
    # 99 % of the mixed basis's variance may leave out a direction, but none is new.
    assert found[0, 1] == pytest.approx(1)


def test_bytes_do_not_depend_on_threads():
    a, b = grams(layers(7, 90)), grams(layers(5, 90, seed=1))
    before = num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            set_num_threads(threads)
            found.append(cka(a, b).tobytes())
    finally:
        set_num_threads(before)
    assert len(set(found)) == 1


def test_reads_lower_triangles_tensors_and_any_layout():
    a, b = grams(layers(2)), grams(layers(2, seed=1))
    expected = cka(a, b)
    lower = [np.tril(one) for one in a]
    tensors = [torch.from_numpy(np.asfortranarray(one)) for one in b]
    assert np.array_equal(cka(lower, tensors), expected)


def stand_in(layers, key=1, samples=20):
    """Build a stand-in with what these metrics read: layers as (channels, seed), 3 positions."""
    rng = np.random.default_rng
    return SimpleNamespace(
        grams=tuple(
            torch.from_numpy(x @ x.T) for x in (rng(s).normal(size=(samples, 9)) for _, s in layers)
        ),
        features=tuple(3 * channels for channels, _ in layers),
        data_key=key,
        traced=SimpleNamespace(
            layers=[SimpleNamespace(output_shape=(3,)) for _ in layers],
            entered_layers=[True for _ in layers],
            graph=None,
        ),
    )


def test_layers_that_no_input_enters_are_like_each_other_only():
    models = [stand_in([(8, 0), (16, 1), (9, 2)]), stand_in([(8, 0), (32, 2)])]
    whole = layer_costs(*models)
    models[0].traced.entered_layers = [False, True, True]
    models[1].traced.entered_layers = [False, True]
    for one in models:
        one.grams[0].fill_(1.0)
    costs = layer_costs(*models)
    np.testing.assert_array_equal(costs[0], [0.0, 1.0])
    np.testing.assert_array_equal(costs[1:, 0], [1.0, 1.0])
    np.testing.assert_allclose(costs[1:, 1], whole[1:, 1])
    models[1].traced.entered_layers = [True, True]
    models[1].traced.layers[0].name = "first"
    with pytest.raises(InputError, match="puts out the same for all inputs"):
        layer_costs(*models)


def test_layer_costs_by_metric():
    deep = stand_in([(8, 0), (16, 1), (9, 2)])
    shallow = stand_in([(8, 0), (32, 2)])
    for metric in ("cka", "cka_unbiased", "cca"):
        costs = layer_costs(deep, shallow, metric=metric)
        assert costs.shape == (3, 2)
        np.testing.assert_allclose([costs[0, 0], costs[2, 1]], 0, atol=1e-12)
        assert (costs[[0, 1, 1, 2], [1, 0, 1, 0]] > 0.1).all()
    np.testing.assert_allclose(
        layer_costs(deep, shallow, metric="index"), [[0, 1 / 2], [1 / 3, 1 / 6], [2 / 3, 1 / 6]]
    )
    np.testing.assert_allclose(
        layer_costs(deep, shallow, metric="neurons"), [[0, 3 / 4], [1 / 2, 1 / 2], [1 / 9, 23 / 32]]
    )


def network(*widths, image=False):
    layers = []
    for before, after in pairwise(widths):
        one = nn.Conv2d(before, after, 3, padding=1) if image else nn.Linear(before, after)
        layers += [one, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def read_correlations_ref(deep, i, shallow, k):
    """Pre-activations of two chain layers over the profiles' rows, by NumPy's own correlation."""
    x, y = (
        s.rows[j, len(s.traced.layers[j].hook_points) - 1] for s, j in ((deep, i), (shallow, k))
    )
    both = np.corrcoef(x.double().numpy().T, y.double().numpy().T)
    return both[: x.size(1), x.size(1) :]


@pytest.mark.parametrize("image", [False, True])
def test_wasserstein_is_the_optimal_transport_of_correlations(image):
    torch.manual_seed(0)
    data = torch.randn(60, 5, 4, 4) if image else torch.randn(60, 5)
    deep = profile(network(5, 8, 6, 7, 3, image=image), data)
    shallow = profile(network(5, 6, 9, 3, image=image), data)
    found = layer_costs(deep, shallow, metric="wasserstein")
    entropic = layer_costs(deep, shallow, metric="wasserstein_entropic")
    assert found.shape == (4, 3)
    # the outputs have no channels to be matched: they agree with each other only
    assert found[3, 2] == 0
    assert np.isinf(found[3, :2]).all()
    assert np.isinf(found[:3, 2]).all()
    for i in range(3):
        for k in range(2):
            cost = 1 - read_correlations_ref(deep, i, shallow, k)
            uniform = [np.full(size, 1 / size) for size in cost.shape]
            assert found[i, k] == pytest.approx(ot.emd2(*uniform, cost), abs=1e-5)
            # the entropy keeps the plan from the optimum by at most epsilon * log(n m)
            assert found[i, k] - 1e-5 <= entropic[i, k] <= found[i, k] + 0.05 * 2 * np.log(72)


def test_wasserstein_does_not_see_the_order_of_neurons():
    torch.manual_seed(0)
    model = network(5, 8, 6, 3)
    other = copy.deepcopy(model)
    order = torch.randperm(8)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    data = torch.randn(40, 5)
    costs = layer_costs(profile(model, data), profile(other, data), metric="wasserstein")
    np.testing.assert_allclose(np.diag(costs), 0, atol=1e-6)
    assert costs[0, 1] > 0.1


def test_wasserstein_sets_apart_what_cannot_be_compared():
    torch.manual_seed(0)
    data = torch.randn(20, 5, 4, 4)
    pooled = nn.Sequential(
        nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1)
    )
    whole = network(5, 6, 6, image=True)
    one = profile(nn.Sequential(pooled, nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)), data)
    two = profile(nn.Sequential(whole, nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)), data)
    positions = [
        [
            layer.hook_points[-1].positions if layer.hook_points else None
            for layer in s.traced.layers
        ]
        for s in (one, two)
    ]
    assert len(set(positions[0] + positions[1])) > 1
    costs = layer_costs(one, two, metric="wasserstein")
    assert np.isinf(costs[1, 1])  # 2 x 2 and 4 x 4 positions
    assert not np.isnan(costs).any()


def test_refusals_of_layer_costs():
    one = stand_in([(8, 0)])
    with pytest.raises(InputError, match="metric must be one of"):
        layer_costs(one, one, metric="euclid")
    with pytest.raises(InputError, match="same inputs in the same order"):
        layer_costs(one, stand_in([(8, 0)], key=2))


@pytest.mark.parametrize("similarity", [cka, mean_cca])
def test_refusals_by_name(similarity):
    good = grams(layers(2))
    broken = good[1].copy()
    broken[5, 2] = np.nan
    for a, b, message in [
        ([], good, "grams_a must hold at least one"),
        (good, [], "grams_b must hold at least one"),
        (good, [good[0], good[0][:4]], r"grams_b\[1\] must be a square matrix"),
        (good, [good[0][:4, :4]], r"grams_b\[0\] \(4, 4\)"),
        ([[["a"]]], good, r"grams_a\[0\] must hold real numbers"),
        ([np.ones((1, 1))], good, "at least 2 are needed"),
        (good, [good[0], broken], r"grams_b\[1\] must hold finite"),
        ([good[0], np.full((30, 30), 7.0)], good, r"grams_a\[1\] is of a layer that is constant"),
    ]:
        with pytest.raises(InputError, match=message):
            similarity(a, b)
    with pytest.raises(InputError, match="at least 4 are needed"):
        cka([np.eye(3)], [np.eye(3)], unbiased=True)


def test_the_compiled_door_refuses_too():
    good = [np.eye(5), np.ones((5, 5))]
    products, a, b = np.empty((2, 2)), np.empty(2), np.empty(2)
    for arguments, message in [
        (([], good, False, products, a, b), "at least one matrix"),
        ((good, [np.eye(4)] * 2, False, products, a, b), "square and of one size"),
        ((good, [np.ones(5)] * 2, False, products, a, b), "square and of one size"),
        ((good, good, False, np.empty((2, 3)), a, b), "products must have shape"),
        ((good, good, False, products, np.empty(3), b), "one entry a matrix"),
        (([np.eye(3)] * 2, [np.eye(3)] * 2, True, products, a, b), "at least 4 samples"),
        (([np.eye(1)] * 2, [np.eye(1)] * 2, False, products, a, b), "at least 2 samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.hsic_all_pairs(*arguments)
    with pytest.raises(TypeError):
        _core.hsic_all_pairs([np.eye(5, dtype=np.float32)], good, False, products, a, b)


@pytest.mark.parametrize("unbiased", [False, True])
def test_what_a_gpu_centres_and_multiplies_equals_the_compiled_call(unbiased):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(50, width)) for width in (3, 20, 200)]
    grams = [torch.from_numpy(np.tril(x @ x.T)) for x in layers]  # the lower triangle counts
    arrays = [one.numpy() for one in grams]
    expected = _native.hsic_all_pairs(arrays, arrays[:2], unbiased=unbiased)
    found = _hsic_all_pairs(grams, grams[:2], unbiased=unbiased)
    for one, other in zip(found, expected, strict=True):
        # Sums of 2500 float64 numbers that cancel against a mean of their own size.
        np.testing.assert_allclose(one, other, rtol=1e-10)
