"""Weights of the networks that judge images: Inception-v3, LPIPS and DINO v1.

`field` is the config field that names a file or model, for messages. All readers raise WeightsError for a file that is
missing, damaged or of another network.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import sources
from vqrae_jax.pretrained.convert import convert
from vqrae_jax.pretrained.readers import Renamed, unwrap
from vqrae_jax.pretrained.tables import Row, Table, attention_rows, dense_rows, find_prefix, norm_rows, strip_prefix

# Inception-v3 of Frechet distances.
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)

_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
    "branch7x7dbl_5 branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b "
    "branch_pool"
)
_INCEPTION_BLOCKS = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A, "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C, "Mixed_6d": _C,
    "Mixed_6e": _C, "Mixed_7a": _D, "Mixed_7b": _E, "Mixed_7c": _E,
}  # fmt: skip
_INCEPTION_LAYERS = [
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *(f"{block}.{branch}" for block, branches in _INCEPTION_BLOCKS.items() for branch in branches.split()),
]


_INCEPTION_PARAMETERS = {
    "conv.weight": "conv/kernel", "bn.weight": "norm/scale", "bn.bias": "norm/bias", "bn.running_mean": "norm/mean",
    "bn.running_var": "norm/var",
}  # fmt: skip
INCEPTION_TABLE: Table = [
    *(
        Row(f"{layer}.{name}", f"{layer.replace('.', '/')}/{path}")
        for layer in _INCEPTION_LAYERS
        for name, path in _INCEPTION_PARAMETERS.items()
    ),
    *(Row(f"{layer}.bn.num_batches_tracked", None) for layer in _INCEPTION_LAYERS),
    Row("fc.weight", "fc/kernel"),
    Row("fc.bias", "fc/bias"),
    Row("AuxLogits.*", None),
]


def read_inception(target: Mapping[str, Any], path: str, field: str) -> dict[str, Any]:
    """Reads the parameters of models.inception.Inception onto `target`, a tree of arrays or shapes."""
    return convert(sources.read_state_dict(path, field), INCEPTION_TABLE, target, source=path)


# LPIPS: the VGG16 trunk under the names of torchvision or timm, and the linear heads of version 0.1.
TRUNK, HEADS = "timm/vgg16.tv_in1k", "chaofengc/IQA-PyTorch-Weights/LPIPS_v0.1_vgg-a78928a0.pth"

# Index of each convolution in torchvision's flat list, which includes activations and poolings.
_CONVOLUTIONS = {
    "1_1": 0, "1_2": 2, "2_1": 5, "2_2": 7, "3_1": 10, "3_2": 12, "3_3": 14, "4_1": 17, "4_2": 19, "4_3": 21,
    "5_1": 24, "5_2": 26, "5_3": 28,
}  # fmt: skip

TRUNK_TABLE: Table = [
    *(row for name, number in _CONVOLUTIONS.items() for row in dense_rows(f"features.{number}", f"conv{name}")),
    *(Row(f"{name}.*", None) for name in ("classifier", "pre_logits", "head")),
]
HEADS_TABLE: Table = [
    Row(f"{prefix}{stage}.model.1.weight", f"head{stage}") for stage in range(5) for prefix in ("lin", "lins.")
]


def read_lpips(
    target: Mapping[str, Any], trunk: str = TRUNK, heads: str = HEADS, field: str = "loss.perceptual"
) -> dict[str, Any]:
    """Reads the parameters of models.lpips.LPIPS.

    Args:
      target: tree of the parameters, arrays or shapes: `jax.eval_shape(LPIPS().init, ...)["params"]`.
      trunk, heads: each a local folder or file, or `owner/name` or `owner/name/path/to/file` on the hub.
      field: the config section that has the fields `trunk` and `heads`.
    """
    trunk_tensors = sources.read_state_dict(trunk, f"{field}.trunk")
    heads_tensors = sources.read_state_dict(heads, f"{field}.heads")
    heads_target = {name: tree for name, tree in target.items() if name != "trunk"}
    params = convert(heads_tensors, HEADS_TABLE, heads_target, source=heads)
    return params | {"trunk": convert(trunk_tensors, TRUNK_TABLE, target["trunk"], source=trunk)}


HEAD_WIDTH = 64  # of all released DINO networks (Caron et al. 2021)

_BLOCK = "block#/"
_AUTHORS, _HUB = "blocks.#.", "encoder.layer.#."

DINO_TABLE: Table = [
    Row("(cls_token|embeddings.cls_token)", "cls"),
    Row("(pos_embed|embeddings.position_embeddings)", "pos_embed"),
    *dense_rows("(patch_embed.proj|embeddings.patch_embeddings.projection)", "patch_embed"),
    *norm_rows(_AUTHORS + "norm1", _BLOCK + "norm1"),
    *dense_rows(_AUTHORS + "attn.qkv", _BLOCK + "attn/{query,key,value}"),
    *dense_rows(_AUTHORS + "attn.proj", _BLOCK + "attn/out"),
    *norm_rows(_AUTHORS + "norm2", _BLOCK + "norm2"),
    *dense_rows(_AUTHORS + "mlp.fc1", _BLOCK + "mlp/up"),
    *dense_rows(_AUTHORS + "mlp.fc2", _BLOCK + "mlp/down"),
    *norm_rows(_HUB + "layernorm_before", _BLOCK + "norm1"),
    *attention_rows(_HUB + "attention.", "attention.query attention.key attention.value output.dense", _BLOCK + "attn"),
    *norm_rows(_HUB + "layernorm_after", _BLOCK + "norm2"),
    *dense_rows(_HUB + "intermediate.dense", _BLOCK + "mlp/up"),
    *dense_rows(_HUB + "output.dense", _BLOCK + "mlp/down"),
    # The discriminator uses the blocks and none of the layers after them.
    *(Row(f"{name}.*", None) for name in ("norm", "layernorm", "pooler", "head")),
]


def read_dino(name: str, field: str, heads: int | None = None) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """Returns the fields of models.vit.ViTConfig (`blocks` nested) that describe a network, and its tensors.

    Args:
      name: checkpoint of the authors or ViT folder of the hub, as in `sources.read_state_dict`.
      field: the config field that names it.
      heads: attention heads; None: one per 64 channels.
    """
    tensors = sources.read_state_dict(name, field)
    for key in ("teacher", "student", "model"):  # training checkpoints nest it
        tensors = tensors[key] if isinstance(tensors.get(key), Mapping) else tensors
    tensors = unwrap(tensors, name)
    prefix = find_prefix(DINO_TABLE, tensors)
    tensors = Renamed(tensors, {strip_prefix(n, prefix): n for n in tensors})

    def shape(*names: str) -> tuple[int, ...]:
        existing = [n for n in names if n in tensors]
        if not existing:
            raise WeightsError(f"expected a DINO ViT, but it lacks {' or '.join(names)}", field=field, value=name)
        return np.shape(tensors[existing[0]])

    width, _, patch, _ = shape("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    mlp, _ = shape("blocks.0.mlp.fc1.weight", "encoder.layer.0.intermediate.dense.weight")
    tokens = shape("pos_embed", "embeddings.position_embeddings")[1]
    numbers = {int(m[1]) for n in tensors if (m := re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", n))}
    heads = heads or max(1, width // HEAD_WIDTH)
    if width % heads:
        raise WeightsError(f"its width of {width} is not divisible by {heads} attention heads", field=field, value=name)
    blocks = {"width": width, "depth": max(numbers) + 1, "heads": heads, "mlp": mlp, "act": "gelu_tanh"}
    return {"blocks": blocks, "patch": patch, "grid": math.isqrt(tokens - 1)}, tensors


def convert_dino(tensors: Mapping[str, np.ndarray], target: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Converts tensors to the parameters of models.vit.ViT, whose tree `target` is."""
    return convert(tensors, DINO_TABLE, target, source=source)
