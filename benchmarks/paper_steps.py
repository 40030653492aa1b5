"""The peer: CLAFusion's steps as its authors' public code takes them, from NumPy, torch and POT.

For every two layers that could match, both Gram matrices are computed anew; activations are kept
whole; channels are matched by one ``ot.emd`` after another. There is no calibration, which the
paper leaves to training.
"""

import copy

import numpy as np
import ot
import torch
from torch import Tensor, nn

from benchmarks.cifar_resnet import CifarResNet


@torch.no_grad()
def activations(model: CifarResNet, images: Tensor) -> dict[str, np.ndarray]:
    """Return the outputs of all blocks and norms, whole."""
    found: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update({name: output.numpy()})
        )
        for name, module in model.named_modules()
        if name.endswith(("bn1", "bn2")) or name.count(".") == 1
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return linear CKA of two layers' outputs, each with its own Gram matrix."""
    grams = []
    for one in (x, y):
        flat = one.reshape(len(one), -1)
        gram = flat @ flat.T
        gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
        grams.append(gram.astype(np.float64))
    k, l = grams  # noqa: E741
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def aligned(costs: np.ndarray) -> list[int]:
    """Return for each deep block the shallow one, or -1: the paper's dynamic program."""
    m, n = costs.shape
    best = np.full((n + 1, m + 1), np.inf)
    best[0] = 0.0
    for k in range(1, n + 1):
        for j in range(k, m + 1):
            best[k, j] = min(best[k, j - 1], best[k - 1, j - 1] + costs[j - 1, k - 1])
    layer_map = [-1] * m
    k, j = n, m
    while k:
        if best[k, j] == best[k, j - 1]:
            j -= 1
        else:
            k, j = k - 1, j - 1
            layer_map[j] = k
    return layer_map


def plan(source: np.ndarray, target: np.ndarray) -> Tensor:
    """Match channels by Euclidean distance between their activations on all inputs."""
    x, y = (np.moveaxis(one, 1, 0).reshape(one.shape[1], -1) for one in (source, target))
    uniform = [np.full(len(one), 1 / len(one)) for one in (x, y)]
    cost = ot.dist(x, y, metric="euclidean").astype(np.float64)
    return torch.from_numpy(ot.emd(*uniform, cost)).float()


def fuse_by_the_paper(
    first: CifarResNet, second: CifarResNet, images: Tensor
) -> tuple[nn.Module, list[np.ndarray], list[list[int]]]:
    """Return the fused model, and for each stage the costs and the layer map of the deep blocks."""
    deep, shallow = (first, second) if len(first.layer1) >= len(second.layer1) else (second, first)
    seen = [activations(model, images) for model in (deep, shallow)]
    stages = ("layer1", "layer2", "layer3")
    costs, layer_maps = [], []
    for stage in stages:
        m, n = len(getattr(deep, stage)), len(getattr(shallow, stage))
        # A block that halves the image can match the other one that does, no other.
        cost = np.full((m, n), np.inf)
        for j in range(m):
            for k in range(n):
                if stage == "layer1" or (j == 0) == (k == 0):
                    cost[j, k] = 1 - cka(seen[0][f"{stage}.{j}"], seen[1][f"{stage}.{k}"])
        costs.append(cost)
        layer_maps.append(aligned(cost))

    fused = copy.deepcopy(deep)
    with torch.no_grad():
        stream = plan(seen[1]["bn1"], seen[0]["bn1"]) * 16
        blend(fused.conv1, shallow.conv1, None, stream)
        blend_norm(fused.bn1, shallow.bn1, stream)
        for stage, layer_map in zip(stages, layer_maps, strict=True):
            for j, k in enumerate(layer_map):
                block = getattr(fused, stage)[j]
                if k < 0:  # meets a block that writes zero
                    block.bn2.weight *= 0.5
                    block.bn2.bias *= 0.5
                    continue
                other = getattr(shallow, stage)[k]
                names = [(f"{stage}.{k}.{bn}", f"{stage}.{j}.{bn}") for bn in ("bn1", "bn2")]
                inner, outer = (plan(seen[1][a], seen[0][b]) for a, b in names)
                inner, outer = inner * len(inner), outer * len(outer)
                blend(block.conv1, other.conv1, stream, inner)
                blend_norm(block.bn1, other.bn1, inner)
                blend(block.conv2, other.conv2, inner, outer)
                blend_norm(block.bn2, other.bn2, outer)
                stream = outer
        fused.linear.weight.lerp_(shallow.linear.weight @ stream, 0.5)
        fused.linear.bias.lerp_(shallow.linear.bias, 0.5)
    return fused, costs, layer_maps


def blend(layer: nn.Conv2d, other: nn.Conv2d, into: Tensor | None, out: Tensor) -> None:
    moved = torch.einsum("oi...,op->pi...", other.weight, out)
    if into is not None:
        moved = torch.einsum("oi...,ip->op...", moved, into)
    layer.weight.lerp_(moved, 0.5)


def blend_norm(norm: nn.BatchNorm2d, other: nn.BatchNorm2d, out: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).lerp_(out.T @ getattr(other, name), 0.5)
