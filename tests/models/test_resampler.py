"""Tokens that are free of the grid: positions, cross-attention, and prefixes that decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.models.resampler import Canvas, Resampled, Resampler, cell_centers, prefix_lengths, spread
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.quantizers.ema import EMAQuantizer

BLOCKS = BlocksConfig(8, 1, 2, 16)


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def perturbed(variables):
    return jax.tree.map(lambda x: x + 0.1 * random(*x.shape), variables)


@pytest.mark.parametrize("count", [1, 2, 5, 32, 256])
def test_the_first_positions_cover_the_image(count):
    """Of every prefix: no point of the image is farther from a position than 1.2 times the side of its share."""
    cells = cell_centers(32, 32)
    for n in {1, count // 2, count} - {0}:
        positions = spread(count)[:n]
        assert (positions >= 0).all()
        assert (positions < 1).all()
        distances = np.linalg.norm(cells[:, None] - positions, axis=-1).min(1)
        assert distances.max() < 1.2 * n**-0.5


@pytest.mark.slow
def test_a_square_number_of_positions_is_a_grid():
    centers = spread(36)
    np.testing.assert_array_equal(centers[np.lexsort(centers.T[::-1])], cell_centers(6, 6))
    x, module = random(1, 36, 8), Canvas(BLOCKS, 36)
    near = module.apply(module.init(jax.random.key(0), x, 6, 6), x, 6, 6)
    cells = np.lexsort(centers.T[::-1])
    cosine = jnp.sum(near * x[:, cells], -1) / jnp.linalg.norm(near, axis=-1) / jnp.linalg.norm(x[:, cells], axis=-1)
    assert cosine.min() > 0.7  # on a grid of the same side, tokens hardly change


def test_tokens_start_as_means_of_what_is_near():
    """A ramp over the image keeps its values, and equal tokens stay equal, whatever the density of the positions."""
    source, target = cell_centers(12, 9), spread(20)
    ramp = jnp.asarray(source[None])
    module = Resampler(BlocksConfig(2, 0, 1, 4), spacing=20**-0.5)
    variables = module.init(jax.random.key(0), ramp, source, target)
    near = module.apply(variables, ramp, source, target)[0]
    inside = (np.abs(target - 0.5) < 0.3).all(1)
    np.testing.assert_allclose(near[inside], target[inside], atol=0.03)
    constant = module.apply(variables, jnp.ones((1, 108, 2)), source, target)
    np.testing.assert_allclose(constant, 1, rtol=1e-5)


@pytest.mark.slow
def test_tokens_depend_on_the_place_of_their_sources_and_not_on_their_order():
    x, source, target, order = random(2, 12, 8), cell_centers(3, 4), spread(5), np.random.default_rng(1).permutation(12)
    module = Resampler(BLOCKS, 0.4)
    variables = perturbed(module.init(jax.random.key(0), x, source, target))
    tokens = module.apply(variables, x, source, target)
    np.testing.assert_allclose(module.apply(variables, x[:, order], source[order], target), tokens, atol=1e-5)
    assert np.abs(module.apply(variables, x[:, order], source, target) - tokens).max() > 1e-2


def test_absent_tokens_are_as_if_they_were_not_there():
    x, module = random(2, 6, 8), Canvas(BLOCKS, 6)
    variables = perturbed(module.init(jax.random.key(0), x, 3, 4))
    for n in (1, 4):
        present = jnp.broadcast_to(jnp.arange(6) < n, (2, 6))
        masked = module.apply(variables, x, 3, 4, present)
        np.testing.assert_allclose(masked, module.apply(variables, x[:, :n], 3, 4), atol=1e-5)
        assert np.abs(masked - module.apply(variables, x, 3, 4)).max() > 1e-3


@pytest.mark.slow
def test_nested_training_leaves_out_the_last_tokens():
    quantizer = EMAQuantizer(16, 8, codebook_init="normal")
    z, module = random(64, 2, 3, 8), Resampled(quantizer, BLOCKS, tokens=6, nested=True)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    train = jax.jit(lambda v, z, key: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": key})[0])
    out = train(variables, z, jax.random.key(1))
    present = np.asarray(out.indices) >= 0
    lengths = present.sum(1)
    np.testing.assert_array_equal(present, np.arange(6) < lengths[:, None])
    assert set(lengths.tolist()) == set(prefix_lengths(6)) == {1, 2, 4, 6}
    assert module.apply(variables, z).indices.min() >= 0
    assert out.metrics["counts"].sum() == 64 * 6  # the codebook learns from all tokens


def test_an_image_that_is_not_finite_has_no_tokens_and_changes_no_gradient():
    z, module = random(3, 2, 2, 8), Resampled(EMAQuantizer(16, 8, codebook_init="normal"), BLOCKS, tokens=5)
    variables = jax.jit(module.init)(jax.random.key(0), z)

    @jax.jit
    def gradient(z):
        def loss(params):
            rngs = {"codes": jax.random.key(1)}
            out, _ = module.apply({**variables, "params": params}, z, True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.sin(out.z[:2])) + out.loss, out.metrics["nonfinite"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    gradients, nonfinite = gradient(z.at[2, 0, 1, 3].set(np.nan))
    assert nonfinite == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
