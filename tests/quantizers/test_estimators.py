import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.estimators import ESTIMATORS
from vqrae_jax.quantizers.simvq import SimVQ


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 6)).astype(np.float32), rng.normal(size=(64, 6)).astype(np.float32)


def pullback(name, z, codes, cotangent):
    return jax.vjp(lambda z: ESTIMATORS[name](z, codes), z)[1](cotangent)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_value_is_the_codes_bit_for_bit(name, pairs):
    z, codes = pairs
    np.testing.assert_array_equal(jax.jit(ESTIMATORS[name])(1e4 * z, codes), codes)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_codes_receive_no_gradient(name, pairs):
    z, codes = pairs
    gradient = jax.grad(lambda c: jnp.sum(ESTIMATORS[name](jnp.asarray(z), c) ** 2))(jnp.asarray(codes))
    np.testing.assert_array_equal(gradient, np.zeros_like(codes))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_are_finite_in_the_corners(name):
    z = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    codes = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert np.isfinite(pullback(name, z, codes, jnp.ones_like(z))).all()


def test_straight_through_passes_the_gradient(pairs):
    z, codes = pairs
    np.testing.assert_array_equal(pullback("straight_through", z, codes, codes), codes)


def test_rotation_is_a_scaled_rotation_that_takes_z_to_its_code(pairs, assert_close):
    """J^T J = (|code| / |z|)^2, det J > 0, and a gradient along the code comes out along z."""
    z, codes = pairs
    for row, code in zip(z[:8], codes[:8], strict=True):
        jacobian = np.stack([pullback("rotation", row, code, e) for e in np.eye(6, dtype=np.float32)])
        scale = np.linalg.norm(code) / np.linalg.norm(row)
        assert_close(jacobian.T @ jacobian, scale**2 * np.eye(6), 1e-5)
        assert np.linalg.det(jacobian) > 0
        assert_close(jacobian @ row, code, 1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", [EMAQuantizer, SimVQ])
def test_a_broken_latent_leaves_the_gradients_of_the_others_as_they_are(name, kind, pairs):
    z = jnp.asarray(pairs[0])
    module = kind(16, 6, estimator=name)
    variables = module.init(jax.random.key(0), z)

    def gradient(z):
        return jax.grad(lambda z: jnp.sum(jnp.sin(module.apply(variables, z).z)))(z)

    broken = gradient(jnp.concatenate([jnp.full((8, 6), jnp.nan), z]))
    np.testing.assert_allclose(broken[8:], gradient(z), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(broken[:8], np.zeros((8, 6)))
