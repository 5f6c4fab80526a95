import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from vqrae_jax.models.activations import gelu

X = np.linspace(-12, 12, 4001)


def test_gelu_and_its_slope_equal_the_definition():
    value, slope = jax.jit(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),)))(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(value, X * norm.cdf(X), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, norm.cdf(X) + X * norm.pdf(X), rtol=1e-6, atol=1e-6)


def test_gelu_in_half_precision_rounds_once():
    x = jnp.asarray(X, jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(gelu)(x), jax.jit(gelu)(x.astype(jnp.float32)).astype(jnp.bfloat16))
