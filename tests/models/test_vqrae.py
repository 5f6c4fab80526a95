import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import assembly
from vqrae_jax.config import ModelConfig
from vqrae_jax.pretrained import convert, tables

CASES = ["ema_vq_2d", "ema_vq_tokens"]
ENCODER = "dinov2_with_registers"


def build(golden, case, **changes):
    """The origin's model of one golden case, with its weights."""
    given = json.loads((golden / "vqrae" / case / "params.json").read_text())["params"]
    stat = "normalization_stat_path"
    keep = {k: given[k] for k in (
        "encoder_cls", "encoder_input_size", "decoder_patch_size", "num_embeddings", "commitment_cost", "vq_decay",
        "vq_epsilon", "quantize_before_reshape", "reshape_to_2d",
    )}  # fmt: skip
    paths = {
        "encoder_config_path": str(golden / "encoders" / ENCODER),
        "decoder_config_path": str(golden / "vqrae" / "decoder_config"),
        stat: str(golden / "vqrae" / case / "stat.npz") if given[stat] else None,
    }
    built = assembly.assemble(ModelConfig(**keep | paths | changes))
    state = np.load(golden / "vqrae" / case / "model.npz")
    shapes = assembly.shapes(built)
    decoder = {n.removeprefix("decoder."): state[n] for n in state.files if n.startswith("decoder.")}
    stats = assembly.initial_variables(built, jax.random.key(0), [])["batch_stats"]
    stats["quantizer"] |= {
        "codebook": state["quantizer.embedding"], "counts": state["quantizer.ema_cluster_size"],
        "sums": state["quantizer.ema_w"],
    }  # fmt: skip
    params = {
        "encoder": built.pretrained["encoder"],
        "decoder": convert.convert(decoder, tables.DECODER_TABLE, shapes["params"]["decoder"]),
    }
    return built.module, {"params": params, "batch_stats": stats}


def call(module, variables, method, *args):
    return jax.jit(lambda v, *a: module.apply(v, *a, method=method))(variables, *args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("image", ["main", "native", "other"])
def test_equals_pytorch(golden, assert_close, case, image):
    module, variables = build(golden, case)
    io = np.load(golden / "vqrae" / case / "io.npz")
    x = io[f"images_{image}"]
    np.testing.assert_array_equal(call(module, variables, "encode_to_indices", x), io[f"indices_{image}"])
    latent = call(module, variables, "encode", x)
    assert_close(jnp.moveaxis(latent, -1, 1), io[f"z_q_{image}"], 1e-5, "latent")
    assert_close(call(module, variables, None, x), io[f"recon_{image}"], 1e-5, "reconstruction")
    features = module.encoder.apply({"params": variables["params"]["encoder"]}, x)
    assert_close(features.reshape(io[f"features_{image}"].shape), io[f"features_{image}"], 1e-4, "features")
    assert_close(call(module, variables, "quantize", x).loss, io[f"vq_loss_{image}"], 1e-5, "vq loss")


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_pytorch(golden, assert_close, case):
    module, variables = build(golden, case)
    io = np.load(golden / "vqrae" / case / "io.npz")
    _, losses = jax.jit(lambda v, x: module.apply(v, x, return_loss=True))(variables, io["images_main"])
    assert set(losses) == {"recon_loss", "vq_loss", "total_loss"}
    for name, value in losses.items():
        assert_close(value, io[name], 1e-5, name)


@pytest.mark.parametrize("case", CASES)
def test_decoding_indices_equals_the_forward_pass(golden, assert_close, case):
    module, variables = build(golden, case)
    io = np.load(golden / "vqrae" / case / "io.npz")
    reconstruction = call(module, variables, None, io["images_main"])
    decoded = call(module, variables, "decode_from_indices", io["indices_main"])
    assert_close(decoded, reconstruction, 1e-6)
    assert_close(decoded, io["recon_main"], 1e-5)


def test_return_loss_wants_images_of_the_output_size(golden):
    module, variables = build(golden, "ema_vq_2d")
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(56, 56\).*64x64"):
        module.apply(variables, jnp.zeros((1, 56, 56, 3)), return_loss=True)


def test_tokens_instead_of_a_grid(golden, assert_close):
    images = np.load(golden / "vqrae" / "ema_vq_2d" / "io.npz")["images_main"]
    module, variables = build(golden, "ema_vq_2d")
    flat, _ = build(golden, "ema_vq_2d", reshape_to_2d=False, quantize_before_reshape=True)
    latent, tokens = (call(m, variables, "encode", images) for m in (module, flat))
    assert tokens.shape == (2, 16, 32)
    assert_close(tokens.reshape(latent.shape), latent, 1e-6)
    assert_close(call(flat, variables, "decode", tokens), call(module, variables, "decode", latent), 1e-6)


def test_noise_acts_in_training_only_and_is_one_sigma_per_image(golden):
    images = np.load(golden / "vqrae" / "ema_vq_2d" / "io.npz")["images_main"]
    module, variables = build(golden, "ema_vq_2d", noise_tau=0.8)
    quiet, _ = build(golden, "ema_vq_2d")
    np.testing.assert_array_equal(call(module, variables, "encode", images), call(quiet, variables, "encode", images))
    z = jnp.zeros((64, 8, 8, 32))
    noised = module.apply(variables, z, method="_noised", rngs={"noise": jax.random.key(0)})
    sigma = np.asarray(noised).std((1, 2, 3))
    assert sigma.max() < 0.85
    assert sigma.min() < 0.2 < 0.6 < sigma.max()
    halves = np.asarray(noised).reshape(64, 2, -1).std(-1)
    np.testing.assert_allclose(halves[:, 0], halves[:, 1], rtol=0.2)


def test_full_size_origin_shapes(golden):
    """The origin's defaults build, in shapes only."""
    config = ModelConfig(encoder_config_path=None, encoder_params={"architecture": {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14, "image_size": 518,
    }}, decoder_config_path="ViT-XL", scan_layers=True)  # fmt: skip
    built = assembly.assemble(config)
    shapes = assembly.shapes(built)
    assert shapes["batch_stats"]["quantizer"]["codebook"].shape == (8192, 768)
    assert built.image_size == 256
    assert sum(x.size for x in jax.tree.leaves(shapes["params"]["decoder"])) > 4e8
