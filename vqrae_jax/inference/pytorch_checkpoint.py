"""Whole models read from and written as training checkpoints of the PyTorch VQRAE (and RAE)."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax.build.tokenizer import BuiltTokenizer, build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.pretrained import pytorch_vqrae, writers

# What the PyTorch VQRAE always does, by quantizer: the field and the values that mean the same here, the explicit one
# last.
FIXED = {
    "ema": {"quantizer_params.distance": (None, "l2"), "quantizer_params.codebook_dim": (None,)},
    "simvq": {
        "quantizer_params.distance": (None, "cosine"), "quantizer_params.input_projection": (True,),
        "quantizer_params.codebook_dim": (None,),
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


def build_checkpoint(config: ModelConfig, variables: Any, transformers: writers.Transformers = 4) -> dict[str, Any]:
    """Builds {"model": state dict, "ema": the same, ...}; refuses models that the PyTorch VQRAE cannot compute."""
    for name, values in {**FIXED.get(config.quantizer, {}), "encoder_params.layers": ((-1,),)}.items():
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
    state = pytorch_vqrae.build_state_dict(
        {**variables, "params": params}, config.encoder_cls, config.quantizer, transformers,
        config.quantizer_params.levels,
    )  # fmt: skip
    absent = ("optimizer", "scheduler", "disc", "disc_optimizer", "disc_scheduler")
    return {"step": 0, "epoch": 0, "model": state, "ema": state} | dict.fromkeys(absent)
