"""Keeping the channels that say most: against exhaustive search, and by known answers."""

from itertools import combinations

import pytest
import torch

from clafusion.calibration.channel_selection import inverse_gram, invert, keep_channels


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


@pytest.mark.parametrize("outputs", [6, 70])
def test_few_outputs_choose_as_many_that_say_the_same(outputs):
    # Of few outputs no products are kept. Many losses bring the matrices up to date between.
    x = features(500, 70, 2)
    x[:, 40:] += x[:, :100] @ features(100, 50, 2, seed=1)
    readout = torch.randn(140, outputs, generator=torch.Generator().manual_seed(2)).double()
    copied = torch.cat([readout] * 12, 1)
    scale = torch.full((outputs * 12,), 12**-0.5).double()
    few, of_few = kept_of(x, readout, places(70, 2), 25)
    many, of_many = kept_of(x, copied, places(70, 2), 25, importance=scale)
    assert few.tolist() == many.tolist()
    torch.testing.assert_close(of_few, of_many[:, :outputs], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [1, 50, 192, 401])
def test_a_matrix_is_inverted_in_its_own_memory(size):
    x = torch.randn(size, size + 50, generator=torch.Generator().manual_seed(size)).double()
    matrix = x @ x.T
    given = matrix.clone()
    inverse = invert(given)
    assert inverse.data_ptr() == given.data_ptr()
    assert torch.equal(inverse, inverse.T)
    torch.testing.assert_close(inverse @ matrix, torch.eye(size).double(), rtol=0, atol=1e-7)


def test_a_matrix_that_is_not_positive_definite_has_no_inverse():
    with pytest.raises(torch.linalg.LinAlgError):
        invert(-torch.eye(3).double())
