"""Whole models read from and written as training checkpoints of the PyTorch VQRAE (and RAE), or read from diffusers."""

import collections
import logging
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax.build.tokenizer import BuiltTokenizer, build_tokenizer, diffusers_positions, variable_shapes
from vqrae_jax.config import ModelConfig, from_dict
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.pretrained import diffusers_rae, pytorch_vqrae, writers

log = logging.getLogger(__name__)

# What the PyTorch VQRAE always does, by quantizer: the field and the values that mean the same here, the explicit one
# last.
FIXED = {
    "ema": {"quantizer_params.distance": (None, "l2"), "quantizer_params.codebook_dim": (None,)},
    "simvq": {
        "quantizer_params.distance": (None, "cosine"), "quantizer_params.codebook_dim": (None,),
        "quantizer_params.bridge_group": (0,),
    },
    "fsq": {"quantizer_params.adapter": ("mlp",)},
}  # fmt: skip


def convert_checkpoint(
    config: ModelConfig, checkpoint: Mapping[str, Any], weights: str = "ema", source: str = "the checkpoint"
) -> tuple[BuiltTokenizer, dict[str, Any]]:
    """Converts a checkpoint of the PyTorch VQRAE.

    Args:
      config: the model section; its fields have the names of the PyTorch VQRAE's config.
      checkpoint: a state dict, or {"model": state dict, "ema": state dict}, of numpy arrays.
      weights: "ema" or "model", for a training checkpoint; see `select_state_dict` for the codebook.
      source: what names the checkpoint in messages.

    Returns:
      The built tokenizer, and {"params", "batch_stats"} as numpy arrays.
    """
    built = build_tokenizer(config, weights=False)
    tensors = pytorch_vqrae.select_state_dict(checkpoint, weights, source)
    variables = pytorch_vqrae.convert_state_dict(
        tensors, config.encoder_cls, config.quantizer, variable_shapes(built), source
    )
    if built.latent_stats:
        variables["batch_stats"]["latent"] = built.latent_stats
    return built, variables


def combine_pretrained(config: ModelConfig) -> tuple[ModelConfig, BuiltTokenizer, dict[str, Any]]:
    """Makes a continuous autoencoder of the pretrained encoder, decoder and latent statistics that a config names.

    Returns:
      The model section without the quantizer, the built model, and {"params", "batch_stats"} as numpy arrays.
    """
    config = config.model_copy(update={"quantizer": "none"})
    if config.encoder_config_path is None:
        raise ConfigError("a decoder needs its encoder: set a hub id or a folder", field="model.encoder_config_path")
    built = build_tokenizer(config)
    stats = {"latent": built.latent_stats} if built.latent_stats else {}
    return config, built, {"params": built.pretrained, "batch_stats": stats}


def is_decoder(checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint has a decoder and no encoder, as the releases of RAE."""
    parts = [checkpoint[name] for name in ("model", "ema") if isinstance(checkpoint.get(name), Mapping)]
    names = [name for part in parts or [checkpoint] for name in part]
    return bool(names) and not any("encoder." in name for name in names)


def describe_diffusers(folder: pathlib.Path, field: str) -> ModelConfig:
    """Returns the model section of a folder of diffusers' AutoencoderRAE, a continuous autoencoder."""
    return from_dict(ModelConfig, diffusers_rae.describe(*diffusers_rae.read_folder(folder, field)))


def convert_diffusers(folder: pathlib.Path, field: str) -> dict[str, Any]:
    """Converts the weights of such a folder to {"params", "batch_stats"}, numpy arrays."""
    config, tensors = diffusers_rae.read_folder(folder, field)
    model = from_dict(ModelConfig, diffusers_rae.describe(config, tensors))
    built = build_tokenizer(model)
    shapes, encoder = variable_shapes(built), built.module.encoder
    positions = diffusers_positions(shapes["params"]["decoder"])
    # A table that is stored, by early versions of diffusers, is the one that the decoder was trained with.
    defaults = {"decoder.decoder_pos_embed": positions}
    state = collections.ChainMap(diffusers_rae.rename(tensors, model.encoder_cls), defaults)
    variables = pytorch_vqrae.convert_state_dict(state, model.encoder_cls, model.quantizer, shapes, str(folder))
    if not np.allclose(variables["params"]["decoder"]["pos_embed"], positions, atol=1e-4):
        log.warning("%s: its position table is used; current versions of diffusers ignore it", folder)
    try:
        shape = (encoder.grid, encoder.grid, encoder.channels)
        variables["batch_stats"]["latent"] = diffusers_rae.latent_statistics(config, tensors, shape)
    except ValueError as error:
        raise WeightsError(f"the latent statistics of {folder} do not fit its latents: {error}", field=field) from None
    return variables


def build_checkpoint(config: ModelConfig, variables: Any, transformers: writers.Transformers = 4) -> dict[str, Any]:
    """Builds {"model": state dict, "ema": the same, ...}; refuses models that the PyTorch VQRAE cannot compute."""
    always = {
        "encoder_params.layers": ((-1,),), "encoder_params.fusion": ("sum", "concat", "mean"),
        "decoder_head": ("linear",), "resampler_tokens": (0,),
    }  # fmt: skip
    for name, values in (FIXED.get(config.quantizer, {}) | always).items():
        value = operator.attrgetter(name)(config)
        if value not in values:
            raise ConfigError(
                f"the PyTorch VQRAE always has {values[-1]!r} (with the quantizer {config.quantizer}), so it cannot "
                "hold this model; export as safetensors or stablehlo",
                field=f"model.{name}", value=value,
            )  # fmt: skip
    variables = jax.tree.map(np.asarray, variables)
    params = dict(variables["params"])
    # The head that predicts encoder features serves training only; the PyTorch VQRAE has none.
    params["decoder"] = {n: tree for n, tree in params["decoder"].items() if n != "features"}
    if config.quantizer == "simvq" and not config.quantizer_params.input_projection:  # PyTorch's cannot be left out
        channels = variables["batch_stats"]["quantizer"]["codebook"].shape[1]
        identity = {"kernel": np.eye(channels, dtype=np.float32), "bias": np.zeros(channels, np.float32)}
        params["quantizer"] = {**params["quantizer"], "input_projection": identity}
    state = pytorch_vqrae.build_state_dict(
        {**variables, "params": params}, config.encoder_cls, config.quantizer, transformers,
        config.quantizer_params.levels,
    )  # fmt: skip
    absent = ("optimizer", "scheduler", "disc", "disc_optimizer", "disc_scheduler")
    return {"step": 0, "epoch": 0, "model": state, "ema": state} | dict.fromkeys(absent)
