"""The decoder equals PyTorch's, whatever is recomputed or trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.models.decoder import Decoder, overlap_add, overlap_window, sincos_table, widen_head
from vqrae_jax.models.vit import BlocksConfig
from vqrae_jax.pretrained import convert, tables
from vqrae_jax.resize import resize


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


def test_squares_are_added_where_they_overlap():
    h, w, patch = 3, 4, 4
    squares = np.random.default_rng(0).normal(size=(2, h, w, 2 * patch, 2 * patch, 3)).astype(np.float32)
    expected = np.zeros((2, (h + 1) * patch, (w + 1) * patch, 3), np.float32)
    for row, column in np.ndindex(h, w):
        y, x = row * patch, column * patch
        expected[:, y : y + 2 * patch, x : x + 2 * patch] += squares[:, row, column] * overlap_window(patch)
    half = patch // 2
    images = overlap_add(jnp.asarray(squares.reshape(2, h, w, -1)), patch)
    np.testing.assert_allclose(images, expected[:, half:-half, half:-half], atol=1e-6)
    ones = overlap_add(jnp.ones((1, h, w, 4 * patch**2)), patch)
    np.testing.assert_allclose(ones[:, half:-half, half:-half], 1, atol=1e-6)  # squares that are equal leave no trace


def test_a_widened_head_decodes_the_same_images(decoder, assert_close):
    module, variables, channels = decoder
    latent = jax.random.normal(jax.random.key(0), (2, module.grid, module.grid, channels))
    params = variables["params"] | {"pred": widen_head(variables["params"]["pred"], module.patch)}
    assert module.patch % 2 == 0
    images = jax.jit(module.clone(overlap=True).apply)({"params": params}, latent)
    assert_close(images, jax.jit(module.apply)(variables, latent), 1e-5)


@pytest.mark.slow
def test_features_are_predicted_by_one_layer_or_behind_blocks_with_registers(decoder, assert_close):
    module, variables, channels = decoder
    latent, trees = jax.random.normal(jax.random.key(0), (2, module.grid, module.grid, channels)), {}
    expected = jax.jit(module.apply)(variables, latent)
    for blocks in (0, 2):
        deep = module.clone(features=24, feature_blocks=blocks)
        trees[blocks] = jax.jit(deep.init, static_argnums=2)(jax.random.key(1), latent, True)["params"]["features"]

        def loss(head, deep=deep):
            image, features = deep.apply({"params": {**variables["params"], "features": head}}, latent, True)
            return jnp.sum(jnp.sin(features)), (image, features)

        gradient, (image, features) = jax.jit(jax.grad(loss, has_aux=True))(trees[blocks])
        assert_close(image, expected, 1e-5)
        assert features.shape == (2, module.grid, module.grid, 24)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            zero = "['key']['bias']" in jax.tree_util.keystr(path)  # softmax is the same for all keys plus a constant
            assert zero or np.abs(leaf).max() > 1e-6 * largest, jax.tree_util.keystr(path)
    assert set(trees[0]) == {"kernel", "bias"}
    assert set(trees[2]) == {"registers", "blocks", "norm", "head"}
    assert trees[2]["blocks"]["mlp"]["up"]["kernel"].shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_latents_are_decoded_on_their_own_grid(decoder, assert_close, overlap):
    module, variables, channels = decoder
    n, patch, params = module.grid, module.patch, variables["params"]
    module = module.clone(overlap=overlap, features=24)
    params = params | {"features": {"kernel": jnp.ones((module.blocks.width, 24)), "bias": jnp.zeros(24)}}
    params |= {"pred": widen_head(params["pred"], patch)} if overlap else {}
    kept, latent = module.clone(keep_grid=True), jax.random.normal(jax.random.key(0), (2, n, n, channels))
    same, expected = (jax.jit(m.apply, static_argnums=2)({"params": params}, latent, True) for m in (kept, module))
    for a, b in zip(same, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for h, w in ((n, 2 * n), (3 * n // 2, n)):
        latent = jax.random.normal(jax.random.key(1), (1, h, w, channels))
        image, features = jax.jit(kept.apply, static_argnums=2)({"params": params}, latent, True)
        assert (image.shape, features.shape) == ((1, h * patch, w * patch, 3), (1, h, w, 24))
        assert module.apply({"params": params}, latent).shape == (1, n * patch, n * patch, 3)
    # On a square grid, it is the decoder of that grid with a resampled table.
    grid = resize(params["pos_embed"][:, 1:].reshape(1, n, n, -1), 2 * n, 2 * n, "bicubic").reshape(1, 4 * n * n, -1)
    table = jnp.concatenate([params["pos_embed"][:, :1], grid], axis=1)
    latent = jax.random.normal(jax.random.key(2), (1, 2 * n, 2 * n, channels))
    larger = module.clone(grid=2 * n).apply({"params": params | {"pos_embed": table}}, latent)
    assert_close(kept.apply({"params": params}, latent), larger, 1e-6)
