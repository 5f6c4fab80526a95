"""Files of ConvNeXt classifiers under transformers' names ("facebook/convnext-small-224")."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import convert, sources
from vqrae_jax.pretrained.tables import Row, Table, dense, norm

STAGES = 4


def _stage(i: int) -> Table:
    name, path = f"encoder.stages.{i}.layers.#.", f"stage{i}_block#/"
    down = f"encoder.stages.{i}.downsampling_layer."
    return [
        *(norm(down + "0", f"norm{i}") + dense(down + "1", f"conv{i}") if i else []),
        *dense(name + "dwconv", path + "conv"),
        *norm(name + "layernorm", path + "norm"),
        *dense(name + "pwconv1", path + "up"),
        *dense(name + "pwconv2", path + "down"),
        Row(name + "layer_scale_parameter", path + "scale/scale"),
    ]


CONVNEXT_TABLE: Table = [
    *dense("embeddings.patch_embeddings", "conv0"),
    *norm("embeddings.layernorm", "norm0"),
    *(row for i in range(STAGES) for row in _stage(i)),
    *norm("layernorm", "norm"),
    *dense("classifier", "logits"),
]


def read_convnext(name: str, field: str) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """The fields of models.convnext.ConvNeXtConfig that describe the file's network, and its tensors.

    Raises:
      WeightsError: nothing is there, or no ConvNeXt with a classifier.
    """
    read = sources.read_named(name, field)
    tensors = {n.removeprefix("convnext."): read[n] for n in read}
    blocks = [re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", n) for n in tensors]
    depths = [1 + max((int(m[2]) for m in blocks if m and int(m[1]) == i), default=-1) for i in range(STAGES)]
    if 0 in depths or "classifier.bias" not in tensors:
        raise WeightsError(f"{field}={name!r} is no ConvNeXt classifier under the names of transformers")
    widths = [len(tensors[f"encoder.stages.{i}.layers.0.dwconv.bias"]) for i in range(STAGES)]
    return {"depths": tuple(depths), "widths": tuple(widths), "classes": len(tensors["classifier.bias"])}, tensors


def convert_convnext(tensors: Mapping[str, np.ndarray], target: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Parameters of models.convnext.ConvNeXt, whose tree `target` is."""
    return convert.convert(tensors, CONVNEXT_TABLE, target, source=source)
