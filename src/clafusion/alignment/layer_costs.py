"""Two ModelProfiles -> the cost of matching every layer of one with every layer of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from clafusion import _native
from clafusion._native import gram
from clafusion.alignment.alive import check_alive
from clafusion.config import LAYER_COSTS
from clafusion.errors import InputError, check_listed, kind_of
from clafusion.profiling.gram import gram_matrix
from clafusion.profiling.profile import ModelProfile
from clafusion.profiling.statistics import standardised
from clafusion.transport.solve import solve_transport

__all__ = ["check_same_inputs", "cka", "gram", "layer_costs", "linear_cka", "mean_cca"]

_VARIANCE_KEPT = 0.99


def check_same_inputs(one: ModelProfile, other: ModelProfile) -> None:
    """Refuse to compare profiles of different inputs, or of the same in another order."""
    if one.data_key != other.data_key:
        raise InputError(
            "the profiles come from different inputs: profile both models on the same inputs in "
            "the same order, together or from data that is not shuffled (a DataLoader that "
            "shuffles gives another order each time)"
        )


def layer_costs(
    deep: ModelProfile,
    shallow: ModelProfile,
    *,
    metric: str = "cka",
    names: tuple[str, str] = ("the deeper model", "the shallower model"),
) -> NDArray[np.float64]:
    r"""Return the cost of matching every layer of one network with every layer of another.

    Parameters
    ----------
    deep, shallow
        The profiles of networks with ``m`` and ``n`` layers, profiled on the same inputs.
    metric
        - ``"cka"``, ``"cka_unbiased"``: one minus :func:`cka` of the layers' outputs;
        - ``"cca"``: one minus :func:`mean_cca` of them;
        - ``"wasserstein"``, ``"wasserstein_entropic"``: the cost of the optimal transport between
          the layers' channels, all of equal weight, where moving a channel to another costs one
          minus their correlation. The result is in [0, 2]: half the squared 2-Wasserstein distance
          between the channels as points, each with mean 0 and variance 1 over the profiles' rows.
          Exact, or by Sinkhorn's iteration with epsilon 0.05. ``inf`` where the outputs have
          different numbers of positions, or only one of them has channels to be matched; 0 where
          neither has;
        - ``"neurons"``: the relative difference of the channel counts, ``|a - b| / max(a, b)``;
        - ``"index"``: the difference of the relative depths, ``|l / m - k / n|``.
    names
        What errors call the networks.

    Returns
    -------
    ndarray
        ``(m, n)``, smaller is closer; the costs have no unit. By CKA and CCA a layer that no input
        of the model enters (the first of a decoder that starts from learnt queries) is like all
        such, at cost 0, and unlike the others, at cost 1.

    Raises
    ------
    InputError
        ``metric`` is unknown, the profiles are of different inputs, or a layer puts out the same
        for all inputs.
    """
    if metric not in LAYER_COSTS:
        raise InputError(f"metric must be one of {tuple(LAYER_COSTS)}; got {metric!r}")
    check_listed(names, "names", "two names")
    if len(names) != 2:
        raise InputError(f"names must be two names; got {names!r}")
    for called, one in (("deep", deep), ("shallow", shallow)):
        if not hasattr(one, "grams"):
            raise InputError(
                f"{called} must be a profile, as clafusion.profile returns it; got {kind_of(one)}"
            )
    if metric == "index":
        depths = [
            np.arange(len(profile.grams)) / max(len(profile.grams), 1)
            for profile in (deep, shallow)
        ]
        return np.abs(depths[0][:, None] - depths[1])
    if metric == "neurons":
        source, target = _num_channels(deep)[:, None], _num_channels(shallow)
        return np.abs(source - target) / np.maximum(source, target)
    check_same_inputs(deep, shallow)
    if metric in ("wasserstein", "wasserstein_entropic"):
        return _wasserstein(deep, shallow, entropic=metric == "wasserstein_entropic")
    entered = [np.array(one.traced.entered_layers, dtype=bool) for one in (deep, shallow)]
    for name, profile in zip(names, (deep, shallow), strict=True):
        check_alive(name, profile)
    of_deep, of_shallow = (
        [one for one, counts in zip(profile.grams, of, strict=True) if counts]
        for profile, of in zip((deep, shallow), entered, strict=True)
    )
    # What no input enters is like all of its sort, and unlike the others.
    costs: NDArray[np.float64] = (entered[0][:, None] != entered[1]).astype(np.float64)
    costs[np.ix_(*entered)] = (
        1 - mean_cca(of_deep, of_shallow)
        if metric == "cca"
        else 1 - cka(of_deep, of_shallow, unbiased=metric == "cka_unbiased")
    )
    return costs


def cka(
    grams_a: Sequence[ArrayLike | Tensor],
    grams_b: Sequence[ArrayLike | Tensor],
    *,
    unbiased: bool = False,
) -> NDArray[np.float64]:
    r"""Return the centred kernel alignment of all pairs of layers, given their Gram matrices.

    .. math:: \frac{\langle HKH, HLH \rangle}{\|HKH\| \, \|HLH\|}, \quad H = I - \tfrac1S 1 1^T

    (Kornblith et al., arXiv 1905.00414, section 3). This estimate of HSIC is biased: over few
    samples any two layers with many features look alike. ``unbiased`` takes the estimate of Song
    et al. (JMLR 2012, equation 5; for CKA Nguyen et al., arXiv 2010.15327, section 3), whose
    expectation is 0 for independent layers.

    Parameters
    ----------
    grams_a, grams_b
        Symmetric matrices ``(num_samples, num_samples)`` over the same samples. Only the lower
        triangles count.
    unbiased
        Whether to take the unbiased estimate.

    Returns
    -------
    ndarray
        ``(len(grams_a), len(grams_b))``, in [0, 1] (unbiased: [-1, 1]).

    Raises
    ------
    InputError
        A matrix is not square, not finite or not of the others' size, there are fewer than 2
        samples (unbiased: 4), or a layer is constant over the samples.

    Notes
    -----
    If all matrices are tensors on one GPU, the computation runs there.
    """
    a, b = _checked_grams(grams_a, grams_b, least=_fewest_samples(unbiased))
    products, norms_a, norms_b = _hsic_all_pairs(a, b, unbiased=unbiased)
    _check_norms("grams_a", _diagonals(a), norms_a)
    _check_norms("grams_b", _diagonals(b), norms_b)
    return _normalised(products, norms_a, norms_b, unbiased=unbiased)


def linear_cka(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], *, unbiased: bool = False
) -> NDArray[np.float64]:
    r"""Return the linear centred kernel alignment of all pairs of layers, given their activations.

    It is :func:`cka` of the Gram matrices ``X X^T``. It also follows from the products of features,

    .. math:: \langle HKH, HLH \rangle = \|(HX)^T HY\|^2

    (Kornblith et al., arXiv 1905.00414, section 3). The function takes the way with fewer
    multiplications: Gram matrices, unless the layers have few features and many samples.

    Parameters
    ----------
    layers_a, layers_b
        Activations ``(num_samples, ...)`` of the same samples, floating point; all axes but the
        first hold features.
    unbiased
        As for :func:`cka`.

    Returns
    -------
    ndarray
        ``(len(layers_a), len(layers_b))``, in [0, 1] (unbiased: [-1, 1]).

    Raises
    ------
    InputError
        An entry is no floating-point tensor, not finite or not over the others' number of
        samples, there are fewer than 2 samples (unbiased: 4), or a layer is constant over them.
    """
    a, b = _checked_layers(layers_a, layers_b, least=_fewest_samples(unbiased))
    if all(layer.device.type == "cuda" for layer in (*a, *b)):
        grams_a, grams_b = ([gram_matrix(x) for x in side] for side in (a, b))
        return cka(grams_a, grams_b, unbiased=unbiased)
    samples = len(a[0])
    sizes_a, sizes_b = ([layer.size(1) for layer in side] for side in (a, b))
    by_grams = samples * (sum(sizes_a) + sum(sizes_b) + len(a) * len(b)) / 2
    by_features = sum(sizes_a) * sum(sizes_b) + sum(size**2 for size in (*sizes_a, *sizes_b))
    if by_grams <= by_features:
        return cka([gram(x) for x in a], [gram(x) for x in b], unbiased=unbiased)
    return _cka_of_features(a, b, unbiased=unbiased)


def _cka_of_features(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], *, unbiased: bool
) -> NDArray[np.float64]:
    """Compute :func:`linear_cka` of layers ``(num_samples, num_features)`` from their features."""
    with np.errstate(invalid="ignore"):  # NaN and infinity show in the norms, which are checked
        a, b = (
            [x - x.mean(0) for x in (layer.detach().cpu().double().numpy() for layer in side)]
            for side in (layers_a, layers_b)
        )
    lengths_a, lengths_b = ([np.square(x).sum(1) for x in side] for side in (a, b))
    samples = len(a[0])

    def hsic(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float(np.square(x.T @ y).sum())

    def corrected(product: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        # The estimate of Song et al. leaves out the diagonals of K and L. They hold the samples'
        # squared lengths x and y. The features are centred, so each row of K sums to 0, and without
        # its diagonal to minus x.
        if not unbiased:
            return product
        return (
            product
            - (1 + 2 / (samples - 2)) * float(x @ y)
            + float(x.sum() * y.sum()) / ((samples - 1) * (samples - 2))
        )

    products = np.array(
        [
            [corrected(hsic(x, y), p, q) for y, q in zip(b, lengths_b, strict=True)]
            for x, p in zip(a, lengths_a, strict=True)
        ]
    )
    norms_a, norms_b = (
        np.array([corrected(hsic(x, x), p, p) for x, p in zip(side, lengths, strict=True)])
        for side, lengths in ((a, lengths_a), (b, lengths_b))
    )
    _check_norms("layers_a", lengths_a, norms_a)
    _check_norms("layers_b", lengths_b, norms_b)
    return _normalised(products, norms_a, norms_b, unbiased=unbiased)


def _fewest_samples(unbiased: bool) -> int:
    return 4 if unbiased else 2


def _normalised(
    products: NDArray[np.float64],
    norms_a: NDArray[np.float64],
    norms_b: NDArray[np.float64],
    *,
    unbiased: bool,
) -> NDArray[np.float64]:
    similarity = products / np.sqrt(norms_a[:, None]) / np.sqrt(norms_b)
    return np.clip(similarity, -1.0 if unbiased else 0.0, 1.0)


def _checked_layers(
    layers_a: Sequence[Tensor], layers_b: Sequence[Tensor], *, least: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return all layers as ``(num_samples, num_features)``, over at least ``least`` samples."""
    checked: list[list[Tensor]] = []
    samples: int | None = None
    for name, layers in (("layers_a", layers_a), ("layers_b", layers_b)):
        check_listed(layers, name, "a list of tensors")
        if isinstance(layers, Tensor) or len(layers) == 0:
            raise InputError(f"{name} must be a list with at least one tensor")
        for i, layer in enumerate(layers):
            if not isinstance(layer, Tensor) or not layer.is_floating_point() or layer.ndim < 2:
                raise InputError(
                    f"{name}[{i}] must be a floating-point tensor (num_samples, ...); got "
                    + (
                        f"{layer.dtype} of shape {tuple(layer.shape)}"
                        if isinstance(layer, Tensor)
                        else type(layer).__name__
                    )
                )
            samples = len(layer) if samples is None else samples
            if len(layer) != samples or samples < least:
                raise InputError(
                    f"{name}[{i}] is over {len(layer)} samples; all layers must be over the same, "
                    f"at least {least}"
                )
        checked.append([layer.flatten(1) for layer in layers])
    return checked[0], checked[1]


