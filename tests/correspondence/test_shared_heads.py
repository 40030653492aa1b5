"""Plans of the places that heads of queries have in the channels of the keys that they share."""

import pytest
import torch

from clafusion.correspondence.shared_heads import plan_of_places, share_otherwise
from clafusion.tracing.model import ChannelGroup
from clafusion.transport.plan import TransportPlan

SIZE = 3  # channels of a head


def group(heads, sharing):
    return ChannelGroup(0, SIZE * heads, torch.arange(SIZE * heads), (), True, sharing, heads)


def plan_of(pairs, source, target):
    """Return the plan by which heads of keys (source, target) go together, channel by channel."""
    every = torch.arange(SIZE)
    rows = torch.cat([SIZE * i + every for i, _ in pairs])
    columns = torch.cat([SIZE * j + every for _, j in pairs])
    shape = source.size, target.size
    return TransportPlan.from_entries(shape, rows, columns, torch.ones(len(rows)))


def heads_of(plan, source, target):
    """Return which heads of queries, counted over all heads of keys, go together."""
    dense = plan.dense().unflatten(0, (source.heads, SIZE, source.sharing))
    dense = dense.unflatten(3, (target.heads, SIZE, target.sharing))
    by_head = dense.permute(0, 2, 3, 5, 1, 4).flatten(0, 1).flatten(1, 2)
    together = by_head.abs().sum((2, 3)) > 0
    for i, j in together.nonzero().tolist():
        assert torch.equal(by_head[i, j], torch.eye(SIZE, dtype=torch.float64))
    return together


@pytest.mark.parametrize(
    ("keys", "of_source", "of_target"),
    [
        ([(0, 0)], 2, 4),
        ([(0, 0)], 2, 3),
        ([(0, 0), (0, 1)], 4, 2),  # a head of keys is copied, and its queries are divided
        ([(0, 0), (1, 1), (0, 2), (1, 3)], 4, 2),
        ([(0, 0), (1, 0)], 2, 4),  # two heads of keys become one
    ],
)
def test_every_head_of_the_source_has_places_of_its_own(keys, of_source, of_target):
    source = group(1 + max(i for i, _ in keys), of_source)
    target = group(1 + max(j for _, j in keys), of_target)
    plan = plan_of_places(plan_of(keys, source, target), target, source)
    together = heads_of(plan, source, target)
    assert bool((together.sum(0) == 1).all())  # no place is a mean
    assert bool((together.sum(1) >= 1).all())
    for head, place in together.nonzero().tolist():
        assert (head // of_source, place // of_target) in keys
    # What reads copies of a head is divided among them.
    reads = torch.arange(1.0, source.size * of_source + 1, dtype=torch.float64)
    counts = together.sum(1).view(source.heads, 1, of_source).expand(-1, SIZE, -1)
    assert torch.allclose(plan.incoming(reads).sum(), reads.sum())
    assert torch.equal(plan.row_sums, counts.reshape(-1).double())


def test_of_fewer_places_each_is_a_mean():
    source, target = group(1, 4), group(1, 2)
    plan = plan_of_places(plan_of([(0, 0)], source, target), target, source)
    assert heads_of(plan, source, target).sum(0).tolist() == [2, 2]


def test_keys_in_the_same_weight_have_a_place_of_their_own():
    source, target = group(2, 2), group(2, 4)
    keys = plan_of([(0, 1), (1, 0)], source, target)
    plan = plan_of_places(keys, target, source, keys=True)
    dense = plan.dense().unflatten(0, (source.size, 3)).unflatten(2, (target.size, 5))
    assert torch.equal(dense[:, 2, :, 4], keys.dense())
    assert not dense[:, 2, :, :4].any()
    assert not dense[:, :2, :, 4].any()
    queries = plan_of_places(keys, target, source)
    assert torch.equal(dense[:, :2, :, :4].flatten(2).flatten(0, 1), queries.dense())


def test_other_numbers_of_positions_are_no_heads():
    assert share_otherwise(group(1, 4), group(1, 2), 8, 4)
    assert share_otherwise(group(1, 4), group(1, 2), 10, 6)  # with those of the keys
    assert not share_otherwise(group(1, 4), group(1, 2), 2, 2)
    assert not share_otherwise(group(1, 1), group(1, 1), 9, 4)  # of a pooling
    assert not share_otherwise(group(1, 4), group(1, 2), 9, 4)
