"""Keeping the channels that say most: against exhaustive search, and by known answers."""

from itertools import combinations

import torch

from clafusion.calibration.channel_selection import inverse_gram, keep_channels


def features(rows, channels, columns, seed=0):
    return torch.randn(
        rows, channels * columns, generator=torch.Generator().manual_seed(seed)
    ).double()


def places(channels, columns):
    return torch.arange(channels * columns).view(channels, columns)


def kept_of(x, readout, where, count, *, kinship=None, importance=None):
    inverse = inverse_gram(x.T @ x, where, kinship=kinship)
    return keep_channels(inverse, readout, where, count, importance=importance)


def loss_ref(x, goal, kept):
    """Return the squared error that least squares on some features leaves."""
    solution = torch.linalg.lstsq(x[:, kept], goal).solution
    return float((goal - x[:, kept] @ solution).square().sum())


def test_the_first_channel_to_go_is_the_one_that_is_missed_least():
    x = (
        features(200, 6, 3)
        @ torch.randn(18, 18, generator=torch.Generator().manual_seed(1)).double()
    )
    readout = torch.randn(18, 4, generator=torch.Generator().manual_seed(2)).double()
    goal = x @ readout
    where = places(6, 3)
    kept, found = kept_of(x, readout, where, 5)
    losses = {
        rest: loss_ref(x, goal, where[list(rest)].flatten()) for rest in combinations(range(6), 5)
    }
    assert tuple(kept.tolist()) == min(losses, key=losses.get)
    left = where[kept].flatten()
    expected = torch.linalg.lstsq(x[:, left], goal).solution
    torch.testing.assert_close(found[left], expected, rtol=0, atol=1e-4)
    gone = [i for i in range(18) if i not in left.tolist()]
    assert not found[gone].any()


def test_many_steps_leave_the_least_squares_readout():
    x = features(300, 12, 2)
    x[:, 12:] += 0.5 * x[:, :12]
    readout = torch.randn(24, 3, generator=torch.Generator().manual_seed(2)).double()
    kept, found = kept_of(x, readout, places(12, 2), 7)
    assert len(kept) == 7
    assert bool((kept.diff() > 0).all())
    left = places(12, 2)[kept].flatten()
    expected = torch.linalg.lstsq(x[:, left], x @ readout).solution
    torch.testing.assert_close(found[left], expected, rtol=0, atol=1e-4)


def test_of_two_copies_one_goes_and_the_other_takes_over():
    x = features(100, 4, 2)
    x = torch.cat([x, x], 1)
    readout = torch.randn(16, 3, generator=torch.Generator().manual_seed(2)).double()
    kept, found = kept_of(x, readout, places(8, 2), 4)
    assert sorted(channel % 4 for channel in kept.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(x @ found, x @ readout, rtol=0, atol=1e-3)


def test_kinship_tells_copies_where_the_data_are_silent():
    x = features(100, 3, 1)
    x[:, 0] = 0.0  # a channel that these data never wake
    x = torch.cat([x, x], 1)
    readout = torch.ones(6, 1, dtype=torch.float64)
    kinship = torch.eye(3).repeat(2, 2)
    kept, found = kept_of(x, readout, places(6, 1), 3, kinship=kinship)
    assert sorted(channel % 3 for channel in kept.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found[kept], torch.full((3, 1), 2.0).double(), rtol=0, atol=1e-3)


def test_outputs_of_no_importance_do_not_count():
    x = features(100, 4, 1)
    readout = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    importance = torch.tensor([0.0, 1.0]).double()
    kept, _ = kept_of(x, readout, places(4, 1), 2, importance=importance)
    assert kept.tolist() == [2, 3]


def test_features_of_no_channel_stay():
    x = torch.cat([features(100, 3, 2), torch.ones(100, 1).double()], 1)
    readout = torch.randn(7, 2, generator=torch.Generator().manual_seed(2)).double()
    kept, found = kept_of(x, readout, places(3, 2), 1)
    left = [*places(3, 2)[kept].flatten().tolist(), 6]
    expected = torch.linalg.lstsq(x[:, left], x @ readout).solution
    torch.testing.assert_close(found[left], expected, rtol=0, atol=1e-4)
