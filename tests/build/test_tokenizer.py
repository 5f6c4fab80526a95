"""Tokenizers built from configs, and settings that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer, initial_params, initial_variables
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError, WeightsError

ARCHITECTURE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


def random_encoder(**changes):
    fields = {"encoder_config_path": None, "encoder_params": {"architecture": ARCHITECTURE}, "encoder_input_size": 32}
    return ModelConfig(**fields | {"decoder_config_path": "ViT-Nano", "decoder_patch_size": 8} | changes)


def pretrained_encoder(golden, **changes):
    folder = str(golden / "encoders" / "dinov2_with_registers")
    return random_encoder(encoder_config_path=folder, encoder_params={}, encoder_input_size=56, **changes)


def test_pretrained_parts_are_read_and_the_others_are_random(golden):
    built = build_tokenizer(pretrained_encoder(golden))
    params = initial_params(built, jax.random.key(0), ["encoder", "decoder"])
    assert set(params) == {"encoder", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], built.pretrained["encoder"])
    again = initial_params(built, jax.random.key(0), ["decoder"])
    jax.tree.map(np.testing.assert_array_equal, again["decoder"], params["decoder"])


def test_a_setting_that_does_not_fit_and_a_description_that_cannot_be_read_are_named(golden):
    for changes, field, message in (
        ({"encoder_input_size": 30}, "encoder_input_size", "24 and 32"),
        ({"encoder_params": {}}, "encoder_params.architecture", "hidden_size"),
        ({"encoder_params": {"architecture": ARCHITECTURE, "layers": (2,)}}, "encoder_params.layers", "0 to 1"),
        (
            {"encoder_params": {"architecture": ARCHITECTURE | {"num_layers": 2}}},
            "encoder_params.architecture",
            "num_layers",
        ),
        ({"decoder_config_path": None, "decoder_architecture": {"act": "gelu"}}, "decoder_architecture", "act"),
        ({"encoder_params": {"architecture": ARCHITECTURE, "layers": ()}}, "encoder_params.layers", "-1"),
        ({"decoder_config_path": "ViT-Q"}, "decoder_config_path", "ViT-XL"),
        ({"encoder_config_path": "/absent"}, "encoder_params.architecture", "model.encoder_config_path=None"),
        ({"decoder_features": (0, 5)}, "decoder_features", "0 to 1"),
        ({"decoder_head": "overlap", "decoder_patch_size": 7}, "decoder_patch_size", "even"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            build_tokenizer(random_encoder(**changes))
        assert error.value.field == f"model.{field}"
    for changes, message in (
        ({"encoder_params": {"architecture": ARCHITECTURE | {"num_attention_heads": 7}}}, "num_attention_heads=7"),
        ({"encoder_params": {"architecture": ARCHITECTURE | {"num_hidden_layers": 0}}}, "num_hidden_layers"),
        ({"normalization_stat_path": "/absent.npz"}, "model.normalization_stat_path='/absent.npz'"),
        ({"encoder_config_path": "/absent", "encoder_params": {}}, "model.encoder_config_path='/absent'"),
        ({"encoder_config_path": "a/b", "encoder_params": {}}, "model.encoder_config_path='a/b'"),
    ):
        with pytest.raises(WeightsError, match=message):
            build_tokenizer(random_encoder(**changes))
    with pytest.raises(ConfigError, match=r"model\.encoder_cls='Dinov2withNorm'$") as error:
        build_tokenizer(pretrained_encoder(golden, encoder_cls="SigLIP2wNorm"))
    assert (error.value.field, error.value.value) == ("model.encoder_cls", "SigLIP2wNorm")


def test_latent_statistics_must_fit_the_latent(tmp_path):
    path = tmp_path / "stat.npz"
    np.savez(path, var=np.ones((4, 4, 15), np.float32))
    with pytest.raises(WeightsError, match=r"\(4, 4, 15\).*\(16\).*4x4") as error:
        build_tokenizer(random_encoder(normalization_stat_path=str(path)))
    assert error.value.field == "model.normalization_stat_path"
    np.savez(path, var=np.full(16, -1, np.float32))
    with pytest.raises(WeightsError, match="0 or more"):
        build_tokenizer(random_encoder(normalization_stat_path=str(path)))
    with pytest.raises(ConfigError, match=r"\(4, 4, 15\).*\(16,\) or \(4, 4, 16\)"):
        build_tokenizer(random_encoder(), latent_stats={"var": np.ones((4, 4, 15), np.float32)})
    for shape in ((16,), (4, 4, 16)):
        np.savez(path, var=np.full(shape, 4.0, np.float32))
        built = build_tokenizer(random_encoder(normalization_stat_path=str(path)))
        stats = initial_variables(built, jax.random.key(0), [])["batch_stats"]["latent"]
        np.testing.assert_array_equal(stats["var"], np.full(shape, 4.0))


def test_whitening_uses_the_principal_axes_of_the_file(tmp_path):
    path, rng = tmp_path / "stat.npz", np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(16, 6)))[0].astype(np.float32)
    moments = {"mean": np.zeros(16, np.float32)}
    axes = {"pca_mean": np.full(16, 2, np.float32), "pca_basis": basis, "pca_var": np.float32([9, 4, 1, 1, 1, 1])}
    params = {"whitening_dim": 2, "codebook_dim": 3}

    def quantizer(arrays, **params):
        np.savez(path, **arrays)
        built = build_tokenizer(random_encoder(normalization_stat_path=str(path), quantizer_params=params))
        return initial_variables(built, jax.random.key(0), [])["batch_stats"]["quantizer"]

    state = quantizer(moments | axes, **params)
    np.testing.assert_array_equal(state["basis"], basis[:, :2])
    np.testing.assert_array_equal(state["mean"], axes["pca_mean"])
    np.testing.assert_allclose(state["deviation"], [3, 2])
    assert state["fitted"] == 1
    assert "codebook" in state["quantizer"]["quantizer"]
    assert quantizer(moments, **params)["fitted"] == 0  # fitted to the first batch
    assert "basis" not in quantizer(moments | axes)
    with pytest.raises(ConfigError, match="--components=7"):
        quantizer(moments | axes, whitening_dim=7)
    for variances in (np.ones(5), np.full(6, np.nan)):
        with pytest.raises(WeightsError, match="pca_var"):
            quantizer(moments | axes | {"pca_var": variances}, **params)


def test_a_decoder_config_that_does_not_fit_is_named(tmp_path):
    fields = {"decoder_hidden_size": 30, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "decoder_intermediate_size": 8}))
    with pytest.raises(ConfigError, match=r"decoder_hidden_size=30 .* decoder_num_attention_heads=4"):
        build_tokenizer(random_encoder(decoder_config_path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="lacks decoder_intermediate_size"):
        build_tokenizer(random_encoder(decoder_config_path=str(tmp_path)))


@pytest.mark.slow
def test_bfloat16_keeps_parameters_losses_and_gradients_in_float32():
    built = build_tokenizer(random_encoder(dtype="bfloat16", num_embeddings=32))
    names = ("encoder", "quantizer", "decoder")
    variables = initial_variables(built, jax.random.key(0), names)
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    image = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))

    @jax.jit
    def step(variables):
        def loss(params):
            out, updated = built.module.apply(
                {**variables, "params": params}, image, train=True, method="forward", mutable=["batch_stats"],
                rngs={"codes": jax.random.key(2)},
            )  # fmt: skip
            return jnp.mean((out.reconstruction - image) ** 2) + out.quantized.loss, (out, updated)

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, (out, updated) = step(variables)
    assert out.reconstruction.dtype == jnp.float32
    assert out.quantized.loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert updated["batch_stats"]["quantizer"]["codebook"].dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_linear_decoder_starts_one_that_overlaps(golden):
    folder = golden / "vqrae"
    settings = {
        "decoder_config_path": str(folder / "decoder_config"), "decoder_patch_size": 16,
        "encoder_params": {"architecture": ARCHITECTURE | {"hidden_size": 32}},
        "pretrained_decoder_path": str(folder / "ema_vq_2d" / "model.npz"),
    }  # fmt: skip
    images = []
    for head in ("linear", "overlap"):
        built = build_tokenizer(random_encoder(**settings, decoder_head=head))
        latent = jax.random.normal(jax.random.key(0), (1, 4, 4, 32))
        images.append(jax.jit(built.module.decoder.apply)({"params": built.pretrained["decoder"]}, latent))
    np.testing.assert_allclose(*images, atol=1e-5)
