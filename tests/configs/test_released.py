"""Configs of released pairings have exactly the parameters of the PyTorch models.

parameter_counts.json was recorded from transformers 5.23: "used" counts what encodes an image, so not the mask token,
SigLIP's pooling head, and the scale and bias of the last norm; decoders are ViTMAEDecoder for "size,latent width,grid"
(its mask token stands for the origin's cls token).
"""

import functools
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from vqrae_jax import assembly
from vqrae_jax.config import Config, ConfigError, from_dict

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
    """The config's modules, with the encoder's architecture as recorded from the hub's config.json."""
    architecture = RECORDED["encoders"][config.model.encoder_config_path]["architecture"]
    params = config.model.encoder_params.model_copy(update={"architecture": architecture})
    changes = {"encoder_config_path": None, "encoder_params": params}
    changes |= {"pretrained_decoder_path": None, "normalization_stat_path": None}
    return assembly.assemble(config.model.model_copy(update=changes), weights=False)


@functools.cache
def count(module, shape):
    """Parameters of a module that takes one array; pairings share their halves."""
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


def test_every_config_of_the_folder_is_valid():
    names = {path.stem for path in CONFIGS.glob("*.py")}
    assert names.issuperset(TRAINING)
    for name in names:
        load(name)


@pytest.mark.parametrize("text", ["ViT-XL", "ViT-XL,", ",256", "ViT-XL,0", "ViT-XL,200", "ViT-XL,big"])
def test_a_bad_argument_says_what_is_meant(text):
    with pytest.raises(ConfigError, match=r"--config.*ViT-XL,256"):
        load("dinov2_b", text)


def test_a_size_without_a_released_decoder():
    with pytest.raises(ConfigError, match=r"'384'.*256 and 512"):
        load("rae_dinov2_b", "384")
