"""Distances of images and features by hand."""

import jax.numpy as jnp
import numpy as np

from vqrae_jax.losses.reconstruction import FEATURES, PIXEL, feature_distance


def test_distances_equal_their_definitions():
    a, b = jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2, 3), 0.5)
    assert PIXEL["l1"](a, b) == 0.5
    assert PIXEL["l2"](a, b) == 0.25
    x, y = jnp.array([[3.0, 0.0, 1.0, 1.0]]), jnp.array([[0.0, 2.0, 5.0, 5.0]])
    np.testing.assert_allclose(feature_distance("cosine", x, y, layers=2), (1 + 0) / 2, atol=1e-6)
    assert FEATURES["cosine"](0 * x, y) == 1
