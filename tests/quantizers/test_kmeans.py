import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.kmeans import start_codebook
from vqrae_jax.quantizers.simvq import SimVQ

K, C = 16, 8
MODULES = {
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n != "ibq" else n for n in MODULES])
def test_kmeans_start_uses_the_codebook_and_random_start_does_not(name, train):
    for start in ("kmeans", "normal"):
        module = MODULES[name](codebook_init=start)
        metrics = jax.jit(module.apply)(train(module, clusters())[1], clusters()).metrics
        count, error = (np.asarray(metrics["counts"]) > 0).sum(), float(metrics["quantization_error"])
        # k-means may give two clusters one embedding.
        assert (count >= K - 2 and error < 0.2) if start == "kmeans" else (count <= 2 and error > 10)


@pytest.mark.parametrize(("name", "start"), [
    ("simvq", "kmeans"), ("ibq", "data"), ("gumbel", "kmeans"),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in (("simvq", "data"), ("ibq", "kmeans"), ("gumbel", "data"))),
])  # fmt: skip
def test_only_the_first_finite_batch_makes_the_codebook(name, start):
    module, rngs = MODULES[name](codebook_init=start), {"codes": jax.random.key(1)}
    step = jax.jit(lambda v, z: module.apply(v, z, True, mutable=["batch_stats"], rngs=rngs)[1])
    embeddings = jax.jit(functools.partial(module.apply, method="embeddings"))
    variables = jax.jit(module.init)(jax.random.key(0), clusters()[:1])
    codebooks = [embeddings(variables)]
    for z in (jnp.full_like(clusters(), jnp.nan), clusters(), clusters(seed=7) + 3):
        variables = {**variables, **step(variables, z)}
        codebooks.append(embeddings(variables))
    before, skipped, first, later = codebooks
    np.testing.assert_array_equal(skipped, before)
    assert np.abs(first - before).max() > 1
    np.testing.assert_array_equal(later, first)


class Started(nn.Module):
    """Returns a codebook of unit length that starts from latents."""

    codebook_init: str
    distance: str = "cosine"

    def __call__(self, z):
        codebook, counts = jnp.zeros((4, C)), jnp.zeros(4)
        return start_codebook(self, jnp.asarray(True), lambda: (z, jnp.ones(len(z), bool)), codebook, counts)


@pytest.mark.parametrize("start", ["kmeans", "data"])
def test_a_cosine_codebook_starts_with_unit_length(start):
    """Means of unit vectors are shorter than one, and latents have any length."""
    z = np.random.default_rng(0).normal(size=(64, C)).astype(np.float32)
    codebook, counts = jax.jit(lambda z: Started(start).apply({}, z, rngs={"codes": jax.random.key(0)}))(z)
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=1), 1, rtol=1e-5)
    assert counts.sum() == (64 if start == "kmeans" else 0)


def test_ibq_with_dot_chooses_the_largest_product():
    module = IBQ(K, C, codebook_init="normal", distance="dot")
    z = np.random.default_rng(0).normal(size=(40, C)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    codebook = np.asarray(variables["params"]["codebook"]["offset"])
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, z).indices, (z @ codebook.T).argmax(1))
