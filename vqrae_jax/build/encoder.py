"""Builds the encoder that a model config names, and reads its pretrained weights."""

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vqrae_jax import sharding
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.pretrained import convert, families, sources, tables
from vqrae_jax.quantizers.fusion import LEARNED

_PATHS = ("dinov2_path", "dinov3_path", "model_name")  # fields of encoder_params that may name the weights
_OTHER = ("model_type", "rope_theta", "image_mean", "image_std")  # fields of an architecture without a default


def build_encoder(config: ModelConfig, mesh: Mesh | None = None) -> tuple[Encoder, dict[str, Any] | None]:
    """Builds the encoder and reads its pretrained parameters, which are None for an encoder that starts random."""
    encoder, folder = describe_encoder(config, mesh)
    return encoder, None if folder is None else read_encoder(config, encoder, folder)


def describe_encoder(config: ModelConfig, mesh: Mesh | None = None) -> tuple[Encoder, pathlib.Path | None]:
    """Builds the encoder, to run on `mesh`; also returns the folder of its weights, None if it starts random."""
    params, family = config.encoder_params, families.FAMILIES[config.encoder_cls]
    if config.encoder_config_path is None:
        field = "model.encoder_params.architecture"
        if "hidden_size" not in params.architecture:
            message = "must have hidden_size, num_hidden_layers, ... (as config.json) for a random encoder"
            raise ConfigError(message, field=field, value=params.architecture)
        description = {"model_type": family.model_types[0], **params.architecture}
        statistics = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | params.architecture
        folder, (mean, std) = None, sources.parse_image_statistics(statistics, "the architecture", field)
    else:
        if params.architecture:
            message = "is only for an encoder without pretrained weights (model.encoder_config_path=None)"
            raise ConfigError(message, field="model.encoder_params.architecture", value=params.architecture)
        path, field = weights_source(config)
        folder = sources.fetch_folder(path, field)
        description = sources.read_config(folder, field)
        mean, std = sources.read_image_statistics(folder, field)
    model_type = description["model_type"]
    if model_type not in family.model_types:
        fitting = [name for name, other in families.FAMILIES.items() if model_type in other.model_types]
        remedy = f"set model.encoder_cls={fitting[0]!r}" if fitting else "no model.encoder_cls reads it"
        source = config.encoder_config_path or "the architecture"
        message = f"reads {' or '.join(family.model_types)}, but {source} is a {model_type!r}: {remedy}"
        raise ConfigError(message, field="model.encoder_cls", value=config.encoder_cls)
    check_names("model.encoder_params.architecture", params.architecture, (*_OTHER, *families.DEFAULTS[model_type]))
    fields = families.describe(family, description, config.encoder_config_path or "encoder_params.architecture")
    blocks = BlocksConfig(
        **fields.pop("blocks"), dtype=config.dtype, attention=config.attention,
        shard_activations=activation_sharding(mesh),
    )  # fmt: skip
    vit, size = ViTConfig(blocks=blocks, **fields), config.encoder_input_size
    if not params.layers:
        raise ConfigError("must name at least one block; -1 is the last", field="model.encoder_params.layers", value=())
    check_layers("model.encoder_params.layers", params.layers, blocks)
    if size % vit.patch:
        patch, low = vit.patch, size - size % vit.patch
        message = f"must be a multiple of {patch} (the encoder's patch size); the nearest are {low} and {low + patch}"
        raise ConfigError(message, field="model.encoder_input_size", value=size)
    fusion = "concat" if params.fusion in LEARNED else params.fusion  # `Fused` combines the layers
    return Encoder(vit, size, mean, std, params.normalize, params.layers, fusion), folder


def read_encoder(config: ModelConfig, encoder: Encoder, folder: pathlib.Path) -> dict[str, Any]:
    """Reads the pretrained parameters of an encoder, float32 numpy arrays, from the folder of `describe_encoder`."""
    image = jax.ShapeDtypeStruct((1, encoder.input_size, encoder.input_size, 3), jnp.float32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    family, (_, field) = families.FAMILIES[config.encoder_cls], weights_source(config)
    state, optional = sources.read_weights(folder, field), ("norm/scale", "norm/bias")
    prefix = tables.find_prefix(family.table, state)
    return convert.convert(state, family.table, shapes, optional, source=str(folder), prefix=prefix)


def weights_source(config: ModelConfig) -> tuple[str | None, str]:
    """Returns the path of the weights and its field; as in the PyTorch VQRAE, encoder_params may name them."""
    for name in _PATHS:
        if config.encoder_config_path and (path := getattr(config.encoder_params, name)):
            return path, f"model.encoder_params.{name}"
    return config.encoder_config_path, "model.encoder_config_path"


def replace_encoder(config: ModelConfig, path: str | None, architecture: dict[str, Any] | None = None) -> ModelConfig:
    """Returns the config with the weights' path or, if that is None, the architecture of another source."""
    params = config.encoder_params.model_copy(update=dict.fromkeys(_PATHS) | {"architecture": architecture or {}})
    return config.model_copy(update={"encoder_config_path": path, "encoder_params": params})


def inline_encoder(config: ModelConfig) -> ModelConfig:
    """Returns the config of the same encoder with its architecture in place of its path, to be stored with weights."""
    path, field = weights_source(config)
    if path is None:
        return config
    folder = sources.fetch_folder(path, field)
    description = sources.read_config(folder, field)
    if "vision_config" in description:  # next to a text tower
        description = description["vision_config"] | {"model_type": "siglip_vision_model"}
    description = families.complete(description)
    mean, std = sources.read_image_statistics(folder, field)
    names = (*_OTHER, *families.DEFAULTS[description["model_type"]])
    fields = {name: description[name] for name in names if name in description}
    return replace_encoder(config, None, fields | {"image_mean": mean, "image_std": std})


def check_names(field: str, architecture: dict[str, Any], accepted: Iterable[str]) -> None:
    """Raises ConfigError if an architecture has fields that nothing reads."""
    if unknown := sorted(architecture.keys() - set(accepted)):
        message = f"has unknown fields {', '.join(unknown)}; accepted are {', '.join(sorted(accepted))}"
        raise ConfigError(message, field=field, value=architecture)


def check_layers(field: str, layers: tuple[int, ...], blocks: BlocksConfig) -> None:
    """Raises ConfigError if the network lacks one of the blocks."""
    if any(not -blocks.depth <= layer < blocks.depth for layer in layers):
        raise ConfigError(f"the network has blocks 0 to {blocks.depth - 1}", field=field, value=layers)


def activation_sharding(mesh: Mesh | None, free: bool = False) -> Callable[[jax.Array], jax.Array] | None:
    """Returns the function that keeps tokens split over the data axes of the mesh, for `BlocksConfig`.

    With `free`, the compiler may split other axes over "model", as the logits of large codebooks.
    """
    return None if mesh is None else functools.partial(sharding.pin_batch, mesh=mesh, free=free)
