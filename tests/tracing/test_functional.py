"""Writes to a part of a tensor become operations that return the whole."""

import re

import pytest
import torch
from torch import nn

from clafusion import UnsupportedOpError, trace
from clafusion.tracing.operations import op_name

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.change = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), change

    def forward(self, x):
        return self.head(self.change(self.first(x)).mean((2, 3)))


def slice_of_itself(x):
    x[:, :3] = x[:, :3].relu()
    return x


def new_tensor(x):
    y = torch.zeros_like(x)
    y[:, 2:5] = x[:, :3]
    y[:, 0].zero_()
    y[:, 7] = 1.0
    return x + y


def through_views(x):
    last = x.permute(0, 2, 3, 1)[:, 1:3]
    last.mul_(2.0)
    last[..., 0] += 1
    return x * last.mean((1, 2))[..., None, None]


def flat(x):
    x.view(x.size(0), 8, 36)[:, :, :6].tanh_()
    return x


def masked(x):
    x[x < 0] = 0.5
    return x


def read_before(x):
    before = x[:, 1] * 1
    x[:, 1] = 0.0
    return x + before[:, None]


def masks_of_masks(x):
    """An operator whose name ends as those that work in place do."""
    first = x[..., 0] > 0
    either = first.unsqueeze(-1) | (x > 0.1)
    return x * either * first.unsqueeze(-1)


CHANGES = [masks_of_masks, slice_of_itself, new_tensor, through_views, flat, masked, read_before]


@pytest.mark.parametrize("change", CHANGES)
def test_the_graph_computes_what_the_model_does(change):
    model = Net(change)
    traced = trace(model, IMAGES)
    (found,) = traced.run((IMAGES,))
    with torch.no_grad():
        torch.testing.assert_close(found, model(IMAGES))
    names = [str(node.target) for node in traced.module.graph.nodes if node.op == "call_function"]
    in_place = [name for name in names if re.fullmatch(r"aten\.\w*[^_]_\.\w+", name)]
    # Where nothing reads the tensor but by the write's own result, the write may stay.
    assert in_place == (["aten.index_put_.default"] if change is masked else [])


def test_channels_that_are_written_elsewhere_move_with_their_place():
    groups = trace(Net(new_tensor), IMAGES).groups
    # Channels 0 to 4 are added to one another in turns, 7 to a constant.
    assert [one.size for one in groups] == [2]
    assert groups[0].axes[0].positions.flatten().tolist() == [5, 6]


def test_a_write_that_cannot_be_followed_pins_what_it_reads():
    def into_a_part(x):
        flat = x.flatten(2)
        flat[:, :4] = flat[:, 4:].tanh()
        return x

    traced = trace(Net(into_a_part), IMAGES)
    assert traced.groups == ()
    assert {one.parameter for one in traced.pinned} == {"first.weight"}
    assert sum(one.size for one in traced.pinned) == 8
    reasons = {one.why for one in traced.pinned}
    assert reasons == {"it writes to a part of a tensor that others read"}


def test_writes_to_constants_stay_as_they_are():
    def mask(x):
        table = torch.zeros(6, 6)
        table[:3] = 1.0
        return x * table

    nodes = trace(Net(mask), IMAGES).module.graph.nodes
    assert any(str(node.target) in ("aten.fill_.Tensor", "aten.copy_.default") for node in nodes)
    assert not any(op_name(node) == "slice_scatter" for node in nodes)


def test_a_write_to_the_input_is_refused():
    class Changes(Net):
        def forward(self, x):
            x[:, 0] = 0.0
            return super().forward(x)

    with pytest.raises(UnsupportedOpError, match="changes its input in place"):
        trace(Changes(nn.Identity()), IMAGES)
