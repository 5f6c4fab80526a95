"""Codes that learn by gradient, and where they start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.simvq import SimVQ

K, C = 16, 8
MAKE = {
    "simvq": functools.partial(SimVQ, K, C, distance="l2"),
    "simvq_cosine": functools.partial(SimVQ, K, C),
    "ibq": functools.partial(IBQ, K, C),
    "ibq_cosine": functools.partial(IBQ, K, C, distance="cosine"),
    "gumbel": functools.partial(GumbelQuantizer, K, C),
}


def clusters(seed=0):
    """K tight clusters far from the origin, as features with a large common mean are."""
    centers = np.random.default_rng(0).normal(size=(K, C)) + 10
    near = 1e-4 * np.random.default_rng(seed).normal(size=(32, K, C))
    return (centers + near).reshape(-1, C).astype(np.float32)


@functools.cache
def step(name, start):
    module = MAKE[name](start=start)
    return module, jax.jit(
        lambda v, z: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(1)})
    )


def used(name, start):
    """Codes in use after one training step."""
    module, train = step(name, start)
    variables = jax.jit(module.init)(jax.random.key(0), clusters()[:1])
    _, state = train(variables, clusters())
    out = jax.jit(module.apply)({**variables, **state}, clusters())
    return (np.asarray(out.metrics["counts"]) > 0).sum(), float(out.metrics["quantization_error"])


@pytest.mark.parametrize("name", MAKE)
def test_codes_start_where_the_latents_are(name):
    """Random codes leave most of the codebook unused; codes from the first batch do not."""
    count, error = used(name, "kmeans")
    assert count >= K - 2  # k-means may leave two clusters to one code
    assert error < 0.2
    count, error = used(name, "normal")
    assert count <= 2
    assert error > 10


@pytest.mark.parametrize("name", ["simvq", "ibq", "gumbel"])
@pytest.mark.parametrize("start", ["kmeans", "data"])
def test_only_the_first_finite_batch_makes_the_codes(name, start):
    module, train = step(name, start)
    variables = jax.jit(module.init)(jax.random.key(0), clusters()[:1])

    def codes_after(variables, z):
        _, state = train(variables, z)
        variables = {**variables, **state}
        return variables, np.asarray(module.apply(variables, method="embeddings"))

    before = np.asarray(module.apply(variables, method="embeddings"))
    nothing, same = codes_after(variables, jnp.full_like(clusters(), jnp.nan))
    np.testing.assert_array_equal(same, before)
    begun, first = codes_after(nothing, clusters())
    assert np.abs(first - before).max() > 1
    _, later = codes_after(begun, clusters(seed=7) + 3)
    np.testing.assert_array_equal(later, first)


def test_ibq_by_product_is_the_paper():
    """The chosen code has the largest product with the latent."""
    module = IBQ(K, C, start="normal", distance="dot")
    z = np.random.default_rng(0).normal(size=(40, C)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    codes = np.asarray(variables["params"]["codebook"]["offset"])
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, z).indices, (z @ codes.T).argmax(1))
