"""The decoder equals PyTorch's, whatever is recomputed or trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.models.decoder import Decoder, sincos_table
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.pretrained import convert, tables


@pytest.fixture(scope="module")
def decoder(golden):
    """The golden decoder and the width of its latents."""
    config = json.loads((golden / "decoder" / "config.json").read_text())
    params = json.loads((golden / "decoder" / "params.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    blocks = BlocksConfig(*(config[f"decoder_{name}"] for name in names), norm_eps=config["layer_norm_eps"])
    grid = round(params["num_patches"] ** 0.5)
    return Decoder(blocks, grid, params["patch_size"], mean=(0.0,) * 3, std=(1.0,) * 3), params["latent_dim"]


@pytest.fixture(scope="module")
def variables(golden, decoder):
    module, channels = decoder
    target = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels)))["params"]
    return {"params": convert.convert(np.load(golden / "decoder" / "model.npz"), tables.DECODER_TABLE, target)}


@pytest.fixture(scope="module")
def gradients(decoder, variables):
    """Gradients with respect to the parameters, by fields that change the decoder or its blocks."""

    def compute(remat=False, **changes):
        module, channels = decoder
        module = module.clone(blocks=dataclasses.replace(module.blocks, remat=remat), **changes)
        latent = jax.random.normal(jax.random.key(1), (2, 6, 6, channels))
        return jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, latent) ** 2)))(variables)["params"]

    return compute


@pytest.mark.parametrize("tokens", [36, 16, 64])
def test_images_equal_pytorch(golden, assert_close, decoder, variables, tokens):
    io = np.load(golden / "decoder" / "io.npz")
    side = round(tokens**0.5)
    latent = io[f"latents_{tokens}"].reshape(2, side, side, -1)
    assert_close(jax.jit(decoder[0].apply)(variables, latent), io[f"images_{tokens}"], 1e-5)


def test_position_table_equals_pytorch(golden, assert_close):
    expected = np.load(golden / "decoder" / "io.npz")["pos_embed_init"]
    assert_close(sincos_table(6, 64), expected, 1e-6)


def test_gradients_with_recomputed_blocks_and_with_a_trained_position_table(gradients, assert_close):
    plain, recomputed, trained = gradients(), gradients(remat=True), gradients(train_pos_embed=True)
    a, b = (tree["blocks"]["mlp"]["up"]["kernel"] for tree in (plain, recomputed))
    assert_close(a, b, 1e-5)
    assert not np.any(plain["pos_embed"])
    assert np.any(trained["pos_embed"])
    assert np.any(plain["cls"])
