import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.models.decoder import Decoder, sincos_table
from vqrae_jax.models.stacking import stack_blocks, unstack_blocks
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.pretrained import convert, tables


@pytest.fixture(scope="module")
def decoder(golden):
    config = json.loads((golden / "decoder" / "config.json").read_text())
    params = json.loads((golden / "decoder" / "params.json").read_text())
    width, depth, heads, mlp = (
        config[f"decoder_{n}"] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    blocks = BlocksConfig(width, depth, heads, mlp, norm_eps=config["layer_norm_eps"])
    grid = round(params["num_patches"] ** 0.5)
    return Decoder(blocks, grid, params["patch_size"], mean=(0.0,) * 3, std=(1.0,) * 3), params["latent_dim"]


@pytest.fixture(scope="module")
def variables(golden, decoder):
    module, channels = decoder
    target = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels)))["params"]
    return {"params": convert.convert(np.load(golden / "decoder" / "model.npz"), tables.DECODER_TABLE, target)}


@pytest.mark.parametrize("tokens", [36, 16, 64])
def test_images_equal_pytorch(golden, assert_close, decoder, variables, tokens):
    io = np.load(golden / "decoder" / "io.npz")
    side = round(tokens**0.5)
    latent = io[f"latents_{tokens}"].reshape(2, side, side, -1)
    assert_close(jax.jit(decoder[0].apply)(variables, latent), io[f"images_{tokens}"], 1e-5)


def test_position_table_equals_pytorch(golden, assert_close):
    expected = np.load(golden / "decoder" / "io.npz")["pos_embed_init"]
    assert_close(sincos_table(6, 64), expected, 1e-6)


def test_scanned_equals_unrolled(decoder, variables, assert_close):
    module, channels = decoder
    latent = jax.random.normal(jax.random.key(1), (2, 6, 6, channels))
    scanned = module.clone(blocks=module.blocks.__class__(**{**vars(module.blocks), "scan": True, "remat": True}))
    stacked = {"params": stack_blocks(variables["params"])}
    assert_close(jax.jit(scanned.apply)(stacked, latent), jax.jit(module.apply)(variables, latent), 1e-6)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), latent)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, dict(shapes))
    back = unstack_blocks(stacked["params"])
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables["params"]))

    def loss(module, variables):
        return jnp.sum(module.apply(variables, latent) ** 2)

    grads = jax.jit(jax.grad(loss, 1), static_argnums=0)(module, variables)["params"]
    scanned_grads = jax.jit(jax.grad(loss, 1), static_argnums=0)(scanned, stacked)["params"]
    assert_close(
        unstack_blocks(scanned_grads)["block01"]["mlp"]["up"]["kernel"], grads["block01"]["mlp"]["up"]["kernel"], 1e-5
    )


@pytest.mark.parametrize("trained", [False, True])
def test_position_table_gets_gradients_only_when_asked(decoder, variables, trained):
    module, channels = decoder
    module = module.clone(train_pos_embed=trained)
    latent = jnp.ones((1, 6, 6, channels))
    grads = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, latent) ** 2)))(variables)["params"]
    assert bool(np.any(grads["pos_embed"])) == trained
    assert np.any(grads["cls"])
