"""Checkpoints of the PyTorch origin (RAE and VQRAE): their names, and their tensors -> the variables of our model.

The origin's training writes {"model": state dict, "ema": state dict, "step": ..., ...}; its releases are bare state
dicts. Latent statistics and image means are not in them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained.convert import convert
from vqrae_jax.pretrained.families import FAMILIES
from vqrae_jax.pretrained.tables import DECODER_TABLE, Row, Table, dense, nested, norm

log = logging.getLogger(__name__)

# Onto variables; one table per quantizer name of the config.
QUANTIZER_TABLES: dict[str, Table] = {
    "none": [],
    "ema": [
        Row("quantizer.embedding", "batch_stats/quantizer/codebook"),
        Row("quantizer.ema_cluster_size", "batch_stats/quantizer/counts"),
        Row("quantizer.ema_w", "batch_stats/quantizer/sums"),
    ],
    "simvq": [
        Row("quantizer.embedding.weight", "batch_stats/quantizer/codebook"),
        *dense("quantizer.embedding_proj", "params/quantizer/codebook_projection"),
        *dense("quantizer.z_proj", "params/quantizer/input_projection"),
        Row("quantizer.l2_norm_scale", None, filler=(1.0, "")),  # only its sign acts
        Row("quantizer.ema_cluster_size", None, filler=(0.0, "K")),  # never updated
    ],
    "fsq": [
        Row("fsq_projection.post_gain", "params/quantizer/reduce/gain"),
        *norm("fsq_projection.norm", "params/quantizer/reduce/norm"),
        *dense("fsq_projection.net.0", "params/quantizer/reduce/hidden0"),
        *dense("fsq_projection.net.2", "params/quantizer/reduce/hidden1"),
        *dense("fsq_projection.net.4", "params/quantizer/reduce/out"),
        Row("fsq_unprojection.fourier.B", "batch_stats/quantizer/expand/fourier"),
        *dense("fsq_unprojection.mlp.0", "params/quantizer/expand/hidden0"),
        *norm("fsq_unprojection.mlp.1", "params/quantizer/expand/norm0"),
        *dense("fsq_unprojection.mlp.3", "params/quantizer/expand/hidden1"),
        *norm("fsq_unprojection.mlp.4", "params/quantizer/expand/norm1"),
        *dense("fsq_unprojection.mlp.6", "params/quantizer/expand/out"),
        # What follows from the levels, see `fsq_constants`.
        Row("quantizer.codebook", None),
        Row("quantizer.basis", None),
        Row("quantizer.scales", None),
    ],
}

# State that the origin has no name for, and what it is in a trained model.
STATE = {
    "batch_stats/quantizer/step": np.int32(1_000_000),  # beyond the warm-up of the decay
    "batch_stats/quantizer/begun": np.int32(1),
}

# The origin's EMA follows parameters only. These are buffers: under "ema" they still are what training began with.
BUFFERS = ("quantizer.embedding", "quantizer.ema_cluster_size", "quantizer.ema_w")

REGISTERS = "encoder.encoder.embeddings.register_tokens"
NO_REGISTERS = "the origin has no DINOv2 without registers: it adds four of zeros, and its features differ from ours"

WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


def name_table(encoder_cls: str, quantizer: str) -> Table:
    """The names of a whole RAE or VQRAE of the origin, onto paths of `variables`.

    Raises:
      WeightsError: the origin has no such quantizer.
    """
    if quantizer not in QUANTIZER_TABLES:
        raise WeightsError(
            f"model.quantizer={quantizer!r} is not one that the PyTorch VQRAE has; it has {', '.join(QUANTIZER_TABLES)}"
        )
    family = FAMILIES[encoder_cls]
    return [
        *nested(family.table, family.origin, "params/encoder/"),
        *nested(DECODER_TABLE, "decoder.", "params/decoder/"),
        *QUANTIZER_TABLES[quantizer],
    ]


def fsq_constants(levels: Sequence[int]) -> dict[str, np.ndarray]:
    """The buffers of the origin's FSQ: every code in level units, the index weight and half the range per channel."""
    scales = (np.asarray(levels, np.float32) - 1) / 2
    steps = np.stack(np.meshgrid(*(np.arange(n) for n in levels), indexing="ij"), -1).reshape(-1, len(levels))
    basis = np.asarray([math.prod(levels[i + 1 :]) for i in range(len(levels))], np.int64)
    return {
        "quantizer.codebook": (steps - scales).astype(np.float32),
        "quantizer.basis": basis,
        "quantizer.scales": scales,
    }


