"""The shares of the suite of networks that learnt unlike things."""

import torch

from benchmarks.unequal.parents import SPECIAL, dirichlet_shares, specialist_and_generalist

LABELS = torch.arange(600) % 10


def test_the_shares_part_the_data_and_are_less_alike_with_a_small_alpha():
    spread = []
    for alpha in (0.1, 100.0):
        shares = dirichlet_shares(LABELS, 4, alpha, seed=1)
        assert torch.equal(torch.cat(shares).sort().values, torch.arange(600))
        assert all(map(torch.equal, shares, dirichlet_shares(LABELS, 4, alpha, seed=1)))
        counts = torch.stack([LABELS[one].bincount(minlength=10) for one in shares])
        spread.append(float(counts.double().std(0).mean()))
    assert spread[0] > 5 * spread[1]


def test_the_generalist_never_sees_the_special_class():
    specialist, generalist = specialist_and_generalist(LABELS, seed=0)
    assert torch.equal(torch.cat([specialist, generalist]).sort().values, torch.arange(600))
    assert bool((LABELS[generalist] != SPECIAL).all())
    assert 60 < len(specialist) < 160
