"""Configs of released pairings have exactly the parameters of the PyTorch models.

parameter_counts.json was recorded from transformers 5.23: "used" counts what encodes an image, so not the mask token,
SigLIP's pooling head, and the scale and bias of the last norm; decoders are ViTMAEDecoder for "size,latent width,grid"
(its mask token corresponds to the cls token of the PyTorch VQRAE).
"""

import functools
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import Config, from_dict
from vqrae_jax.pretrained import families, tables
from vqrae_jax.pretrained.layout import file_shape, unstack_blocks
from vqrae_jax.pretrained.released import ARCHITECTURES

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RECORDED = json.loads((pathlib.Path(__file__).parent / "parameter_counts.json").read_text())
TRAINING = ["dinov2_s", "dinov2_b", "dinov2_l", "dinov3_b", "dinov3_l", "siglip2_b", "siglip2_l", "mae_b"]
PAIRINGS = [f"{decoder},{pixels}" for decoder in ("ViT-B", "ViT-L", "ViT-XL") for pixels in (256, 512)]
RELEASED = [("rae_dinov2_b", "256"), ("rae_dinov2_b", "512"), ("rae_siglip2_b", None), ("rae_mae_b", None)]


def load(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_dict(Config, module.get_config(*arguments).to_dict())


def build_without_hub(config):
    """Builds the modules of a config with the recorded architecture of the encoder."""
    architecture = ARCHITECTURES[config.model.encoder_config_path]
    params = config.model.encoder_params.model_copy(update={"architecture": architecture})
    changes = {"encoder_config_path": None, "encoder_params": params}
    changes |= {"pretrained_decoder_path": None, "normalization_stat_path": None}
    return build_tokenizer(config.model.model_copy(update=changes), weights=False)


@functools.cache
def count(module, shape):
    """Counts the parameters of a module that takes one array; pairings share encoders and decoders."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def check(config, pairing):
    decoder, pixels = pairing.split(",")
    pixels, built = int(pixels), build_without_hub(config)
    encoder, grid = built.module.encoder, pixels // 16
    assert (built.image_size, config.data.image_size, encoder.grid) == (pixels, pixels, grid)
    recorded = RECORDED["encoders"][config.model.encoder_config_path]["used"]
    assert count(encoder, (1, pixels, pixels, 3)) == recorded
    latent = (1, grid, grid, encoder.channels)
    assert count(built.module.decoder, latent) == RECORDED["decoders"][f"{decoder},{encoder.channels},{grid}"]


@pytest.mark.parametrize("name", TRAINING)
def test_training_configs(name):
    for pairing in PAIRINGS:
        check(load(name, pairing), pairing)
    assert load(name) == load(name, "ViT-XL,256")


@pytest.mark.parametrize(("name", "pixels"), RELEASED)
def test_released_autoencoders(name, pixels):
    config = load(name, *([pixels] if pixels else []))
    check(config, f"ViT-XL,{pixels or 256}")
    assert config.model.quantizer == "none"
    for path in (config.model.pretrained_decoder_path, config.model.normalization_stat_path):
        assert path.startswith("nyu-visionx/RAE-collections/")


def linear(name, wide, high):
    return {f"{name}.weight": (high, wide), f"{name}.bias": (high,)}


def affine(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_decoder():
    """Names and shapes of decoders/dinov2/wReg_base/ViTXL_n08/model.pt."""
    state = {"decoder_pos_embed": (1, 257, 1152), "trainable_cls_token": (1, 1, 1152)}
    state |= linear("decoder_embed", 768, 1152) | affine("decoder_norm", 1152) | linear("decoder_pred", 1152, 768)
    for i in range(28):
        block = f"decoder_layers.{i}."
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            state |= linear(f"{block}attention.{name}", 1152, 1152)
        state |= linear(f"{block}intermediate.dense", 1152, 4096) | linear(f"{block}output.dense", 4096, 1152)
        state |= affine(f"{block}layernorm_before", 1152) | affine(f"{block}layernorm_after", 1152)
    return state


def published_encoder():
    """Names and shapes of facebook/dinov2-with-registers-base/model.safetensors."""
    state = {
        "embeddings.cls_token": (1, 1, 768), "embeddings.mask_token": (1, 768),
        "embeddings.register_tokens": (1, 4, 768), "embeddings.position_embeddings": (1, 1370, 768),
        "embeddings.patch_embeddings.projection.weight": (768, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (768,), **affine("layernorm", 768),
    }  # fmt: skip
    for i in range(12):
        block = f"encoder.layer.{i}."
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            state |= linear(f"{block}attention.{name}", 768, 768)
        state |= linear(f"{block}mlp.fc1", 768, 3072) | linear(f"{block}mlp.fc2", 3072, 768)
        state |= affine(f"{block}norm1", 768) | affine(f"{block}norm2", 768)
        state |= {f"{block}layer_scale1.lambda1": (768,), f"{block}layer_scale2.lambda1": (768,)}
    return state


@pytest.mark.parametrize(
    ("part", "published", "table", "entries"),
    [
        ("decoder", published_decoder(), tables.DECODER_TABLE, 456),
        ("encoder", published_encoder(), families.FAMILIES["Dinov2withNorm"].table, 224),
    ],
)
def test_released_files_fill_the_model(part, published, table, entries):
    """The tensors of the published files, by name and shape, fill every leaf of the model, and all are used."""
    config = load("rae_dinov2_b", "256")
    affine_norm = config.model.encoder_params.model_copy(update={"normalize": False})
    model = config.model.model_copy(update={"encoder_params": affine_norm})
    config = config.model_copy(update={"model": model})
    shapes = flatten_dict(variable_shapes(build_without_hub(config))["params"][part], sep="/")
    arrays = unstack_blocks({path: np.empty(leaf.shape, bool) for path, leaf in shapes.items()})
    expected = {path: file_shape(path, array.shape) for path, array in arrays.items()}
    assert len(published) == entries
    filled = {}
    for name, shape in published.items():
        row, paths = tables.find_row(table, name)
        assert paths or row.path is None, name
        filled |= dict.fromkeys(paths, shape)
    assert filled == expected


def test_every_config_is_valid():
    for path in CONFIGS.glob("*.py"):
        load(path.stem)
