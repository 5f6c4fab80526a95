"""The tokenizer equals the PyTorch VQRAE and RAE; its methods are consistent with each other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.inference import pytorch_checkpoint

CASES = ["ema_vq_2d", "ema_vq_tokens", "simvq", "fsq"]
# PyTorch's float32 differs from float64 by 3.5e-5 where the Fourier features of fsq, of scale 10, amplify errors.
TOLERANCE = {"fsq": 3e-4}
LOSS_TOLERANCE = {"fsq": 1e-4}


def build(golden, case, weights="model", **changes):
    """Builds the model of one golden case; returns it and its variables."""
    config, state = golden_config(golden, case, **changes), dict(np.load(golden / "vqrae" / case / "model.npz"))
    checkpoint = {"model": state}
    if weights == "ema":
        checkpoint["ema"] = state | dict(np.load(golden / "vqrae" / case / "ema.npz"))
    built, variables = pytorch_checkpoint.convert_checkpoint(config, checkpoint, weights)
    return built.module, variables


def load_io(golden, case):
    return np.load(golden / "vqrae" / case / "io.npz")


def golden_config(golden, case, **changes):
    recorded = json.loads((golden / "vqrae" / case / "params.json").read_text())["params"]
    fields = {name: value for name, value in recorded.items() if name in ModelConfig.model_fields}
    paths = {"encoder_config_path": str(golden / recorded["encoder_config_path"]), "encoder_params": {}}
    paths["decoder_config_path"] = str(golden / "vqrae" / "decoder_config")
    if recorded["normalization_stat_path"]:
        paths["normalization_stat_path"] = str(golden / "vqrae" / case / "stat.npz")
    if case == "rae":
        paths["quantizer"] = "none"
    if recorded.get("use_simvq"):
        paths |= {"quantizer": "simvq", "quantizer_params": {"input_projection": True}}
        paths |= {"encoder_params": {"normalize": False}}  # what DINOv3 in the PyTorch VQRAE computes
    if recorded.get("use_fsq"):
        paths |= {"quantizer": "fsq", "quantizer_params": {"levels": recorded["fsq_levels"]}}
    return ModelConfig(**fields | paths | changes)


def call(module, variables, method, *args):
    return jax.jit(lambda v, *a: module.apply(v, *a, method=method))(variables, *args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("image", ["main", "native", "other"])
def test_tokenizer_equals_pytorch(golden, assert_close, case, image):
    module, variables = build(golden, case)
    io = load_io(golden, case)
    x = io[f"images_{image}"]

    @jax.jit
    def run(v, x):
        features = module.encoder.apply({"params": v["params"]["encoder"]}, x)
        indices = module.apply(v, x, method="encode_to_indices")
        latent = module.apply(v, x, method="encode")
        return features, indices, latent, module.apply(v, x, method="forward")

    features, indices, latent, out = run(variables, x)
    np.testing.assert_array_equal(indices, io[f"indices_{image}"])
    assert_close(features.reshape(io[f"features_{image}"].shape), io[f"features_{image}"], 1e-4, "features")
    tolerance = TOLERANCE.get(case, 1e-5)
    assert_close(jnp.moveaxis(latent, -1, 1), io[f"z_q_{image}"], tolerance, "latent")
    assert_close(out.reconstruction, io[f"recon_{image}"], tolerance, "reconstruction")
    assert_close(out.quantized.loss, io[f"vq_loss_{image}"], LOSS_TOLERANCE.get(case, 1e-5), "vq loss")


@pytest.mark.parametrize("image", ["main", "native", "other"])
def test_continuous_autoencoder_equals_pytorch(golden, assert_close, image):
    module, variables = build(golden, "rae")
    io = load_io(golden, "rae")
    x = io[f"images_{image}"]
    latent = call(module, variables, "encode", x)
    assert_close(jnp.moveaxis(latent, -1, 1), io[f"z_{image}"], 1e-4, "latent")  # resized images
    assert_close(call(module, variables, None, x), io[f"recon_{image}"], 1e-4, "reconstruction")
    assert_close(call(module, variables, "decode", latent), io[f"recon_{image}"], 1e-4, "decoded")


def test_continuous_autoencoder_has_no_indices(golden):
    module, variables = build(golden, "rae")
    arguments = {"encode_to_indices": jnp.zeros((1, 32, 32, 3)), "decode_from_indices": jnp.zeros((1, 4, 4), int)}
    for method, argument in arguments.items():
        with pytest.raises(ValueError, match="quantizer='none'"):
            module.apply(variables, argument, method=method)
    _, losses = module.apply(variables, jnp.zeros((1, 32, 32, 3)), return_loss=True)
    assert losses["vq_loss"] == 0


def test_ema_weights_of_a_pytorch_checkpoint(golden, assert_close, caplog):
    io = load_io(golden, "rae")
    module, variables = build(golden, "rae", weights="ema")
    assert_close(call(module, variables, None, io["images_main"]), io["ema_recon_main"], 1e-4)
    assert "codebook" not in caplog.text
    with caplog.at_level("INFO"):
        _, ema = build(golden, "ema_vq_2d", weights="ema")
    assert "the codebook is that of 'model'" in caplog.text
    _, live = build(golden, "ema_vq_2d")
    jax.tree.map(np.testing.assert_array_equal, ema["batch_stats"], live["batch_stats"])
    decoders = [np.asarray(v["params"]["decoder"]["embed"]["kernel"]) for v in (ema, live)]
    assert np.abs(decoders[0] - decoders[1]).max() > 0


def test_the_affine_norm_of_pytorch_dinov3_is_reported(golden, caplog):
    build(golden, "simvq")
    assert "normalize" not in caplog.text
    build(golden, "simvq", encoder_params={})
    assert "set model.encoder_params.normalize=False" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_pytorch_and_decoding_indices_equals_the_forward_pass(golden, assert_close, case):
    module, variables = build(golden, case)
    io = load_io(golden, case)
    images = io["images_main"]
    reconstruction, losses = jax.jit(lambda v, x: module.apply(v, x, return_loss=True))(variables, images)
    assert set(losses) == {"recon_loss", "vq_loss", "total_loss"}
    for name, value in losses.items():
        assert_close(value, io[name], LOSS_TOLERANCE.get(case, 1e-5), name)
    decoded = call(module, variables, "decode_from_indices", io["indices_main"])
    assert_close(decoded, reconstruction, 1e-6)
    assert_close(decoded, io["recon_main"], TOLERANCE.get(case, 1e-5))


def test_return_loss_needs_images_of_the_output_size(golden):
    module, variables = build(golden, "ema_vq_2d")
    with pytest.raises(ValueError, match=r"64x64 .* 56x56"):
        module.apply(variables, jnp.zeros((1, 56, 56, 3)), return_loss=True)


def test_tokens_instead_of_a_grid(golden, assert_close):
    images = load_io(golden, "ema_vq_2d")["images_main"]
    module, variables = build(golden, "ema_vq_2d")
    flat, _ = build(golden, "ema_vq_2d", reshape_to_2d=False, quantize_before_reshape=True)
    latent, tokens = (call(m, variables, "encode", images) for m in (module, flat))
    assert tokens.shape == (2, 16, 32)
    assert_close(tokens.reshape(latent.shape), latent, 1e-6)
    assert_close(call(flat, variables, "decode", tokens), call(module, variables, "decode", latent), 1e-6)


def test_noise_is_for_training_and_has_one_sigma_per_image(golden):
    images = load_io(golden, "ema_vq_2d")["images_main"]
    module, variables = build(golden, "ema_vq_2d", noise_tau=0.8)
    quiet, _ = build(golden, "ema_vq_2d")
    np.testing.assert_array_equal(call(module, variables, "encode", images), call(quiet, variables, "encode", images))
    z = jnp.zeros((64, 8, 8, 32))
    noisy = module.apply(variables, z, method="_add_noise", rngs={"noise": jax.random.key(0)})
    sigma = np.asarray(noisy).std((1, 2, 3))
    assert sigma.max() < 0.85
    assert sigma.min() < 0.2 < 0.6 < sigma.max()
    halves = np.asarray(noisy).reshape(64, 2, -1).std(-1)
    np.testing.assert_allclose(halves[:, 0], halves[:, 1], rtol=0.2)


def test_shapes_of_the_full_size_model():
    architecture = {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 14, "image_size": 518,
    }  # fmt: skip
    encoder = {"encoder_config_path": None, "encoder_params": {"architecture": architecture}}
    built = build_tokenizer(ModelConfig(**encoder, decoder_config_path="ViT-XL"))
    shapes = variable_shapes(built)
    assert shapes["batch_stats"]["quantizer"]["codebook"].shape == (8192, 768)
    assert built.image_size == 256
    assert sum(x.size for x in jax.tree.leaves(shapes["params"]["decoder"])) > 4e8
