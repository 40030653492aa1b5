"""Transport problems, and a solver of them from the formulas."""

import numpy as np
import torch
from scipy.special import logsumexp


def sinkhorn_ref(cost, a, b, epsilon, relaxation=np.inf, iterations=20_000, tolerance=1e-12):
    """Plain log-domain Sinkhorn in float64; epsilon and relaxation in the cost's units."""
    exponent = 1.0 if np.isinf(relaxation) else relaxation / (relaxation + epsilon)
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    f, g = np.zeros(len(a)), np.where(b > 0, 0.0, -np.inf)
    for _ in range(iterations):
        f_new = exponent * (epsilon * log_a - epsilon * logsumexp((g - cost) / epsilon, axis=1))
        g_new = exponent * (
            epsilon * log_b - epsilon * logsumexp((f_new[:, None] - cost) / epsilon, axis=0)
        )
        live_f, live_g = a > 0, b > 0
        change = np.abs(f_new - f)[live_f].max() + np.abs(g_new - g)[live_g].max()
        f, g = f_new, g_new
        if change < tolerance:
            break
    return np.exp((f[:, None] + g - cost) / epsilon)


def problem(n, m, seed=0, dimensions=4):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dimensions)), rng.normal(size=(m, dimensions))
    return torch.from_numpy(((x[:, None] - y) ** 2).sum(-1)).float()


def weights(size, seed):
    drawn = np.random.default_rng(seed).uniform(0.2, 1.0, size)
    return torch.from_numpy(drawn / drawn.sum())