def select_state_dict(checkpoint: Mapping[str, Any], weights: str, source: str) -> Mapping[str, np.ndarray]:
    """The state dict of a checkpoint: itself, or what is under "model" or "ema" (`weights`) of a training checkpoint.

    With "ema", the codebook and its statistics come from "model".

    Raises:
      WeightsError: `weights` is not in it, or it holds something else than tensors.
    """
    parts = [name for name in ("model", "ema") if isinstance(checkpoint.get(name), Mapping)]
    chosen = checkpoint
    if parts:
        if weights not in parts:
            raise WeightsError(f"{source} has no {weights!r} weights; it has {parts[0]}: --weights={parts[0]}")
        chosen = dict(checkpoint[weights])
        if weights == "ema" and "model" in parts:
            live = {n: v for n, v in checkpoint["model"].items() if _unwrapped(n) in BUFFERS}
            chosen |= live
            if live:
                log.info("%s: the codebook is that of 'model', since the origin's 'ema' never follows it", source)
    wrapped = parts or any(_unwrapped(name) != name for name in chosen)
    tensors = {_unwrapped(name): value for name, value in chosen.items()} if wrapped else chosen
    bad = [name for name, value in tensors.items() if isinstance(value, dict)] if isinstance(tensors, dict) else []
    if bad:
        raise WeightsError(f"{source} is a dict of dicts ({', '.join(bad[:8])}), expected tensors by name")
    return tensors


def convert_checkpoint(
    tensors: Mapping[str, np.ndarray], encoder_cls: str, quantizer: str, target: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """A whole model of the origin -> {"params", "batch_stats"}, without the latent statistics, which it lacks.

    Args:
      tensors: a state dict, with the names of transformers 4 or 5.
      encoder_cls, quantizer: as in the config.
      target: the variables' shapes, decoder blocks one by one.
      source: what the tensors come from, for messages.

    Raises:
      WeightsError: lists all that is missing, unexpected or of another size.
    """
    known = {path: shape for path, shape in flatten_dict(target, sep="/").items() if path not in STATE}
    wanted = {path: leaf for path, leaf in known.items() if not path.startswith("batch_stats/latent/")}
    norm = ("params/encoder/norm/scale", "params/encoder/norm/bias")
    _warn_of_affine_norm(tensors, encoder_cls, norm[0] in wanted, source)
    if _has_empty_registers(tensors, wanted):
        log.warning("%s: %s", source, NO_REGISTERS)
        tensors = {name: tensors[name] for name in tensors if name != REGISTERS}
    rows = name_table(encoder_cls, quantizer)
    read = flatten_dict(convert(tensors, rows, unflatten_dict(wanted, sep="/"), norm, source), sep="/")
    read |= {path: value for path, value in STATE.items() if path in flatten_dict(target, sep="/")}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(read, sep="/")


def _has_empty_registers(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> bool:
    return REGISTERS in tensors and "params/encoder/vit/registers" not in wanted and not np.any(tensors[REGISTERS])


def _warn_of_affine_norm(tensors: Mapping[str, np.ndarray], encoder_cls: str, affine: bool, source: str) -> None:
    scale = tensors.get(FAMILIES[encoder_cls].origin + "norm.weight")
    if encoder_cls == "Dinov3withNorm" and not affine and scale is not None and np.any(scale != 1):
        log.warning(
            "%s: the origin applies the scale and bias of DINOv3's last norm (it looks for them under another name), "
            "so its codebook and decoder expect them: set model.encoder_params.normalize=False",
            source,
        )


def _unwrapped(name: str) -> str:
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name
