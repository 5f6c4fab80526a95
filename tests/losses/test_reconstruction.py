"""Distances of images and features by hand."""

import jax.numpy as jnp
import numpy as np

from vqrae_jax.losses.reconstruction import FEATURES, PIXEL, feature_distance, gradient_difference, gram_distance


def test_distances_equal_their_definitions():
    a, b = jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2, 3), 0.5)
    assert PIXEL["l1"](a, b) == 0.5
    assert PIXEL["l2"](a, b) == 0.25
    x, y = jnp.array([[3.0, 0.0, 1.0, 1.0]]), jnp.array([[0.0, 2.0, 5.0, 5.0]])
    np.testing.assert_allclose(feature_distance("cosine", x, y, layers=2), (1 + 0) / 2, atol=1e-6)
    assert FEATURES["cosine"](0 * x, y) == 1


def test_edges_differ_and_levels_do_not():
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.random((2, 2, 5, 4, 3), np.float32))
    expected = sum(np.abs(np.diff(a, axis=axis) - np.diff(b, axis=axis)).mean() for axis in (1, 2)) / 2
    np.testing.assert_allclose(gradient_difference(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(gradient_difference(a, a + 0.5), 0, atol=1e-6)


def test_gram_distance_is_of_textures_and_does_not_depend_on_their_size():
    """It equals the sum by hand, is 0 wherever equal vectors are, and at most 2, for any numbers of them."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 4, 2, 5)).astype(np.float32)  # [B, H, W, layers, C]
    a, b = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (a, b))
    grams = [np.einsum("bhwlc,bhwld->blcd", x, x) / 12 for x in (a, b)]
    distance = gram_distance(a, b)
    np.testing.assert_allclose(distance, ((grams[0] - grams[1]) ** 2).sum((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(gram_distance(a, a[:, ::-1, ::-1]), 0, atol=1e-12)
    np.testing.assert_allclose(gram_distance(*(jnp.tile(x, (1, 2, 3, 1, 1)) for x in (a, b))), distance, rtol=1e-5)
    first, second = (jnp.broadcast_to(jnp.eye(5)[i], (1, 2, 2, 5)) for i in range(2))
    assert gram_distance(first, second) == 2
