import jax.numpy as jnp
import numpy as np

from vqrae_jax.quantizers.regularizers import orthogonality


def test_orthogonality_equals_the_mean_squared_cosine(assert_close):
    codes = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    cosines = (codes / np.linalg.norm(codes, axis=1, keepdims=True)) @ (
        codes / np.linalg.norm(codes, axis=1, keepdims=True)
    ).T
    assert_close(orthogonality(jnp.asarray(codes)), ((cosines - np.eye(40)) ** 2).mean(), 1e-5)


def test_orthogonal_codes_cost_nothing_and_equal_ones_the_most():
    assert orthogonality(3 * jnp.eye(5)) < 1e-6
    np.testing.assert_allclose(orthogonality(jnp.ones((4, 3))), 12 / 16, rtol=1e-5)
