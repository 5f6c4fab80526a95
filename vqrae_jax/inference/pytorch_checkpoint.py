"""Whole models read from and written as training checkpoints of the PyTorch VQRAE (and RAE)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax.build.tokenizer import BuiltTokenizer, build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.pretrained import pytorch_vqrae, sources, writers

# What the quantizers of the PyTorch VQRAE always do, by quantizer: the field and the values that mean the same here,
# the explicit one last.
FIXED = {
    "ema": {"distance": (None, "l2"), "codebook_dim": (None,)},
    "simvq": {"distance": (None, "cosine"), "input_projection": (True,), "codebook_dim": (None,)},
    "fsq": {"adapter": ("mlp",)},
}


def read_checkpoint(config: ModelConfig, path: str, weights: str = "ema") -> tuple[BuiltTokenizer, dict[str, Any]]:
    """Reads a checkpoint of the PyTorch VQRAE.

    Args:
      config: the model section; its fields have the names of the PyTorch VQRAE's config.
      path: local file (.pt, .safetensors, .npz, .msgpack) or a file of a hub repository (owner/name/path/to/file).
      weights: "ema" or "model", for a training checkpoint; the codebook is always that of "model".

    Returns:
      The built tokenizer, and {"params", "batch_stats"} as numpy arrays.

    Raises:
      WeightsError: the file cannot be read, or is not a checkpoint of this model.
    """
    return convert_checkpoint(config, sources.read_state_dict(path, "--checkpoint"), weights, path)


def convert_checkpoint(
    config: ModelConfig, checkpoint: Mapping[str, Any], weights: str = "ema", source: str = "the checkpoint"
) -> tuple[BuiltTokenizer, dict[str, Any]]:
    """Converts a checkpoint in memory: a state dict, or {"model": ..., "ema": ...}, of numpy arrays.

    Args and results are those of `read_checkpoint`; `source` names the checkpoint in messages.
    """
    built = build_tokenizer(config, weights=False)
    tensors = pytorch_vqrae.select_state_dict(checkpoint, weights, source)
    variables = pytorch_vqrae.convert_state_dict(
        tensors, config.encoder_cls, config.quantizer, variable_shapes(built), source
    )
    if built.latent_stats:
        variables["batch_stats"]["latent"] = built.latent_stats
    return built, variables


def build_checkpoint(config: ModelConfig, variables: Any, transformers: writers.Transformers = 4) -> dict[str, Any]:
    """Builds the training checkpoint of a model: {"model": state dict, "ema": the same, ...}.

    Raises:
      ConfigError: the PyTorch VQRAE has no such model, or computes other values.
    """
    _check_representable(config)
    variables = jax.tree.map(np.asarray, variables)
    params = dict(variables["params"])
    # The head that predicts encoder features serves training only; the PyTorch VQRAE has none.
    params["decoder"] = {n: tree for n, tree in params["decoder"].items() if n != "features"}
    state = pytorch_vqrae.build_state_dict(
        {**variables, "params": params}, config.encoder_cls, config.quantizer, transformers,
        config.quantizer_params.levels,
    )  # fmt: skip
    absent = ("optimizer", "scheduler", "disc", "disc_optimizer", "disc_scheduler")
    return {"step": 0, "epoch": 0, "model": state, "ema": state} | dict.fromkeys(absent)


def _check_representable(config: ModelConfig) -> None:
    for name, values in FIXED.get(config.quantizer, {}).items():
        value = getattr(config.quantizer_params, name)
        if value not in values:
            raise ConfigError(
                f"the {config.quantizer} quantizer of the PyTorch VQRAE always has {values[-1]!r}, so it cannot hold "
                "this model; export as safetensors or stablehlo",
                field=f"model.quantizer_params.{name}", value=value,
            )  # fmt: skip
    if config.encoder_params.layers != (-1,):
        raise ConfigError(
            "the encoders of the PyTorch VQRAE return only their last layer, so it cannot hold this model; export as "
            "safetensors or stablehlo",
            field="model.encoder_params.layers", value=config.encoder_params.layers,
        )  # fmt: skip
