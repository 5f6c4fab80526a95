"""The order of Halton-MaskGIT."""

import numpy as np
import pytest

from vqrae_jax.generation.halton import halton_ranks


@pytest.mark.parametrize("grids", [[(1, 1)], [(1, 5)], [(5, 1)], [(3, 7)], [(16, 16)], [(4, 6, 3)], [(1, 1), (2, 3)]])
def test_every_position_has_one_rank(grids):
    ranks = halton_ranks(*grids)
    assert np.array_equal(np.sort(ranks), np.arange(sum(map(np.prod, grids))))


def test_the_sequence_has_bases_2_and_3():
    """Its first points are (1/2, 1/3), (1/4, 2/3), (3/4, 1/9) and (1/8, 4/9)."""
    ranks = halton_ranks((4, 4)).reshape(4, 4)
    assert [ranks[cell] for cell in ((2, 1), (1, 2), (3, 0), (0, 1))] == [0, 1, 2, 3]


def test_every_part_of_the_grid_is_reached_early():
    visited = halton_ranks((16, 16)).reshape(4, 4, 4, 4) < 64
    counts = visited.sum((1, 3))
    assert counts.min() >= 2
    assert counts.max() <= 6


def test_deeper_levels_follow_shallower_ones_and_finer_grids_coarser_ones():
    ranks = halton_ranks((3, 4, 2)).reshape(12, 2)
    assert np.array_equal(ranks[:, 0], halton_ranks((3, 4)))
    assert np.array_equal(ranks[:, 1], ranks[:, 0] + 12)
    ranks = halton_ranks((1, 1), (2, 2), (3, 3))
    assert np.array_equal(ranks, np.concatenate([[0], 1 + halton_ranks((2, 2)), 5 + halton_ranks((3, 3))]))
