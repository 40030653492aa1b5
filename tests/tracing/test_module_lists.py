"""Modules of a list change places as wholes, with the channels that belong to one each."""

import pytest
import torch
from torch import nn

from clafusion import trace
from clafusion.tracing.heads import exchange_heads, restored_heads
from tests.support.mixtures import SUMS, VECTORS, listed
from tests.support.networks import randomise


@pytest.mark.parametrize("chosen", [None, 2])
@pytest.mark.parametrize("sums", SUMS)
def test_the_stream_moves_and_so_do_the_experts(sums, chosen):
    traced = trace(listed(sums, chosen=chosen), VECTORS[:4])
    assert sorted(one.size for one in traced.groups) == [1, 1, 1, 12, 12, 12, 16]
    (experts,) = traced.heads
    assert [[traced.groups[i].size for i in head] for head in experts.members] == [[12, 1]] * 3
    assert experts.parameters[1][0] == "experts.1.0.weight"
    assert traced.pinned == ()


def test_experts_change_places_and_come_back():
    model = listed()
    traced = trace(model, VECTORS[:4])
    orders = [(traced.heads[0], [2, 0, 1])]
    state = exchange_heads(traced, traced.state(), orders)
    own = model.state_dict()
    assert torch.equal(state["experts.0.2.bias"], own["experts.2.2.bias"])
    assert torch.equal(state["router.bias"], own["router.bias"][[2, 0, 1]])
    with torch.no_grad():
        found = torch.func.functional_call(model, dict(state), (VECTORS,))
        torch.testing.assert_close(found, model(VECTORS), atol=1e-5, rtol=0)
    back = restored_heads(traced, state, orders)
    assert all(torch.equal(back[name], value) for name, value in own.items())


class Unequal(nn.Module):
    """Two branches in a list that are not alike: one is read again."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 5)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(2)
        )

    def forward(self, x):
        x = self.enter(x)
        first, second = (branch(x) for branch in self.branches)
        return self.leave(x + (torch.stack([first, 2 * second], 1)).sum(1))


class Chain(Unequal):
    """The second reads what the first writes."""

    def forward(self, x):
        x = self.enter(x)
        first = self.branches[0](x)
        return self.leave(x + torch.stack([first, self.branches[1](first)], 1).sum(1))


@pytest.mark.parametrize("kind", [Unequal, Chain])
def test_modules_that_are_not_alike_keep_their_places(kind):
    traced = trace(randomise(kind()).eval(), VECTORS[:4])
    assert traced.heads == ()
    assert sorted(one.size for one in traced.groups) == [12, 12, 16]
