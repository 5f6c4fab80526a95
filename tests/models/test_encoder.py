"""Encoders equal PyTorch's, for every family."""

import json

import jax
import numpy as np
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.config import ModelConfig
from vqrae_jax.models.encoder import resample_to_input_size
from vqrae_jax.models.vit import ViT
from vqrae_jax.resize import resize

CASES = [
    "dinov2", "dinov2_with_registers", "dinov2_swiglu", "dinov2_with_registers_swiglu",
    "dinov3", "dinov3_gated", "siglip", "vit_mae",
]  # fmt: skip
# Positions are a table in one and rotations in the other.
POSITIONS = [n if n in ("dinov2", "dinov3") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


def load(folder, **encoder_params):
    """Builds the encoder of a hub folder for images of any size; returns it, its weights and the recorded settings."""
    params = json.loads((folder / "params.json").read_text())
    built = build_tokenizer(ModelConfig(
        encoder_cls=params["encoder_cls"] or "Dinov2withNorm", encoder_config_path=str(folder),
        encoder_params=encoder_params, encoder_input_size=params["image_size"], decoder_config_path="ViT-S",
    ))  # fmt: skip
    return built.module.encoder.clone(input_size=None), built.pretrained["encoder"], params


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_features_equal_pytorch(golden, assert_close, case, normalize):
    folder = golden / "encoders" / case
    encoder, weights, params = load(folder, normalize=normalize)
    io = np.load(folder / "io.npz")
    for height, width in params["input_sizes"]:
        size = f"{height}" if height == width else f"{height}x{width}"
        features = jax.jit(encoder.apply)({"params": weights}, io[f"images_{size}"])
        # DINOv3 in the PyTorch VQRAE keeps the affine norm: its `features` are the affine ones.
        plain = "features_noaffine" if case.startswith("dinov3") else "features"
        expected = io[f"{plain if normalize else 'features_affine'}_{size}"]
        assert_close(features.reshape(expected.shape), expected, 1e-5, f"{case} {size}")


@pytest.mark.parametrize("case", POSITIONS)
def test_hidden_states_equal_pytorch(golden, assert_close, case):
    folder = golden / "encoders" / case
    encoder, weights, params = load(folder)
    io = np.load(folder / "io.npz")
    size = params["input_sizes"][0][0]
    image = (io[f"images_{size}"] - np.asarray(encoder.mean)) / np.asarray(encoder.std)
    states, _ = jax.jit(ViT(encoder.vit).apply, static_argnums=2)(
        {"params": weights["vit"]}, image.astype(np.float32), tuple(range(encoder.vit.blocks.depth))
    )
    for i, state in enumerate(states):
        assert_close(state, io[f"hidden_states_{size}"][i + 1], 1e-5, f"block {i}")


def test_fusion_of_layers(golden, assert_close):
    folder = golden / "encoders" / "dinov2_with_registers"
    image = np.load(folder / "io.npz")["images_56"]

    def features(layers, fusion):
        encoder, weights, _ = load(folder, layers=layers, fusion=fusion)
        return np.asarray(jax.jit(encoder.apply)({"params": weights}, image)), encoder.channels

    first, last = (features((i,), "sum")[0] for i in (0, -1))
    for fusion, expected in (
        ("sum", first + last), ("mean", (first + last) / 2), ("concat", np.concatenate([first, last], -1)),
    ):  # fmt: skip
        fused, channels = features((0, -1), fusion)
        assert fused.shape[-1] == channels
        assert_close(fused, expected, 1e-6, fusion)


def test_bfloat16_is_near_float32(golden):
    folder = golden / "encoders" / "dinov2"
    decoder = {"decoder_config_path": "ViT-S", "dtype": "bfloat16"}
    built = build_tokenizer(ModelConfig(encoder_config_path=str(folder), encoder_input_size=56, **decoder))
    io = np.load(folder / "io.npz")
    features = jax.jit(built.module.encoder.apply)({"params": built.pretrained["encoder"]}, io["images_56"])
    assert features.dtype == jax.numpy.bfloat16
    error = np.asarray(features, np.float32).reshape(io["features_56"].shape) - io["features_56"]
    assert 1e-4 < np.sqrt((error**2).mean()) < 0.05


@pytest.mark.parametrize("case", POSITIONS)
def test_position_grid_is_resampled_once(golden, assert_close, case):
    """An encoder with a resampled grid equals the encoder that resamples in every call."""
    encoder, weights, params = load(golden / "encoders" / case)
    side = params["input_sizes"][0][0]
    encoder = encoder.clone(input_size=side)
    frozen, resampled = resample_to_input_size(encoder, weights)
    assert frozen.vit.grid in (0, side // encoder.vit.patch)
    assert ("pos_embed" in resampled["vit"]) == (frozen.vit.grid > 0)
    io = np.load(golden / "encoders" / case / "io.npz")
    features = jax.jit(frozen.apply)({"params": resampled}, io[f"images_{side}"])
    assert_close(features, jax.jit(encoder.apply)({"params": weights}, io[f"images_{side}"]), 1e-6)
    if (table := resampled["vit"].get("pos_embed")) is not None:
        assert (table.dtype, table.shape[1]) == (np.float32, frozen.vit.grid**2 + int(frozen.vit.cls))


@pytest.mark.parametrize(
    ("case", "shape"), [("dinov2_with_registers", (56, 84)), pytest.param("dinov3", (64, 96), marks=pytest.mark.slow)]
)
def test_proportions_are_kept_as_pytorch_encodes_rectangles(golden, assert_close, case, shape):
    folder = golden / "encoders" / case
    encoder, weights, _ = load(folder)
    kept, io = encoder.clone(input_size=min(shape), keep_proportions=True), np.load(folder / "io.npz")
    image = io["images_{}x{}".format(*shape)]
    expected = io["{}_{}x{}".format("features_noaffine" if case == "dinov3" else "features", *shape)]
    grid = tuple(side // encoder.vit.patch for side in shape)
    features = jax.jit(kept.apply)({"params": weights}, image)
    assert features.shape[1:3] == grid
    assert_close(features.reshape(expected.shape), expected, 1e-5)
    large = np.random.default_rng(0).uniform(size=(1, 100, 149, 3)).astype(np.float32)
    small = resize(large, *shape, "bicubic")
    upright = np.swapaxes(large, 1, 2)
    assert_close(
        jax.jit(kept.apply)({"params": weights}, large), jax.jit(encoder.apply)({"params": weights}, small), 1e-6
    )
    assert jax.eval_shape(kept.apply, {"params": weights}, upright).shape[1:3] == grid[::-1]
