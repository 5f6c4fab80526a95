"""Attention and GELU equal their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from vqrae_jax.models.layers import attend, gelu


def test_attention_equals_jax_and_stays_finite_for_large_scores():
    query, key, value = 30 * jax.random.normal(jax.random.key(0), (3, 2, 17, 4, 8))
    reference = jax.nn.dot_product_attention
    np.testing.assert_allclose(jax.jit(attend)(query, key, value), reference(query, key, value), rtol=1e-4, atol=1e-4)
    gradients = (jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))) for f in (attend, reference))
    for a, b in zip(*(gradient(query, key, value) for gradient in gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
    assert np.isfinite(attend(100 * query, 100 * key, value)).all()


def test_gelu_and_its_derivative_equal_the_definition():
    X = np.linspace(-12, 12, 4001)
    value, slope = jax.jit(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),)))(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(value, X * norm.cdf(X), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, norm.cdf(X) + X * norm.pdf(X), rtol=1e-6, atol=1e-6)
    # In half precision it rounds once.
    x = jnp.asarray(X, jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(gelu)(x), jax.jit(gelu)(x.astype(jnp.float32)).astype(jnp.bfloat16))
