"""The file of Inception-v3 for Frechet distances, `pt_inception-2015-12-05-6726825d.pth`, and others of its names."""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.pretrained import convert, sources
from vqrae_jax.pretrained.tables import Row, Table

WHERE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

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
_BLOCKS = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A, "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C, "Mixed_6d": _C,
    "Mixed_6e": _C, "Mixed_7a": _D, "Mixed_7b": _E, "Mixed_7c": _E,
}  # fmt: skip
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_LAYERS = [*_STEM, *(f"{block}.{branch}" for block, branches in _BLOCKS.items() for branch in branches.split())]


def _layer(name: str) -> Table:
    path = name.replace(".", "/")
    return [
        Row(f"{name}.conv.weight", f"{path}/conv/kernel"),
        Row(f"{name}.bn.weight", f"{path}/norm/scale"),
        Row(f"{name}.bn.bias", f"{path}/norm/bias"),
        Row(f"{name}.bn.running_mean", f"{path}/norm/mean"),
        Row(f"{name}.bn.running_var", f"{path}/norm/var"),
        Row(f"{name}.bn.num_batches_tracked", None),
    ]


INCEPTION_TABLE: Table = [
    *(row for name in _LAYERS for row in _layer(name)),
    Row("fc.weight", "fc/kernel"),
    Row("fc.bias", "fc/bias"),
    Row("AuxLogits.*", None),
]


def read_inception(target: Mapping[str, Any], path: str, field: str) -> dict[str, Any]:
    """Parameters of models.inception.Inception.

    Args:
      target: their tree, arrays or shapes.
      path: a local file, or `owner/name/path/to/file` on the hub.
      field: the config field that names it, for messages.

    Raises:
      WeightsError: the file is not there, is damaged, or is of another network.
    """
    return convert.convert(sources.read_state_dict(path, field), INCEPTION_TABLE, target, source=path)
