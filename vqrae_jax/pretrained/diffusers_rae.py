"""Folders of diffusers' AutoencoderRAE: the PyTorch RAE under other names, with its encoder and latent statistics."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import families, readers, sources, tables

# Encoders by `encoder_type`: our family, and the fields of their config.json that AutoencoderRAE fixes.
ENCODERS = {
    "dinov2": ("Dinov2withNorm", {"model_type": "dinov2_with_registers", "image_size": 518}),
    "siglip2": ("SigLIP2wNorm", {"model_type": "siglip_vision_model", "image_size": 256}),
    "mae": ("MAEwNorm", {"model_type": "vit_mae", "image_size": 224}),
}
HEAD_WIDTH = 64  # of all attention heads of the encoder
GRID = 16  # the decoder's positions are those of a grid of this side, resampled to its own
EPS = 1e-5  # added to the standard deviation, and by us to the variance
DEFAULTS = {
    "encoder_type": "dinov2", "encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_num_hidden_layers": 12,
    "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048, "patch_size": 16, "encoder_input_size": 224, "num_channels": 3, "noise_tau": 0.0,
    "reshape_to_2d": True, "scaling_factor": 1.0,
}  # fmt: skip
BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")


def is_autoencoder(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is that of an AutoencoderRAE."""
    return config.get("_class_name") == "AutoencoderRAE"


def read_folder(folder: pathlib.Path, field: str) -> tuple[dict[str, Any], readers.Tensors]:
    """Reads config.json, completed by the defaults of AutoencoderRAE, and the weights."""
    file, tensors = folder / "config.json", sources.read_weights(folder, field)
    try:
        config = families.complete(sources.read_json(file, field), DEFAULTS)
        if config["encoder_type"] not in ENCODERS or config["num_channels"] != 3 or config["scaling_factor"] <= 0:
            raise ValueError(f"expected encoder_type {', '.join(ENCODERS)}, 3 channels and a positive scaling_factor")
    except ValueError as error:
        raise WeightsError(f"{file} describes an AutoencoderRAE that is not supported: {error}", field=field) from None
    if missing := [name for name in BUFFERS if name not in tensors]:
        raise WeightsError(f"the weights of {folder} lack {', '.join(missing)}", field=field)
    return config, tensors


def describe(config: dict[str, Any], tensors: readers.Tensors) -> dict[str, Any]:
    """Returns the fields of a ModelConfig."""
    family, architecture = ENCODERS[config["encoder_type"]]
    architecture = architecture | {
        "hidden_size": config["encoder_hidden_size"], "patch_size": config["encoder_patch_size"],
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": config["encoder_hidden_size"] // HEAD_WIDTH,
        **{f"image_{name}": tensors[f"encoder_{name}"].astype(float).ravel().tolist() for name in ("mean", "std")},
    }  # fmt: skip
    names = ("encoder_input_size", "noise_tau", "reshape_to_2d")
    return {name: config[name] for name in names} | {
        "encoder_cls": family, "encoder_config_path": None, "encoder_params": {"architecture": architecture},
        "decoder_config_path": None, "decoder_patch_size": config["patch_size"], "quantizer": "none",
        "decoder_architecture": {name: config[name] for name in DEFAULTS if name.startswith("decoder_")},
    }  # fmt: skip


def rename(tensors: readers.Tensors, encoder_cls: str) -> readers.Tensors:
    """Returns the encoder and the decoder under the names of the PyTorch RAE; `tables.DECODER_TABLE` has both names."""
    family = families.FAMILIES[encoder_cls]
    prefix = tables.find_prefix(family.table, tensors)
    names = {family.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name: name for name in tensors}
    return readers.Renamed(tensors, {new: old for new, old in names.items() if old not in BUFFERS})


def latent_statistics(config: dict[str, Any], tensors: readers.Tensors, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns mean and variance of latents of the shape (h, w, C), channel last, so that ours are scaled as theirs."""
    deviation = (tensors["_latents_std"].astype(np.float64) + EPS) / config["scaling_factor"]
    values = {"mean": tensors["_latents_mean"], "var": deviation**2 - EPS}
    return {name: sources.broadcast_statistics(x, shape, config["reshape_to_2d"]) for name, x in values.items()}
