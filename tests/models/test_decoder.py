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
    """The golden decoder, its variables and the number of latent channels."""
    config = json.loads((golden / "decoder" / "config.json").read_text())
    params = json.loads((golden / "decoder" / "params.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    blocks = BlocksConfig(*(config[f"decoder_{name}"] for name in names), norm_eps=config["layer_norm_eps"])
    grid = round(params["num_patches"] ** 0.5)
    module = Decoder(blocks, grid, params["patch_size"], mean=(0.0,) * 3, std=(1.0,) * 3)
    latent = jnp.zeros((1, 2, 2, params["latent_dim"]))
    target = jax.eval_shape(module.init, jax.random.key(0), latent)["params"]
    arrays = np.load(golden / "decoder" / "model.npz")
    return module, {"params": convert.convert(arrays, tables.DECODER_TABLE, target)}, params["latent_dim"]


@pytest.mark.parametrize("tokens", [36, 16, 64])
def test_images_equal_pytorch(golden, assert_close, decoder, tokens):
    module, variables, _ = decoder
    io = np.load(golden / "decoder" / "io.npz")
    side = round(tokens**0.5)
    latent = io[f"latents_{tokens}"].reshape(2, side, side, -1)
    assert_close(jax.jit(module.apply)(variables, latent), io[f"images_{tokens}"], 1e-5)
    assert_close(sincos_table(6, 64), io["pos_embed_init"], 1e-6)


def test_gradients_with_recomputed_blocks_and_with_a_trained_position_table(decoder, assert_close):
    module, variables, channels = decoder
    latent = jax.random.normal(jax.random.key(1), (2, 6, 6, channels))

    def gradients(module):
        return jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, latent) ** 2)))(variables)["params"]

    remat = module.clone(blocks=dataclasses.replace(module.blocks, remat=True))
    plain, recomputed, trained = map(gradients, (module, remat, module.clone(train_pos_embed=True)))
    a, b = (tree["blocks"]["mlp"]["up"]["kernel"] for tree in (plain, recomputed))
    assert_close(a, b, 1e-5)
    assert not np.any(plain["pos_embed"])
    assert np.any(trained["pos_embed"])
    assert np.any(plain["cls"])