def mean_cca(
    grams_a: Sequence[ArrayLike | Tensor], grams_b: Sequence[ArrayLike | Tensor]
) -> NDArray[np.float64]:
    r"""Return the mean squared canonical correlation of all pairs of layers.

    For each layer only those principal components count that together hold 99 % of its variance,
    as in SVCCA (arXiv 1706.05806): with more features than samples, all components would correlate
    any two layers perfectly. With orthonormal bases ``U`` ``(num_samples, p)`` and ``V``
    ``(num_samples, q)`` of the components the result is

    .. math:: \|U^T V\|^2 / \min(p, q)

    (Kornblith et al., arXiv 1905.00414, section 3.2).

    Parameters
    ----------
    grams_a, grams_b
        As for :func:`cka`.

    Returns
    -------
    ndarray
        ``(len(grams_a), len(grams_b))``, in [0, 1].

    Raises
    ------
    InputError
        As for :func:`cka`.
    """
    a, b = _checked_grams(grams_a, grams_b, least=2)
    _, norms_a, norms_b = _hsic_all_pairs(a, b, unbiased=False)
    _check_norms("grams_a", _diagonals(a), norms_a)
    _check_norms("grams_b", _diagonals(b), norms_b)
    bases_a, bases_b = ([_components(_on_host(matrix)) for matrix in side] for side in (a, b))
    similarity = [
        [np.sum((u.T @ v) ** 2) / min(u.shape[1], v.shape[1]) for v in bases_b] for u in bases_a
    ]
    return np.asarray(np.clip(similarity, 0.0, 1.0))


