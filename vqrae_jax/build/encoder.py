"""Builds the pretrained encoder that a config names, and reads its weights."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from vqrae_jax.models.vit import BlocksConfig, Spread, ViTConfig
from vqrae_jax.pretrained import convert, families, sources


def activation_spread(mesh: Mesh | None) -> Spread:
    """Batches are split over the mesh's data axes, heads over "model"."""
    if mesh is None:
        return Spread()
    return Spread(functools.partial(sharding.pin_batch, mesh=mesh), functools.partial(sharding.per_device, mesh=mesh))


def build_encoder(config: ModelConfig, mesh: Mesh | None = None) -> tuple[Encoder, dict[str, Any] | None]:
    """The encoder that the config names, and its pretrained parameters; None where they start random."""
    encoder, folder = describe_encoder(config, mesh)
    image = jax.ShapeDtypeStruct((1, config.encoder_input_size, config.encoder_input_size, 3), jnp.float32)
    want = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    return encoder, None if folder is None else read_encoder(config, want, folder)


def describe_encoder(config: ModelConfig, mesh: Mesh | None) -> tuple[Encoder, pathlib.Path | None]:
    """The encoder and the folder of its weights, None where they start random."""
    params = config.encoder_params
    family = families.FAMILIES[config.encoder_cls]
    if config.encoder_config_path is None:
        if "hidden_size" not in params.architecture:
            raise ConfigError(
                "model.encoder_config_path is None, so the encoder starts from random weights and its architecture "
                "must be in model.encoder_params.architecture (hidden_size, num_hidden_layers, ... as in config.json)"
            )
        description = sources.complete_config(
            {"model_type": family.model_types[0], **params.architecture}, "model.encoder_params.architecture"
        )
        folder, (mean, std) = None, (IMAGENET_MEAN, IMAGENET_STD)
    else:
        if params.architecture:
            raise ConfigError(
                "model.encoder_params.architecture is only for an encoder without pretrained weights: "
                "set model.encoder_config_path=None or leave architecture empty"
            )
        path, field = _weights_source(config)
        folder = sources.fetch_folder(path, field)
        description = sources.read_config(folder, field)
        mean, std = sources.read_image_statistics(folder, field)
    if description["model_type"] not in family.model_types:
        fitting = [name for name, other in families.FAMILIES.items() if description["model_type"] in other.model_types]
        remedy = f": set model.encoder_cls={fitting[0]!r}" if fitting else ", which no model.encoder_cls reads"
        raise ConfigError(
            f"model.encoder_cls={config.encoder_cls!r} reads {' or '.join(family.model_types)}, but "
            f"{config.encoder_config_path or 'architecture'} is a {description['model_type']!r}{remedy}"
        )
    fields = families.describe(family, description, config.encoder_config_path or "encoder_params.architecture")
    blocks = BlocksConfig(
        **fields.pop("blocks"), dtype=config.dtype, attention=config.attention, spread=activation_spread(mesh)
    )
    if not params.layers:
        raise ConfigError("model.encoder_params.layers=(): name at least one block, -1 is the last")
    check_layers("model.encoder_params.layers", params.layers, blocks)
    vit = ViTConfig(blocks=blocks, **fields)
    if config.encoder_input_size % vit.patch:
        patch, size = vit.patch, config.encoder_input_size
        raise ConfigError(
            f"model.encoder_input_size={size} is not divisible by the encoder's patch size {patch}; "
            f"the nearest sizes are {size // patch * patch} and {(size // patch + 1) * patch}"
        )
    return Encoder(vit, config.encoder_input_size, mean, std, params.normalize, params.layers, params.fusion), folder


def _weights_source(config: ModelConfig) -> tuple[str, str]:
    """The origin names the weights in encoder_params and the image processor in encoder_config_path; often the same."""
    for name in ("dinov2_path", "dinov3_path", "model_name"):
        if path := getattr(config.encoder_params, name):
            return path, f"model.encoder_params.{name}"
    return config.encoder_config_path, "model.encoder_config_path"


def check_layers(field: str, layers: tuple[int, ...], blocks: BlocksConfig) -> None:
    """Raises ConfigError if the encoder lacks one of the layers."""
    if any(not -blocks.depth <= layer < blocks.depth for layer in layers):
        raise ConfigError(f"{field}={layers}: the encoder has blocks 0 to {blocks.depth - 1}")


def read_encoder(config: ModelConfig, want: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Reads the encoder's weights onto the tree of shapes `want`."""
    field, family = _weights_source(config)[1], families.FAMILIES[config.encoder_cls]
    return convert.convert(
        sources.read_weights(folder, field), family.table, want,
        optional=("norm/scale", "norm/bias"), source=str(folder), prefix=family.tower,
    )  # fmt: skip
