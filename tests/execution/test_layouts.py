"""How tensors lie in memory: what is written into a module is laid out as the module's own."""

import pytest
import torch
from torch import Tensor, nn

import clafusion
from clafusion.execution.layouts import axes_in_memory, laid_out
from clafusion.weights.storage import Spill
from tests.support.networks import randomise


class Flattening(nn.Module):
    """Convolutions and a ``view``, which runs with one layout of the weights only."""

    def __init__(self, *widths: int, channels_last: bool) -> None:
        super().__init__()
        pairs = zip((3, *widths), widths, strict=False)
        convolutions = [nn.Conv2d(into, out, 3, padding=1) for into, out in pairs]
        self.features = nn.Sequential(*(one for c in convolutions for one in (c, nn.ReLU())))
        self.head = nn.Linear(16 * widths[-1], 5)
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        return self.head(x.view(x.size(0), -1))


def make(*widths: int, channels_last: bool) -> nn.Module:
    return randomise(Flattening(*widths, channels_last=channels_last))


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4, 3, 2, 2), torch.channels_last),
        ((4, 3, 2, 2), torch.contiguous_format),
        ((4, 1, 3, 3), torch.channels_last),
        ((4, 3, 1, 1), torch.channels_last),
        ((4, 3, 1, 1), torch.contiguous_format),
        ((4, 3, 1, 2, 2), torch.channels_last_3d),
    ],
)
def test_a_copy_of_another_size_lies_as_the_tensor_does(shape, memory_format):
    tensor = torch.empty(shape, memory_format=memory_format)
    axes = axes_in_memory(tensor)
    values = torch.randn(7, *shape[1:])
    copy = laid_out(values, axes)
    wanted = torch.empty_like(values, memory_format=memory_format)
    assert copy.stride() == wanted.stride()
    assert torch.equal(copy, values)
    assert laid_out(torch.randn(shape), axes).stride() == tensor.stride()


def test_a_transposed_matrix_is_known_and_an_expanded_one_is_not():
    assert axes_in_memory(torch.empty(3, 4).t()) == (1, 0)
    assert axes_in_memory(torch.empty(3, 1).expand(3, 4)) is None
    assert axes_in_memory(torch.empty(3, 4)) is None


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("target", ["deeper", "shallower", clafusion.Deeper(width="wide")])
def test_code_that_needs_one_layout_runs_with_what_is_fused(channels_last, target):
    models = [make(6, 6, 6, channels_last=channels_last), make(8, 9, channels_last=channels_last)]
    images = torch.randn(60, 3, 4, 4)
    result = clafusion.fuse(models, images, target=target, calibration="repair", verify=False)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in result.model.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=wanted)
    assert result.model(images).shape == (60, 5)


def test_mapped_weights_are_laid_out_as_the_models(tmp_path):
    models = [make(6, 6, channels_last=True), make(8, 9, channels_last=True)]
    for i, model in enumerate(models):
        clafusion.save_model(model, tmp_path / f"{i}.pt")
    factories = [f"{__name__}:make({widths}, channels_last=True)" for widths in ("6, 6", "8, 9")]
    files = [clafusion.ModelFile(one, tmp_path / f"{i}.pt") for i, one in enumerate(factories)]
    images = torch.randn(60, 3, 4, 4)
    plain = clafusion.fuse(models, images, calibration="none")
    mapped = clafusion.fuse(files, images, calibration="none", memory_limit="8GB")
    weight = mapped.model.features[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, plain.model.features[0].weight)


def test_a_spilled_tensor_is_mapped_in_any_layout():
    spill = Spill()
    spill["a"] = tensor = torch.randn(2, 3, 4, 5)
    axes = (0, 2, 3, 1)
    mapped = spill.mapped("a", axes)
    assert torch.equal(mapped, tensor)
    assert axes_in_memory(mapped) == axes
    assert list(spill) == ["a"]