_Gram = NDArray[np.float64] | Tensor


def _hsic_all_pairs(
    a: list[_Gram], b: list[_Gram], *, unbiased: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the inner products of all pairs of centred matrices, and their own squared norms."""
    if not isinstance(a[0], Tensor):
        return _native.hsic_all_pairs(
            cast("list[NDArray[np.float64]]", a),
            cast("list[NDArray[np.float64]]", b),
            unbiased=unbiased,
        )
    packed_a, packed_b = (
        torch.stack([_centred(cast(Tensor, matrix), unbiased=unbiased) for matrix in side])
        for side in (a, b)
    )
    products = packed_a @ packed_b.T
    norms = packed_a.square().sum(1), packed_b.square().sum(1)
    return products.cpu().numpy(), norms[0].cpu().numpy(), norms[1].cpu().numpy()


def _centred(gram_: Tensor, *, unbiased: bool) -> Tensor:
    """Return a centred Gram matrix in one row, on its device.

    It is ``H K H``, or for the unbiased estimate the U-centred matrix, which has a zero diagonal
    (Song et al., JMLR 2012).
    """
    full = gram_.tril() + gram_.tril(-1).T
    samples = len(full)
    if not unbiased:
        mean = full.mean(0)
        return (full - mean - mean[:, None] + mean.mean()).flatten()
    full.fill_diagonal_(0.0)
    sums = full.sum(0)
    means = sums / (samples - 2)
    full = full - means - means[:, None] + sums.sum() / ((samples - 1) * (samples - 2))
    return full.fill_diagonal_(0.0).flatten()


def _on_host(matrix: _Gram) -> NDArray[np.float64]:
    return matrix.cpu().numpy() if isinstance(matrix, Tensor) else matrix


def _diagonals(grams: Sequence[_Gram]) -> list[NDArray[np.float64]]:
    return [
        _on_host(matrix.diagonal()) if isinstance(matrix, Tensor) else np.diagonal(matrix)
        for matrix in grams
    ]


def _wasserstein(
    deep: ModelProfile, shallow: ModelProfile, *, entropic: bool
) -> NDArray[np.float64]:
    """Return the transport costs between the output channels of all pairs of layers."""
    deep_channels, shallow_channels = _output_channels(deep), _output_channels(shallow)
    costs = np.full((len(deep_channels), len(shallow_channels)), np.inf)
    for i, one in enumerate(deep_channels):  # a row of problems at a time, to bound the memory
        by_solver: dict[str, list[tuple[int, Tensor]]] = {}
        for k, other in enumerate(shallow_channels):
            if one is None and other is None:
                costs[i, k] = 0.0
            elif one is not None and other is not None and one[0] == other[0]:
                x, y = one[1], other[1]
                exact = "assignment" if x.size(1) == y.size(1) else "exact"
                solver = "sinkhorn" if entropic else exact
                by_solver.setdefault(solver, []).append((k, 1.0 - (x.T @ y).double() / len(x)))
        for solver, problems in by_solver.items():
            solutions = solve_transport([cost for _, cost in problems], solver=solver)
            for (k, _), solution in zip(problems, solutions, strict=True):
                costs[i, k] = max(0.0, float(solution.cost))  # below 0 only by rounding
    return costs


def _output_channels(profile: ModelProfile) -> list[tuple[int, Tensor] | None]:
    """Return for each layer the number of positions of its output and its standardised channels.

    The channels are ``(num_rows, num_channels)``. None where the output has no channels to be
    matched.
    """
    outputs: list[tuple[int, Tensor] | None] = []
    for layer in profile.traced.layers:
        last = len(layer.hook_points) - 1
        if last < 0 or layer.hook_points[last].post != layer.output:
            outputs.append(None)
            continue
        x = standardised(profile.rows[layer.index, last])
        outputs.append((math.prod(layer.hook_points[last].positions), x))
    return outputs


def _components(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an orthonormal basis ``(num_samples, p)`` of the principal components that count."""
    full = np.tril(gram) + np.tril(gram, -1).T
    mean = full.mean(0)
    values, vectors = np.linalg.eigh(full - mean - mean[:, None] + mean.mean())
    variances = np.cumsum(np.maximum(values[::-1], 0.0))
    kept = int(np.searchsorted(variances, _VARIANCE_KEPT * variances[-1])) + 1
    return vectors[:, ::-1][:, :kept]


def _num_channels(profile: ModelProfile) -> NDArray[np.float64]:
    """Return how many channels each layer's output has."""
    return np.array(
        [
            features / math.prod(layer.output_shape)
            for layer, features in zip(profile.traced.layers, profile.features, strict=True)
        ]
    )


def _checked_grams(
    grams_a: Sequence[ArrayLike | Tensor], grams_b: Sequence[ArrayLike | Tensor], *, least: int
) -> tuple[list[_Gram], list[_Gram]]:
    """Return all matrices in float64, on the GPU if all are there, else as NumPy's arrays."""
    check_listed(grams_a, "grams_a", "a list of Gram matrices")
    check_listed(grams_b, "grams_b", "a list of Gram matrices")
    every = [*grams_a, *grams_b]
    devices = {matrix.device if isinstance(matrix, Tensor) else None for matrix in every}
    on_gpu = len(devices) == 1 and all(
        device is not None and device.type == "cuda" for device in devices
    )
    first: tuple[int, ...] | None = None
    checked = []
    for name, grams in (("grams_a", grams_a), ("grams_b", grams_b)):
        if len(grams) == 0:
            raise InputError(f"{name} must hold at least one matrix")
        arrays: list[_Gram] = []
        for i, matrix in enumerate(grams):
            array: _Gram
            try:
                if on_gpu and isinstance(matrix, Tensor):
                    array = matrix.detach().double()
                else:
                    values = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else matrix
                    array = np.ascontiguousarray(values, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}[{i}] must hold real numbers: {error}") from error
            shape = tuple(array.shape)
            if len(shape) != 2 or shape[0] != shape[1]:
                raise InputError(f"{name}[{i}] must be a square matrix; got shape {shape}")
            if len(array) < least:
                raise InputError(
                    f"{name}[{i}] is over {len(array)} samples; at least {least} are needed"
                )
            first = first or shape
            if shape != first:
                raise InputError(
                    f"all matrices must be over the same samples; grams_a[0] has shape {first} "
                    f"but {name}[{i}] {shape}"
                )
            arrays.append(array)
        checked.append(arrays)
    return checked[0], checked[1]


def _check_norms(
    name: str,
    squared_lengths: Sequence[NDArray[np.float64]],
    squared_norms: NDArray[np.float64],
) -> None:
    """Raise where centring leaves too little of a layer, given its samples' squared lengths."""
    for i, (lengths, squared_norm) in enumerate(zip(squared_lengths, squared_norms, strict=True)):
        if not np.isfinite(squared_norm):
            raise InputError(f"{name}[{i}] must hold finite numbers below 1e150")
        # Of a constant layer, float64 sums of S numbers leave a norm of this size by rounding.
        rounding = 1e-13 * len(lengths) * np.abs(lengths).max()
        if squared_norm <= rounding**2:
            raise InputError(
                f"{name}[{i}] is of a layer that is constant over the samples, so that its "
                "similarity is undefined; drop it or give inputs that differ more"
            )
