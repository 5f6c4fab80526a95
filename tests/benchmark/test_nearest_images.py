"""Distances of benchmarks/nearest_images.py."""

import numpy as np

from benchmarks import nearest_images


def test_copies_have_the_distance_0_and_others_that_of_their_pixels():
    references = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3), np.uint8)
    queries = references[[3, 1]] + np.array([0, 51], np.uint8)[:, None, None, None]
    index, distances = nearest_images.nearest(queries, references)
    assert index.tolist() == [3, 1]
    np.testing.assert_allclose(distances, [0, 51 / 255], atol=1e-7)


def test_pairs_are_in_the_rows_of_their_samples():
    samples, found = (np.full((3, 8, 8, 3), value, np.uint8) for value in (255, 0))
    picture = nearest_images.pairs(samples, ["a", "b", "c"], found, np.zeros(3), 2)
    wide = nearest_images.pairs(samples, ["a", "b", "c"], found, np.zeros(3), 3)
    assert picture.shape[0] > wide.shape[0]
    assert picture.shape[1] < wide.shape[1]
