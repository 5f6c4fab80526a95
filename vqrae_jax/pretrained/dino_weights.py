"""Files of DINO v1 (Caron et al. 2021): the authors' checkpoints and the hub's ViT folders -> one ViT and its tree."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import convert, sources
from vqrae_jax.pretrained.tables import Row, Table, dense, norm

HEAD_WIDTH = 64  # of every DINO that was released

_BLOCK = "block#/"
_OURS, _HUB = "blocks.#.", "encoder.layer.#."

DINO_TABLE: Table = [
    Row("(cls_token|embeddings.cls_token)", "cls"),
    Row("(pos_embed|embeddings.position_embeddings)", "pos_embed"),
    *dense("(patch_embed.proj|embeddings.patch_embeddings.projection)", "patch_embed"),
    *norm(_OURS + "norm1", _BLOCK + "norm1"),
    *dense(_OURS + "attn.qkv", _BLOCK + "attn/{query,key,value}"),
    *dense(_OURS + "attn.proj", _BLOCK + "attn/out"),
    *norm(_OURS + "norm2", _BLOCK + "norm2"),
    *dense(_OURS + "mlp.fc1", _BLOCK + "mlp/up"),
    *dense(_OURS + "mlp.fc2", _BLOCK + "mlp/down"),
    *norm(_HUB + "layernorm_before", _BLOCK + "norm1"),
    *dense(_HUB + "attention.attention.query", _BLOCK + "attn/query"),
    *dense(_HUB + "attention.attention.key", _BLOCK + "attn/key"),
    *dense(_HUB + "attention.attention.value", _BLOCK + "attn/value"),
    *dense(_HUB + "attention.output.dense", _BLOCK + "attn/out"),
    *norm(_HUB + "layernorm_after", _BLOCK + "norm2"),
    *dense(_HUB + "intermediate.dense", _BLOCK + "mlp/up"),
    *dense(_HUB + "output.dense", _BLOCK + "mlp/down"),
    Row("norm.*", None),  # the discriminator reads blocks, not what follows them
    Row("layernorm.*", None),
    Row("pooler.*", None),
    Row("head.*", None),
]


def read_dino(name: str, field: str, heads: int | None = None) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """The fields of models.vit.ViTConfig (`blocks` nested) that describe the file's network, and its tensors.

    Args:
      name: a local file or folder, a hub id ("facebook/dino-vits8"), or a file inside a hub repository.
      field: the config field that named it, for messages.
      heads: of attention; None: as many as give each 64 channels.

    Raises:
      WeightsError: nothing is there, or no DINO.
    """
    tensors = sources.read_named(name, field)
    for key in ("teacher", "student", "model", "state_dict"):  # training checkpoints hold it beside other things
        tensors = tensors[key] if isinstance(tensors.get(key), Mapping) else tensors
    prefix = r"^(module\.)?(backbone\.)?(vit\.)?"
    tensors = {re.sub(prefix, "", n): tensors[n] for n in tensors}

    def shape(*names: str) -> tuple[int, ...]:
        found = next((n for n in names if n in tensors), None)
        if found is None:
            raise WeightsError(f"{field}={name!r} is no DINO ViT: it lacks {' or '.join(names)}")
        return np.shape(tensors[found])

    width, _, patch, _ = shape("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    mlp, _ = shape("blocks.0.mlp.fc1.weight", "encoder.layer.0.intermediate.dense.weight")
    tokens = shape("pos_embed", "embeddings.position_embeddings")[1]
    numbers = {int(m[1]) for n in tensors if (m := re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", n))}
    heads = heads or max(1, width // HEAD_WIDTH)
    if width % heads:
        raise WeightsError(f"{field}={name!r}: {heads} heads do not divide its width of {width}")
    blocks = {"width": width, "depth": max(numbers) + 1, "heads": heads, "mlp": mlp, "act": "gelu_tanh"}
    return {"blocks": blocks, "patch": patch, "grid": math.isqrt(tokens - 1)}, tensors


def convert_dino(tensors: Mapping[str, np.ndarray], target: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Parameters of models.vit.ViT, whose tree `target` is."""
    return convert.convert(tensors, DINO_TABLE, target, source=source)
