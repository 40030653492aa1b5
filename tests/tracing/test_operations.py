"""Operations that people use: what moves with them shows in permuted copies, which fuse back."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from clafusion import fuse, trace
from tests.support.architectures import ARCHITECTURES, randomise
from tests.support.networks import output, permuted_copy

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(1, 23, (24, 6), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(24, 12, generator=torch.Generator().manual_seed(2))
SEQUENCES = torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(3))

NETWORKS = {
    "Position ids that depend on the input (RoBERTa-like)": WORDS,
    "Position that the input chooses (CLIP-like end of text)": WORDS,
    "A bare table read by the input": WORDS,
    "Masked positions replaced by a token": SEQUENCES,
    "Rows added up by index": SEQUENCES,
    "Writes to parts of a new tensor": IMAGES,
    "Views of features written in place": IMAGES,
    "In-place write to a slice of channels": IMAGES,
    "Patches taken apart and folded": IMAGES,
    "Features sampled on a grid": IMAGES,
    "Fourier transform over positions (GFNet-like)": IMAGES,
    "Cumulative sum over positions": SEQUENCES,
    "Einsum layers": SEQUENCES,
    "Einsum attention with a weight for each head": SEQUENCES,
    "Bias joined from two parts and zeros": SEQUENCES,
    "Low-rank change of a weight (LoRA)": ROWS,
    "Bilinear layer": ROWS,
    "Cosine classifier": IMAGES,
    "Cosine similarity with prototypes": ROWS,
    "Distances to prototypes": ROWS,
    "Weight-normalised layers": IMAGES,
    "Spectral-normalised layers": IMAGES,
    "Weight-standardised convolutions": IMAGES,
    "An operation that nobody knows": ROWS,
}


def gap(model, other, inputs):
    wanted = output(other, inputs)
    return float((output(model, inputs) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.filterwarnings("ignore::clafusion.PinnedWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_fuses_to_the_network(name):
    inputs = NETWORKS[name]
    model, _ = ARCHITECTURES[name].build()
    copied = permuted_copy(model, inputs)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), copied.state_dict().values(), strict=True)
    )
    assert gap(copied, model, inputs) < 1e-5
    for calibration in ("none", "repair"):
        fused = fuse([model, copied], inputs, calibration=calibration).model
        assert gap(fused, model, inputs) < 1e-5


def normalised(kind, seed, width=10):
    torch.manual_seed(seed)
    return randomise(
        nn.Sequential(
            kind(nn.Conv2d(3, width, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            kind(nn.Linear(4 * width, 9)), nn.ReLU(), nn.Linear(9, 5),
        ),
        seed,
    )  # fmt: skip


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


KINDS = {
    "weight norm": parametrizations.weight_norm,
    "one length for all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": old_weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalised_weight_is_fused_as_the_weight_that_it_is(kind):
    models = [normalised(KINDS[kind], seed) for seed in (0, 1)]
    assert [one.size for one in trace(models[0], IMAGES).groups] == [10, 9]
    for weights, model in (([1, 0], models[0]), ([0, 1], models[1])):
        fused = fuse(models, IMAGES, weights, calibration="none").model
        assert gap(fused, model, IMAGES) < 1e-5
    # After a call its weights are results of an operation, of which no deep copy can be made.
    models[0](IMAGES)
    outputs = output(fuse(models, IMAGES).model, IMAGES)
    assert outputs.isfinite().all()
    largest = max(output(one, IMAGES).abs().max() for one in models)
    assert outputs.abs().max() < 3 * largest


def test_directions_of_any_length_are_the_same_weight():
    model = normalised(parametrizations.weight_norm, 0)
    other = permuted_copy(model, IMAGES)
    for layer in (other[0], other[4]):
        layer.parametrizations.weight.original1.data *= 40.0
    fused = fuse([model, other], IMAGES, calibration="none").model
    assert gap(fused, model, IMAGES) < 1e-5


def test_singular_vectors_of_either_sign_are_the_same_weight():
    model = normalised(parametrizations.spectral_norm, 0)
    other = permuted_copy(model, IMAGES)
    for layer in (other[0], other[4]):
        norm = layer.parametrizations.weight[0]
        norm._u.neg_()
        norm._v.neg_()
    assert gap(other, model, IMAGES) < 1e-5
    fused = fuse([model, other], IMAGES, calibration="none").model
    assert gap(fused, model, IMAGES) < 1e-5
    assert fused[0].parametrizations.weight[0]._u.isfinite().all()


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 for each channel."""

    def __init__(self, *sizes, eps):
        super().__init__(*sizes)
        self.eps = eps

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + self.eps)
        return self._conv_forward(x, weight, self.bias)


def test_weights_that_are_computed_in_another_way_do_not_match():
    def net(seed, eps):
        torch.manual_seed(seed)
        layers = Standardised(3, 8, 3, eps=eps), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, 5))

    fuse([net(0, 1e-5), net(1, 1e-5)], IMAGES)
    with pytest.raises(Exception, match=r"other 0\.5 and 1e-05"):
        fuse([net(0, 1e-5), net(1, 0.5)], IMAGES)


def test_no_identity_is_inserted_where_the_weight_is_computed():
    def net(depth):
        layers = [parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU()]
        for _ in range(depth):
            layers += [parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    with pytest.raises(Exception, match="its weight is computed from parameters"):
        fuse([net(2), net(1)], IMAGES)
