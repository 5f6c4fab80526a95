"""The files of LPIPS: the VGG16 trunk under torchvision's or timm's names, and the linear heads of version 0.1."""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.pretrained import convert, sources
from vqrae_jax.pretrained.tables import Row, Table, dense

TRUNK, HEADS = "timm/vgg16.tv_in1k", "chaofengc/IQA-PyTorch-Weights/LPIPS_v0.1_vgg-a78928a0.pth"

# Number of the convolution in torchvision's flat list, which counts activations and poolings too.
_CONVOLUTIONS = {
    "1_1": 0, "1_2": 2, "2_1": 5, "2_2": 7, "3_1": 10, "3_2": 12, "3_3": 14, "4_1": 17, "4_2": 19, "4_3": 21,
    "5_1": 24, "5_2": 26, "5_3": 28,
}  # fmt: skip

TRUNK_TABLE: Table = [
    *(row for name, number in _CONVOLUTIONS.items() for row in dense(f"features.{number}", f"conv{name}")),
    Row("classifier.*", None),
    Row("pre_logits.*", None),
    Row("head.*", None),
]
HEADS_TABLE: Table = [
    Row(f"{prefix}{stage}.{name}", f"head{stage}")
    for stage in range(5)
    for prefix, name in (("lin", "model.1.weight"), ("lins.", "model.1.weight"))
]


def read_lpips(
    target: Mapping[str, Any], trunk: str = TRUNK, heads: str = HEADS, field: str = "loss.perceptual"
) -> dict[str, Any]:
    """Parameters of models.lpips.LPIPS.

    Args:
      target: their tree, arrays or shapes: `jax.eval_shape(LPIPS().init, ...)["params"]`.
      trunk, heads: each a local folder or file, or `owner/name` or `owner/name/path/to/file` on the hub.
      field: the config section that names them, as `{field}.trunk` and `{field}.heads`, for messages.

    Raises:
      WeightsError: a file is not there, is damaged, or is of another network.
    """
    at_trunk, at_heads = sources.read_named(trunk, f"{field}.trunk"), sources.read_named(heads, f"{field}.heads")
    want = {name: tree for name, tree in target.items() if name != "trunk"}
    return {
        "trunk": convert.convert(at_trunk, TRUNK_TABLE, target["trunk"], source=trunk),
        **convert.convert(at_heads, HEADS_TABLE, want, source=heads),
    }
