"""Rows that see each other, networks without parameters, and what a refused model leaves behind."""

import pytest
import torch
from torch import nn

from clafusion import InputError, UnsupportedOpError, fuse, trace
from clafusion.execution.transforms import transforms_undone
from tests.support import networks

INPUTS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with something between them or behind them."""

    def __init__(self, between, behind=None):
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        self.between, self.behind = between, behind or (lambda x: x)

    def forward(self, x):
        return self.behind(self.last(self.between(self.first(x))))


MIXING = {
    "attention": (lambda h: (h @ h.T).softmax(-1) @ h, None),
    "products": (lambda h: h @ h.T @ h, None),
    "covariance": (lambda h: h @ (h.T @ h), None),
    "mean": (lambda h: h - h.mean(0), None),
    "softmax": (lambda h: h, lambda y: y.softmax(0)),
    "similarities": (lambda h: h, lambda y: y @ y.T),
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_see_each_other_are_refused_by_name(kind):
    models = {name: Net(*MIXING[kind]) for name in "ab"}
    with pytest.raises(InputError, match=r"models\['a'\]: the rows of its inputs see each other"):
        fuse(models, INPUTS)
    assert trace(models["a"], INPUTS).mixes_rows


def test_rows_that_do_not_are_not():
    assert not trace(Net(torch.relu), INPUTS).mixes_rows
    sets = Net(lambda h: (h @ h.mT).softmax(-1) @ h)  # within each row of the batch
    assert not trace(sets, INPUTS.view(10, 6, 8)).mixes_rows


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.BatchNorm1d(8, affine=False)])
def test_networks_without_parameters_are_refused_by_name(model):
    with pytest.raises(InputError, match=r"models\[0\]: the model .* has no parameters"):
        fuse([model, model], INPUTS)


TRANSFORMS = {
    "vmap": lambda h: torch.vmap(lambda row: row.relu())(h),
    "vmap in vmap": lambda h: torch.vmap(torch.vmap(lambda one: one.relu()))(h),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_refused_transform_is_named_and_leaves_the_process_as_it_was(kind):
    levels = torch._C._functorch.get_dynamic_layer_stack_depth
    models = [Net(TRANSFORMS[kind]) for _ in range(2)]
    with pytest.raises(UnsupportedOpError, match=r"transform of torch\.func, such as torch\.vmap"):
        fuse(models, INPUTS)
    assert levels() == 0
    torch.randn(2)  # which is an error within torch.vmap
    fuse([networks.mlp(8, 6, 4), networks.mlp(8, 6, 4, seed=1)], INPUTS)


def test_levels_of_transforms_that_are_left_by_an_error_are_undone():
    levels = torch._C._functorch

    def enter_and_fail():
        with transforms_undone():
            levels._vmap_increment_nesting(3, "error")
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        enter_and_fail()
    assert levels.get_dynamic_layer_stack_depth() == 0


def test_inputs_of_another_floating_type_are_refused_with_what_to_do():
    models = [networks.mlp(8, 6, 4, seed=seed) for seed in range(2)]
    for kind in (torch.float64, torch.float16):
        with pytest.raises(
            InputError, match=r"Convert the inputs .*: inputs\.to\(torch\.float32\)"
        ):
            fuse(models, INPUTS.to(kind))
    with pytest.raises(InputError, match=r"inputs\.to\(torch\.float64\)"):
        fuse([one.double() for one in models], INPUTS)
