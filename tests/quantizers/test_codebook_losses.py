import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers import EMAQuantizer, Projected
from vqrae_jax.quantizers.codebook_losses import diversity, orthogonality


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_diversity_in_blocks_equals_that_of_the_whole_matrix(rows, assert_close):
    rng = np.random.default_rng(0)
    z, codebook = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (90, 20))
    mask = jnp.asarray(np.arange(90) % 3 > 0)
    blocked = functools.partial(diversity, mask=mask, temperature=0.7, block=rows * 20)

    def simple(z, codebook):
        logits = -((z[:, None] - codebook[None]) ** 2).sum(-1) / 0.7
        mean = (jax.nn.softmax(logits, axis=-1) * mask[:, None]).sum(0) / mask.sum()
        return jnp.log(len(codebook)) + jnp.sum(mean * jnp.log(mean))

    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1)))(z, codebook) for f in (blocked, simple))
    assert_close(ours[0], theirs[0], 1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert_close(a, b, 1e-4)
    np.testing.assert_array_equal(np.asarray(ours[1][0])[::3], 0)


def test_diversity_of_hard_assignments():
    """Far corners make assignments hard; equal embeddings have equal shares of any latents."""
    corners, mask = 100 * jnp.eye(6), jnp.ones(6, bool)
    for rows, codebook, cost in (
        (range(6), corners, 0), ([0] * 6, corners, np.log(6)), ([0, 0, 0, 1, 1, 1], corners, np.log(3)),
        ([0, 0, 0, 1, 1, 1], 0 * corners, 0),
    ):  # fmt: skip
        loss = diversity(corners[jnp.asarray(rows)], codebook, mask, 1.0)
        np.testing.assert_allclose(loss, cost, rtol=1e-6, atol=1e-6)


def test_memory_of_diversity_does_not_grow_with_the_product():
    """N = 65,536, K = 1,024: the whole matrix takes 256 MiB."""
    shapes = [jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (65_536, 1024)]
    mask = jax.ShapeDtypeStruct((65_536,), bool)
    gradient = jax.jit(jax.grad(lambda z, c, mask: diversity(z, c, mask, 1.0, block=2**20), (0, 1)))
    memory = gradient.lower(*shapes, mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20


@pytest.mark.slow
def test_diversity_trains_the_projection_before_an_ema_codebook():
    z = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)

    def gradient(**settings):
        module = Projected(EMAQuantizer(8, 3, commitment_cost=0.0, **settings), 6)
        variables = jax.jit(module.init)(jax.random.key(0), z)
        return jax.jit(jax.grad(lambda p: module.apply({**variables, "params": p}, z).loss))(variables["params"])

    assert not np.any(gradient()["project_in"]["kernel"])
    assert np.any(gradient(diversity_cost=0.1)["project_in"]["kernel"])


def test_orthogonality_equals_the_mean_squared_cosine(assert_close):
    codebook = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    units = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    assert_close(orthogonality(jnp.asarray(codebook)), ((units @ units.T - np.eye(40)) ** 2).mean(), 1e-5)
    assert orthogonality(3 * jnp.eye(5)) < 1e-6
    np.testing.assert_allclose(orthogonality(jnp.ones((4, 3))), 12 / 16, rtol=1e-5)
