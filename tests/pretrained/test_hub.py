"""Weights of the hub against public numbers; runs only with --network.

The numbers are a corner of the last hidden state that the public tests of transformers record for one photograph. The
photograph and the numbers are not part of this project.
"""

import json
import os
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest

from vqrae_jax.build.tokenizer import build_tokenizer
from vqrae_jax.config import ModelConfig
from vqrae_jax.pretrained import convert, families, sources, tables

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "real"
HUB = {  # id -> family and the side in pixels at which the numbers were recorded
    "facebook/dinov2-base": ("Dinov2withNorm", 224),
    "facebook/dinov2-with-registers-base": ("Dinov2withNorm", 224),
    "facebook/dinov2-with-registers-small": ("Dinov2withNorm", 224),
    "facebook/dinov2-with-registers-large": ("Dinov2withNorm", 224),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("Dinov3withNorm", 256),
    "google/siglip2-base-patch16-256": ("SigLIP2wNorm", 256),
    "google/siglip2-large-patch16-256": ("SigLIP2wNorm", 256),
    "google/siglip-base-patch16-224": ("SigLIP2wNorm", 224),
    "facebook/vit-mae-base": ("MAEwNorm", 224),
}
pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def load(name, normalize):
    family, size = HUB[name]
    return build_tokenizer(ModelConfig(
        encoder_cls=family, encoder_config_path=name, encoder_params={"normalize": normalize}, encoder_input_size=size,
        decoder_config_path="ViT-S",
    ))  # fmt: skip


def preprocessed(file, crop=224, short_side=256):
    """Preprocesses like DINOv2's image processor: short side to 256 pixels by PIL's bicubic, central 224."""
    with PIL.Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = short_side / min(image.size)
    image = image.resize([int(n * scale) for n in image.size], PIL.Image.Resampling.BICUBIC)
    left, top = ((n - crop) // 2 for n in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32)[None] / 255


def last_hidden_state(built, image):
    """All tokens after the affine last norm, with cls and registers, which the encoder itself does not return."""
    encoder, params = built.module.encoder, built.pretrained["encoder"]
    _, captured = jax.jit(lambda p, x: encoder.apply({"params": p}, x, capture_intermediates=True))(params, image)
    last = f"block{encoder.vit.blocks.depth - 1:02d}"
    tokens = np.asarray(captured["intermediates"]["vit"][last]["__call__"][0])
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + encoder.vit.blocks.norm_eps)
    return normed * params["norm"]["scale"] + params["norm"]["bias"]


@pytest.mark.parametrize("name", HUB)
def test_every_tensor_of_the_hub_file_is_known(name):
    """Strict loading: nothing missing, nothing unexpected; and features are finite and of variance 1."""
    if "dinov3" in name and not os.environ.get("HF_TOKEN"):
        pytest.skip("DINOv3 needs a login: set HF_TOKEN")
    built = load(name, normalize=True)
    size = HUB[name][1]
    image = np.random.default_rng(0).uniform(size=(1, size, size, 3)).astype(np.float32)
    features = np.asarray(jax.jit(built.module.encoder.apply)({"params": built.pretrained["encoder"]}, image))
    np.testing.assert_allclose(features.var(-1), 1, atol=1e-2)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the recorded numbers are not at {REAL}")
@pytest.mark.parametrize("name", ["facebook/dinov2-base", "facebook/dinov2-with-registers-base"])
def test_features_equal_the_public_numbers(name):
    expected = json.loads((REAL / "hub_expected_slices.json").read_text())[name]
    hidden = last_hidden_state(load(name, normalize=False), preprocessed(REAL / "coco_000000039769.png"))
    assert list(hidden.shape) == expected["shape"]
    np.testing.assert_allclose(hidden[0, :3, :3], expected["slice"], atol=10 * expected["atol"])


def test_released_decoder_and_statistics():
    pytest.importorskip("torch", reason="the released files are PyTorch's")
    repository = "nyu-visionx/RAE-collections"
    path = f"{repository}/stats/dinov2/wReg_base/imagenet1k/stat.pt"
    stats = sources.read_latent_statistics(path, "field", (16, 16, 768))
    assert stats["var"].shape == (16, 16, 768)
    built = build_tokenizer(ModelConfig(
        encoder_config_path="facebook/dinov2-with-registers-base", decoder_config_path="ViT-XL", quantizer="none",
        pretrained_decoder_path=f"{repository}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
    ))  # fmt: skip
    assert set(built.pretrained) == {"encoder", "decoder"}


def test_text_tower_is_skipped():
    """SigLIP's file has twice the tensors of its vision tower."""
    folder = sources.fetch_folder("google/siglip-base-patch16-224", "field")
    tensors = sources.read_weights(folder, "field")
    built = load("google/siglip-base-patch16-224", normalize=False)
    family = families.FAMILIES["SigLIP2wNorm"]
    prefix = tables.find_prefix(family.table, tensors)
    tree = convert.convert(tensors, family.table, built.pretrained["encoder"], prefix=prefix)
    assert len(jax.tree.leaves(tree)) < len(tensors) / 2
