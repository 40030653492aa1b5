"""Networks, pairs of them and inputs that many tests use."""

import pytest
import torch

from tests.support import networks

IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))

MODELS = {
    "mlp": (lambda seed=0: networks.mlp(12, 20, 17, 9, 5, seed=seed), VECTORS),
    "vgg": (lambda seed=0: networks.vgg(2, 2, norm=False, seed=seed), IMAGES),
    "vgg, BatchNorm": (lambda seed=0: networks.vgg(2, 1, seed=seed), IMAGES),
    "resnet, padded": (lambda seed=0: networks.resnet(2, 2, seed=seed), IMAGES),
    "resnet, 1x1": (lambda seed=0: networks.resnet(1, 2, shortcut="conv", seed=seed), IMAGES),
}
# A deep and a shallow network of equal widths, for which weight 0 and 1 are exact.
PAIRS = {
    "mlp": (networks.mlp(12, 9, 9, 9, 9, 5, seed=1), networks.mlp(12, 9, 9, 5, seed=2), VECTORS),
    "vgg": (networks.vgg(3, 2, norm=False, seed=1), networks.vgg(1, 1, norm=False), IMAGES),
    "vgg, BatchNorm": (networks.vgg(3, 2, seed=1), networks.vgg(2, 1, seed=2), IMAGES),
    "resnet, padded": (networks.resnet(3, 3, seed=1), networks.resnet(1, 2, seed=2), IMAGES),
    "resnet, 1x1": (
        networks.resnet(3, 2, shortcut="conv", seed=1),
        networks.resnet(2, 1, shortcut="conv", seed=2),
        IMAGES,
    ),
}

PROFILED = {"alignment_samples": 400, "matching_rows": 8192}  # what profiles are of, by default

# Without a calibration less can go wrong: that is for the nightly run.
CALIBRATIONS = [pytest.param("none", marks=pytest.mark.nightly), "repair", "least_squares"]
