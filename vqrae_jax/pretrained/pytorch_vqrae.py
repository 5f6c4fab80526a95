"""Checkpoints of the PyTorch VQRAE (and RAE): their names, and conversion to and from the variables of our model.

Its training writes {"model": state dict, "ema": state dict, "step": ..., ...}; its releases are bare state dicts.
Latent statistics and image means are in other files.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import writers
from vqrae_jax.pretrained.convert import convert
from vqrae_jax.pretrained.families import FAMILIES
from vqrae_jax.pretrained.readers import Renamed, unwrap
from vqrae_jax.pretrained.tables import DECODER_TABLE, Row, Table, dense_rows, find_prefix, nest_rows, norm_rows

log = logging.getLogger(__name__)

# Tables onto the variables, by the quantizer's name in the config.
QUANTIZER_TABLES: dict[str, Table] = {
    "none": [],
    "ema": [
        Row("quantizer.embedding", "batch_stats/quantizer/codebook"),
        Row("quantizer.ema_cluster_size", "batch_stats/quantizer/counts"),
        Row("quantizer.ema_w", "batch_stats/quantizer/sums"),
    ],
    "simvq": [
        Row("quantizer.embedding.weight", "batch_stats/quantizer/codebook"),
        *dense_rows("quantizer.embedding_proj", "params/quantizer/codebook_projection"),
        *dense_rows("quantizer.z_proj", "params/quantizer/input_projection"),
        Row("quantizer.l2_norm_scale", None, filler=(1.0, "")),  # only its sign has an effect
        Row("quantizer.ema_cluster_size", None, filler=(0.0, "K")),  # never updated
    ],
    "fsq": [
        Row("fsq_projection.post_gain", "params/quantizer/reduce/gain"),
        *norm_rows("fsq_projection.norm", "params/quantizer/reduce/norm"),
        *dense_rows("fsq_projection.net.0", "params/quantizer/reduce/hidden0"),
        *dense_rows("fsq_projection.net.2", "params/quantizer/reduce/hidden1"),
        *dense_rows("fsq_projection.net.4", "params/quantizer/reduce/out"),
        Row("fsq_unprojection.fourier.B", "batch_stats/quantizer/expand/fourier"),
        *dense_rows("fsq_unprojection.mlp.0", "params/quantizer/expand/hidden0"),
        *norm_rows("fsq_unprojection.mlp.1", "params/quantizer/expand/norm0"),
        *dense_rows("fsq_unprojection.mlp.3", "params/quantizer/expand/hidden1"),
        *norm_rows("fsq_unprojection.mlp.4", "params/quantizer/expand/norm1"),
        *dense_rows("fsq_unprojection.mlp.6", "params/quantizer/expand/out"),
        # Constants that follow from the levels, see `_fsq_constants`.
        *(Row(f"quantizer.{name}", None) for name in ("codebook", "basis", "scales")),
    ],
}

# State that the PyTorch VQRAE lacks, with the values of a trained model.
STATE = {
    "batch_stats/quantizer/step": np.int32(1_000_000),  # beyond the warm-up of the decay
    "batch_stats/quantizer/begun": np.int32(1),
}

# Two trainers of the PyTorch VQRAE (train_vqrae.py, train_stage1_uniquebatch.py) average parameters only: under "ema"
# these buffers have their initial values, with counts of zero. The other two average buffers as well.
COUNTS = "quantizer.ema_cluster_size"
BUFFERS = ("quantizer.embedding", COUNTS, "quantizer.ema_w")

LATENT = "batch_stats/latent/"  # paths of the latent statistics
NORM = ("params/encoder/norm/scale", "params/encoder/norm/bias")
REGISTERS = "encoder.encoder.embeddings.register_tokens"
NO_REGISTERS = (
    "the PyTorch VQRAE always gives DINOv2 registers: it adds four zero tokens to an encoder without them, and its "
    "features differ from ours"
)


def name_table(encoder_cls: str, quantizer: str) -> Table:
    """Returns the table of a whole model, onto paths of `variables`."""
    if quantizer not in QUANTIZER_TABLES:
        raise WeightsError(
            f"the PyTorch VQRAE has only the quantizers {', '.join(QUANTIZER_TABLES)}",
            field="model.quantizer", value=quantizer,
        )  # fmt: skip
    family = FAMILIES[encoder_cls]
    return [
        *nest_rows(family.table, family.prefix, "params/encoder/"),
        *nest_rows(DECODER_TABLE, "decoder.", "params/decoder/"),
        *QUANTIZER_TABLES[quantizer],
    ]


def _fsq_constants(levels: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the buffers of PyTorch's FSQ: all codes in units of levels, index weights and half ranges per channel."""
    scales = (np.asarray(levels, np.float32) - 1) / 2
    steps = np.indices(levels).reshape(len(levels), -1).T
    basis = np.asarray([math.prod(levels[i + 1 :]) for i in range(len(levels))], np.int64)
    codebook = (steps - scales).astype(np.float32)
    return {"quantizer.codebook": codebook, "quantizer.basis": basis, "quantizer.scales": scales}


