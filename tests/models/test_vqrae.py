"""The tokenizer equals the PyTorch VQRAE and RAE; its methods are consistent with each other."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.config import ModelConfig
from vqrae_jax.inference import pytorch_checkpoint
from vqrae_jax.quantizers.base import Quantized

CASES = ["ema_vq_2d", "ema_vq_tokens", "simvq", "fsq"]
# PyTorch's float32 differs from float64 by 3.5e-5 where the Fourier features of fsq, of scale 10, amplify errors.
TOLERANCE = {"fsq": 3e-4}
LOSS_TOLERANCE = {"fsq": 1e-4}


@functools.cache
def build(golden, case, weights="model", **changes):
    """Builds the model of one golden case; returns it and its variables."""
    config, state = golden_config(golden, case, **changes), dict(np.load(golden / "vqrae" / case / "model.npz"))
    checkpoint = {"model": state}
    if weights == "ema":
        checkpoint["ema"] = state | dict(np.load(golden / "vqrae" / case / "ema.npz"))
    built, variables = pytorch_checkpoint.convert_checkpoint(config, checkpoint, weights)
    return built.module, variables


@functools.cache
def load_io(golden, case):
    return dict(np.load(golden / "vqrae" / case / "io.npz"))


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


@functools.partial(jax.jit, static_argnums=(0, 2))
def call(module, variables, method, *args):
    return module.apply(variables, *args, method=method)


@pytest.mark.parametrize("case", [n if n.startswith("ema") else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
@pytest.mark.parametrize("image", ["main", *(pytest.param(n, marks=pytest.mark.slow) for n in ("native", "other"))])
def test_tokenizer_equals_pytorch(golden, assert_close, case, image):
    module, variables = build(golden, case)
    io = load_io(golden, case)
    x = io[f"images_{image}"]

    @jax.jit
    def run(v, x):
        features = module.encoder.apply({"params": v["params"]["encoder"]}, x)
        indices = module.apply(v, x, method="encode_to_indices")
        latent, out = (module.apply(v, x, method=method) for method in ("encode", "forward"))
        if image != "main":  # not of the output's size
            return features, indices, latent, out
        return features, indices, latent, out, *module.apply(v, x, return_loss=True)

    features, indices, latent, out, *rest = run(variables, x)
    np.testing.assert_array_equal(indices, io[f"indices_{image}"])
    assert_close(features.reshape(io[f"features_{image}"].shape), io[f"features_{image}"], 1e-4, "features")
    tolerance = TOLERANCE.get(case, 1e-5)
    assert_close(jnp.moveaxis(latent, -1, 1), io[f"z_q_{image}"], tolerance, "latent")
    assert_close(out.reconstruction, io[f"recon_{image}"], tolerance, "reconstruction")
    loss_tolerance = LOSS_TOLERANCE.get(case, 1e-5)
    assert_close(out.quantized.loss, io[f"vq_loss_{image}"], loss_tolerance, "vq loss")
    if rest:
        reconstruction, losses = rest
        assert set(losses) == {"recon_loss", "vq_loss", "total_loss"}
        for name, value in losses.items():
            assert_close(value, io[name], loss_tolerance, name)
        decoded = call(module, variables, "decode_from_indices", io["indices_main"])
        assert_close(decoded, reconstruction, 1e-6)
        assert_close(decoded, io["recon_main"], tolerance)


@pytest.mark.parametrize("image", ["main", *(pytest.param(n, marks=pytest.mark.slow) for n in ("native", "other"))])
def test_continuous_autoencoder_equals_pytorch(golden, assert_close, image):
    module, variables = build(golden, "rae")
    io = load_io(golden, "rae")
    x = io[f"images_{image}"]
    latent = call(module, variables, "encode", x)
    assert_close(jnp.moveaxis(latent, -1, 1), io[f"z_{image}"], 1e-4, "latent")  # resized images
    assert_close(call(module, variables, None, x), io[f"recon_{image}"], 1e-4, "reconstruction")
    assert_close(call(module, variables, "decode", latent), io[f"recon_{image}"], 1e-4, "decoded")


def test_invalid_calls_are_errors(golden):
    module, variables = build(golden, "ema_vq_2d")
    with pytest.raises(ValueError, match=r"64x64 .* 56x56"):
        jax.eval_shape(functools.partial(module.apply, return_loss=True), variables, jnp.zeros((1, 56, 56, 3)))
    module, variables = build(golden, "rae")
    arguments = {"encode_to_indices": jnp.zeros((1, 32, 32, 3)), "decode_from_indices": jnp.zeros((1, 4, 4), int)}
    for method, argument in arguments.items():
        with pytest.raises(ValueError, match="quantizer='none'"):
            jax.eval_shape(functools.partial(module.apply, method=method), variables, argument)
    _, losses = jax.jit(functools.partial(module.apply, return_loss=True))(variables, jnp.zeros((1, 32, 32, 3)))
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
    build.__wrapped__(golden, "simvq")
    assert "normalize" not in caplog.text
    build.__wrapped__(golden, "simvq", encoder_params={})
    assert "set model.encoder_params.normalize=False" in caplog.text


def test_tokens_instead_of_a_grid(golden, assert_close):
    images = load_io(golden, "ema_vq_2d")["images_main"]
    module, variables = build(golden, "ema_vq_2d")
    flat, _ = build(golden, "ema_vq_2d", reshape_to_2d=False, quantize_before_reshape=True)
    latent, tokens = (call(m, variables, "encode", images) for m in (module, flat))
    assert tokens.shape == (2, 16, 32)
    assert_close(tokens.reshape(latent.shape), latent, 1e-6)
    assert_close(call(flat, variables, "decode", tokens), call(module, variables, "decode", latent), 1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("neighbors", [0, 2])
def test_a_share_of_the_codes_is_replaced(golden, neighbors):
    """Up to the largest share, of all images; other latents are those of their codes, and gradients unchanged."""
    module, variables = build(golden, "ema_vq_2d")
    variables = jax.tree.map(jnp.asarray, variables)
    indices = jax.random.randint(jax.random.key(1), (64, 8, 8), 0, module.quantizer.num_embeddings)
    z = module.apply(variables, indices, method=lambda model, x: model.quantizer.lookup(x))

    @functools.partial(jax.jit, static_argnums=1)
    def replace(z, share, key):
        quantized = Quantized(z, indices, 0.0, {})
        return module.apply(variables, quantized, share, neighbors, method="replace_codes", rngs={"noise": key})

    for largest in (0.25, 1.0):
        replaced = replace(z, largest, jax.random.key(0))
        np.testing.assert_array_equal(replaced, replace(z, largest, jax.random.key(0)))
        shares = np.any(replaced != z, axis=-1).mean((1, 2))
        assert shares.max() <= largest
        np.testing.assert_allclose(np.quantile(shares / largest, (0.05, 0.5, 0.95)), (0.05, 0.5, 0.95), atol=0.2)
    assert np.any(replaced != replace(z, 1.0, jax.random.key(1)))
    gradient = jax.grad(lambda z: jnp.sum(jnp.sin(replace(z, 1.0, jax.random.key(0)))))(z)
    np.testing.assert_allclose(gradient, np.cos(replaced), rtol=1e-6)
