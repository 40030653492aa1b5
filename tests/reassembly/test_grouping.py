"""Groups of blocks: distances as published, the ends by themselves, the order kept."""

import numpy as np

from clafusion.reassembly.blocks import Block
from clafusion.reassembly.cutting import Cut
from clafusion.reassembly.grouping import block_distances, grouped

CUT = Cut("node", 1, 3, (), False)


def blocks_of(models, count):
    return [
        Block(f"m{m}", i, CUT if i else None, CUT if i < count - 1 else None, (), 1)
        for m in range(models)
        for i in range(count)
    ]


def test_distances_are_the_published_ones():
    into, out = np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([[1.0, 0.25], [0.25, 1.0]])
    expected = [[0.5, 1 / 0.75], [1 / 0.75, 0.5]]
    np.testing.assert_allclose(block_distances(into, out), expected)


def test_inner_blocks_go_to_what_is_alike_and_order_is_kept():
    blocks = blocks_of(3, 4)
    kinds = [0, 1, 2, 3, 0, 1, 1, 3, 0, 2, 2, 3]  # of the second and third model's inner blocks
    distances = np.array([[0.5 if a == b else 2.0 for a in kinds] for b in kinds])
    groups = grouped(blocks, distances, 4)
    assert groups[0] == (0, 4, 8)
    assert groups[-1] == (3, 7, 11)
    assert groups[1] == (1, 5, 6)
    assert groups[2] == (2, 9, 10)


def test_every_group_is_used_and_two_blocks_need_no_medoids():
    blocks = blocks_of(4, 2)
    assert grouped(blocks, np.ones((8, 8)), 2) == ((0, 2, 4, 6), (1, 3, 5, 7))
    blocks = blocks_of(2, 5)
    groups = grouped(blocks, np.ones((10, 10)), 5)
    assert all(groups)
    assert sorted(i for one in groups for i in one) == list(range(10))
