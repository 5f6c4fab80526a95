"""Learned combinations of layers; the laws of quantizers behind them are in test_laws.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fusion import Fused, Fusion
from vqrae_jax.quantizers.none import NoQuantizer

CHANNELS, LAYERS = 6, 3


def layers(tokens=64):
    return jax.random.normal(jax.random.key(0), (tokens, LAYERS, CHANNELS))


def normalized(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("method", ["linear", "routed"])
def test_the_first_latents_are_the_normalized_mean_of_the_layers(method):
    x, module = layers(), Fusion(CHANNELS, LAYERS, method)
    z, _ = jax.jit(module.init_with_output)(jax.random.key(1), x.reshape(-1, LAYERS * CHANNELS))
    np.testing.assert_allclose(z, normalized(np.asarray(x).mean(1)), atol=1e-5)


def test_matrices_map_layers_whose_sum_cannot_shrink():
    x, module = layers(), Fusion(CHANNELS, LAYERS, "linear")
    kernel = jax.random.normal(jax.random.key(1), (LAYERS * CHANNELS, CHANNELS))
    for scale in (1.0, 0.1):
        variables = {"params": {"linear": {"kernel": scale * kernel}}}
        z = jax.jit(module.apply)(variables, x.reshape(-1, LAYERS * CHANNELS))
        expected = np.einsum("nlc,lcd->nd", x, kernel.reshape(LAYERS, CHANNELS, CHANNELS))
        np.testing.assert_allclose(z, normalized(expected), atol=1e-3)


def test_a_router_weighs_the_layers_of_every_token():
    """A router that reads the first channel of the first layer selects the first layer, or the last one."""
    x, module = layers(), Fusion(CHANNELS, LAYERS, "routed")
    kernel = jnp.zeros((LAYERS * CHANNELS, LAYERS)).at[0].set(jnp.array([1e4, 0, -1e4]))
    variables = {"params": {"router": {"kernel": kernel, "bias": jnp.zeros(LAYERS)}}}
    z = jax.jit(module.apply)(variables, x.reshape(-1, LAYERS * CHANNELS))
    expected = np.where(np.asarray(x)[:, 0, :1] > 0, x[:, 0], x[:, -1])
    np.testing.assert_allclose(z, normalized(expected), atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "routed"])
def test_the_fusion_learns_from_the_decoder_and_from_the_commitment_loss(method):
    x, inner = layers().reshape(-1, LAYERS * CHANNELS), EMAQuantizer(8, CHANNELS, codebook_init="normal")
    module = Fused(inner, CHANNELS, LAYERS, method)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def gradients(params):
        def losses(params):
            variables_of = {**variables, "params": params}
            out, _ = module.apply(variables_of, x, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)})
            return jnp.stack([jnp.sum(jnp.sin(out.z)), out.loss])

        return jax.jacrev(losses)(params)

    for leaf in jax.tree.leaves(gradients(variables["params"])["fusion"]):
        assert np.all(np.any(leaf.reshape(2, -1), axis=1))


def test_a_continuous_autoencoder_has_a_fusion_as_well():
    x, module = layers().reshape(8, 2, 4, -1), Fused(NoQuantizer(), CHANNELS, LAYERS, "linear")
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    assert out.z.shape == (8, 2, 4, CHANNELS)
    assert (module.has_indices, module.num_embeddings) == (False, None)
    assert set(variables["params"]) == {"fusion"}
