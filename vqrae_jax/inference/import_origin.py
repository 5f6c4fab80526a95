"""A trained RAE or VQRAE of the PyTorch origin -> a model of ours."""

from collections.abc import Mapping
from typing import Any

from vqrae_jax import assembly
from vqrae_jax.config import ModelConfig
from vqrae_jax.models.vit import stack_blocks
from vqrae_jax.pretrained import origin, sources


def read_checkpoint(config: ModelConfig, path: str, weights: str = "ema") -> tuple[assembly.Assembly, dict[str, Any]]:
    """Reads a checkpoint of the origin.

    Args:
      config: the model as the origin's config describes it; the field names are the same.
      path: local file (.pt, .safetensors, .npz, .msgpack) or a file of a hub repository (owner/name/path/to/file).
      weights: "ema" or "model", of a training checkpoint; its codebook is always that of "model".

    Returns:
      The assembly, and {"params", "batch_stats"} as numpy arrays.

    Raises:
      PretrainedError: the file cannot be read, or is not a checkpoint of this model.
    """
    return convert(config, sources.read_state_dict(path, "--checkpoint"), weights, path)


def convert(
    config: ModelConfig, checkpoint: Mapping[str, Any], weights: str = "ema", source: str = "the checkpoint"
) -> tuple[assembly.Assembly, dict[str, Any]]:
    """The same, of a checkpoint in memory: a state dict, or {"model": ..., "ema": ...}, of numpy arrays."""
    built = assembly.assemble(config, weights=False)
    single = built
    if config.scan_layers:
        single = assembly.assemble(config.model_copy(update={"scan_layers": False}), built.latent_stats, weights=False)
    tensors = origin.select(checkpoint, weights, source)
    variables = origin.convert_checkpoint(
        tensors, config.encoder_cls, config.quantizer, assembly.shapes(single), source
    )
    if config.scan_layers:
        variables["params"]["decoder"] = stack_blocks(variables["params"]["decoder"])
    if built.latent_stats:
        variables["batch_stats"]["latent"] = built.latent_stats
    return built, variables
