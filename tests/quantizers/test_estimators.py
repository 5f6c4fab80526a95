import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.estimators import ESTIMATORS
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.vq import VQ


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 6)).astype(np.float32), rng.normal(size=(64, 6)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def pullback(name, z, embeddings, cotangent):
    return jax.vjp(lambda z: ESTIMATORS[name](z, embeddings), z)[1](cotangent)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_are_the_embeddings_and_gradients_are_finite(name, pairs):
    """Only diveq passes a gradient to the embeddings."""
    z, embeddings = pairs
    np.testing.assert_array_equal(jax.jit(ESTIMATORS[name])(1e4 * z, embeddings), embeddings)
    gradient = jax.grad(lambda c: jnp.sum(ESTIMATORS[name](jnp.asarray(z), c) ** 2))(jnp.asarray(embeddings))
    assert np.any(gradient) == (name == "diveq")
    # Zero and opposite vectors.
    z = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    embeddings = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert np.isfinite(pullback(name, z, embeddings, jnp.ones_like(z))).all()


def test_straight_through_passes_the_gradient_and_rotation_rotates_z_to_its_embedding(pairs, assert_close):
    """For rotation J^T J = (|embedding| / |z|)^2, det J > 0, and J^T maps the embedding to z."""
    z, embeddings = pairs
    np.testing.assert_array_equal(pullback("straight_through", z, embeddings, embeddings), embeddings)
    for row, embedding in zip(z[:8], embeddings[:8], strict=True):
        jacobian = np.stack([pullback("rotation", row, embedding, e) for e in np.eye(6, dtype=np.float32)])
        scale = np.linalg.norm(embedding) / np.linalg.norm(row)
        assert_close(jacobian.T @ jacobian, scale**2 * np.eye(6), 1e-5)
        assert np.linalg.det(jacobian) > 0
        assert_close(jacobian @ row, embedding, 1e-5)


def test_diveq_has_the_gradient_of_the_length_of_the_error_times_its_direction(pairs, assert_close):
    def explicit(z, embeddings):
        error = embeddings - z
        length = jnp.linalg.norm(error, axis=-1, keepdims=True)
        return z + length * jax.lax.stop_gradient(error / length)

    cotangent = np.random.default_rng(1).normal(size=pairs[0].shape).astype(np.float32)
    ours, theirs = (jax.vjp(f, *pairs)[1](cotangent) for f in (ESTIMATORS["diveq"], explicit))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5)
    assert_close(sum(ours), cotangent, 1e-5)
    direction = (pairs[1] - pairs[0]) / np.linalg.norm(pairs[1] - pairs[0], axis=1, keepdims=True)
    assert_close(ours[1], np.sum(cotangent * direction, axis=1, keepdims=True) * direction, 1e-5)
    equal = jax.vjp(ESTIMATORS["diveq"], pairs[0], pairs[0])[1](cotangent)  # without an error: straight-through
    np.testing.assert_array_equal(equal[0], cotangent)
    assert not np.any(equal[1])


def test_diveq_equals_pytorch(golden, assert_close):
    """DiVeQ without noise; one latent is equal to its embedding."""
    arrays = np.load(golden / "quantizers" / "diveq.npz")
    module = VQ(*arrays["codebook"].shape, 0.0, "normal", estimator="diveq", codebook_cost=0.0)

    def scalar(codebook, z):
        out = module.apply({"params": {"codebook": {"offset": codebook}}}, z, True)
        return jnp.sum(out.z * arrays["cotangent"]) + out.loss, out

    gradient = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))
    (codebook, z), out = gradient(jnp.asarray(arrays["codebook"]), jnp.asarray(arrays["z"]))
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.z, arrays["quantized"], 1e-5, "z")
    assert_close(codebook, arrays["grad_codebook"], 1e-5, "gradient of the codebook")
    assert_close(z, arrays["grad_z"], 1e-5, "gradient of z")


@pytest.mark.parametrize("kind", [functools.partial(VQ, codebook_cost=0.0), SimVQ])
def test_the_decoder_alone_trains_a_codebook_by_diveq(kind, pairs):
    module, z = kind(16, 6, commitment_cost=0.0, estimator="diveq"), jnp.asarray(pairs[0])
    variables = jax.jit(module.init)(jax.random.key(0), z)

    def both(params):
        out = module.apply({**variables, "params": params}, z)
        return out.loss, jnp.sum(jnp.sin(out.z))

    loss, decoder = jax.jit(jax.jacrev(both))(variables["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(loss))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(decoder))


@pytest.mark.parametrize(("kind", "name"), [
    (EMAQuantizer, "rotation"), (SimVQ, "straight_through"),
    pytest.param(EMAQuantizer, "straight_through", marks=pytest.mark.slow),
    pytest.param(SimVQ, "rotation", marks=pytest.mark.slow),
])  # fmt: skip
def test_nonfinite_latents_do_not_change_other_gradients(name, kind, pairs):
    z = jnp.asarray(pairs[0])
    module = kind(16, 6, estimator=name)
    variables = jax.jit(module.init)(jax.random.key(0), z)

    gradient = jax.jit(jax.grad(lambda z: jnp.sum(jnp.sin(module.apply(variables, z).z))))
    result = gradient(jnp.concatenate([jnp.full((8, 6), jnp.nan), z]))
    np.testing.assert_allclose(result[8:], gradient(z), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(result[:8], np.zeros((8, 6)))