def select_state_dict(checkpoint: Mapping[str, Any], weights: str, source: str) -> Mapping[str, np.ndarray]:
    """Returns the state dict of a checkpoint: `checkpoint` itself, or its part `weights` ("model" or "ema").

    With "ema", the codebook and its statistics come from "model" if the trainer did not average them. Prefixes of
    PyTorch's wrappers are removed.
    """
    parts = [name for name in ("model", "ema") if isinstance(checkpoint.get(name), Mapping)]
    if parts and weights not in parts:
        raise WeightsError(f"{source} has only {parts[0]!r} weights", field="--weights", value=weights)
    selected = unwrap(checkpoint[weights] if parts else checkpoint, source)
    if weights == "ema" and "model" in parts and not np.any(selected.get(COUNTS, 0)):
        live = {n: v for n, v in unwrap(checkpoint["model"], source).items() if n in BUFFERS}
        if live:
            log.info("%s: the codebook is that of 'model', because 'ema' has the one from before training", source)
        selected = {**selected, **live}
    dicts = [name for name, value in selected.items() if isinstance(value, dict)] if isinstance(selected, dict) else []
    if dicts:
        raise WeightsError(f"{source} contains dicts ({', '.join(dicts[:8])}); expected a dict of tensors")
    return selected


def select_network(tensors: Mapping[str, np.ndarray], table: Table, source: str) -> Mapping[str, np.ndarray]:
    """Returns the tensors of the network of `table` under its names: it may be one of several, in another module."""
    prefix = find_prefix(table, tensors)
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    if unused := len(tensors) - len(names):
        log.info("%s: the model has the prefix %s; %d other tensors are not used", source, prefix, unused)
    return Renamed(tensors, names)


def convert_state_dict(
    tensors: Mapping[str, np.ndarray], encoder_cls: str, quantizer: str, target: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Converts the state dict of a whole model to {"params", "batch_stats"} without the latent statistics.

    Args:
      tensors: a state dict, with the names of transformers 4 or 5.
      encoder_cls, quantizer: as in the config.
      target: shapes of the variables, with stacked blocks.
      source: where the tensors come from, for messages.
    """
    table, flat = name_table(encoder_cls, quantizer), flatten_dict(target, sep="/")
    tensors = select_network(tensors, table, source)
    stored = {path: leaf for path, leaf in flat.items() if path not in STATE and not path.startswith(LATENT)}
    scale = tensors.get(FAMILIES[encoder_cls].prefix + "norm.weight")
    if encoder_cls == "Dinov3withNorm" and NORM[0] not in stored and scale is not None and np.any(scale != 1):
        log.warning(
            "%s: the PyTorch VQRAE applies the scale and bias of DINOv3's last norm, so its codebook and decoder "
            "expect them: set model.encoder_params.normalize=False",
            source,
        )
    registers = tensors.get(REGISTERS, np.zeros(0))
    if "params/encoder/vit/registers" not in stored and registers.size and not np.any(registers):
        log.warning("%s: %s", source, NO_REGISTERS)
        tensors = {name: tensors[name] for name in tensors if name != REGISTERS}
    variables = flatten_dict(convert(tensors, table, unflatten_dict(stored, sep="/"), NORM, source), sep="/")
    variables |= {path: value for path, value in STATE.items() if path in flat}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(variables, sep="/")


def build_state_dict(
    variables: Mapping[str, Any],
    encoder_cls: str,
    quantizer: str,
    transformers: writers.Transformers = 4,
    fsq_levels: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Converts {"params", "batch_stats"} of a whole model, decoder blocks not stacked, to a state dict.

    Parameters that the PyTorch VQRAE has but never uses (mask tokens, SigLIP's pooling head) are zeros, and a DINOv3
    norm without scale and bias becomes the identity. Latent statistics are not included, see `build_statistics`.
    """
    flat = flatten_dict({name: variables[name] for name in ("params", "batch_stats")}, sep="/")
    stored = {path: leaf for path, leaf in flat.items() if path not in STATE and not path.startswith(LATENT)}
    state = writers.to_state_dict(stored, name_table(encoder_cls, quantizer), transformers)
    if encoder_cls == "Dinov2withNorm" and REGISTERS not in state:
        log.warning("%s", NO_REGISTERS)
        width = state[REGISTERS.replace("register_tokens", "cls_token")].shape[-1]
        state[REGISTERS] = np.zeros((1, 4, width), np.float32)
    return state | (_fsq_constants(fsq_levels) if quantizer == "fsq" else {})


def build_statistics(variables: Mapping[str, Any], grid: bool = True) -> dict[str, np.ndarray | None]:
    """Returns the latent statistics as in the PyTorch VQRAE's stat.pt; empty if the model has none.

    They have the axes of its latents: [C, h, w] or [C, 1, 1], and [N, C] or [C] if latents are no `grid`.
    """

    def arrange(value: Any) -> np.ndarray:
        value = np.asarray(value)
        if not grid:
            return value if value.ndim == 1 else value.reshape(-1, value.shape[-1])
        return np.ascontiguousarray(np.moveaxis(value.reshape((1, 1, -1) if value.ndim == 1 else value.shape), -1, 0))

    arrays = {name: arrange(value) for name, value in variables["batch_stats"].get("latent", {}).items()}
    return {"mean": None, "var": None} | arrays if arrays else {}
