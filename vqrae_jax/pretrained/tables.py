"""Tables that map tensor names in PyTorch files to our parameter paths, and the table of the decoder.

A table is used in both directions: `convert` fills our trees from files, `writers` writes our trees under the names of
the file. Rows have the names of hub files, which are those of transformers 4. Where transformers 5 uses other names in
memory, the row has both, because training checkpoints of the PyTorch VQRAE have the names of the version that wrote
them.

In a name, `#` is the index of a block, `(a|b)` are the spellings of transformers 4 and 5, and a final `*` matches any
suffix. In a path, `#` is the block's index in two digits, `{a,b}` are equal parts of the tensor along its first axis,
and a final `[0]` means that the file lacks our leading axis of one.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One tensor, or one per block."""

    name: str  # in the file
    path: str | None  # in our tree; None: the tensor is skipped
    only: str = ""  # when to write this name: "plain" or "gated" mlp, transformers "4" or "5"; "diffusers": never
    # (value, shape) to write where we have no parameter, as in (0.0, "3D D"): D width, M mlp, K codebook size
    filler: tuple[float, str] | None = None


Table = list[Row]


def dense_rows(name: str, path: str, only: str = "") -> Table:
    """Returns the rows of a linear layer or convolution with bias."""
    return [Row(f"{name}.weight", f"{path}/kernel", only), Row(f"{name}.bias", f"{path}/bias", only)]


def norm_rows(name: str, path: str) -> Table:
    """Returns the rows of an affine normalization."""
    return [Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")]


def attention_rows(prefix: str, projections: str, path: str, only: str = "") -> Table:
    """Returns the rows of an attention layer.

    Args:
      prefix: of the names in the file.
      projections: names of the query, key, value and output projections, separated by spaces.
      path: of the layer in our tree.
      only: see `Row`.
    """
    ours = ("query", "key", "value", "out")
    pairs = zip(projections.split(), ours, strict=True)
    return [row for theirs, name in pairs for row in dense_rows(prefix + theirs, f"{path}/{name}", only)]


def nest_rows(table: Table, name: str, path: str) -> Table:
    """Returns the table with `name` in front of every name and `path` in front of every path."""
    return [row._replace(name=name + row.name, path=row.path and path + row.path) for row in table]


def find_row(table: Table, name: str) -> tuple[Row, list[str]] | None:
    """Returns the first row that matches `name` and the paths that it fills, or None if no row matches."""
    for row in table:
        if match := _pattern(row.name).fullmatch(name):
            return row, row_paths(row, int(match[1]) if match.groups() else 0)
    return None


def find_prefix(table: Table, names: Iterable[str]) -> str:
    """Returns the prefix of the network's names in a file, as `vit.` next to a classifier; that of its embedding."""
    embedding = next(_pattern(row.name).pattern for row in table if (row.path or "").endswith("embed/kernel"))
    matches = (re.fullmatch(rf"((?:.*\.)?){embedding}", name) for name in names)
    return next((match[1] for match in matches if match), "")


def strip_prefix(name: str, prefix: str) -> str:
    """Removes the modules of a prefix that a name has: with `model.vit.`, also `model.` of `model.classifier.bias`."""
    while not name.startswith(prefix):
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    return name.removeprefix(prefix)


def row_paths(row: Row, block: int) -> list[str]:
    """Expands `block#/attn/{query,key}/kernel` to `block03/attn/query/kernel`, `block03/attn/key/kernel`."""
    if row.path is None:
        return []
    path = row.path.replace("#", f"{block:02d}").removesuffix("[0]")
    parts = re.search(r"\{(.*)\}", path)
    return [path.replace(parts[0], part) for part in parts[1].split(",")] if parts else [path]


def row_name(row: Row, block: int, transformers: int) -> str:
    """Returns the row's name as transformers 4 or 5 spells it."""
    name = re.sub(r"\(([^|]*)\|([^)]*)\)", lambda match: match[transformers - 3], row.name)
    return name.replace("#", str(block))


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", ".*")
    return re.compile(pattern.replace(r"\(", "(?:").replace(r"\)", ")").replace(r"\|", "|"))


_BLOCK = "decoder_layers.#."

# GeneralDecoder of the PyTorch VQRAE. RAE releases have exactly these names, whatever the version of transformers,
# because the class is not one of transformers'.
DECODER_TABLE: Table = [
    *dense_rows("decoder_embed", "embed"),
    Row("decoder_pos_embed", "pos_embed"),
    Row("trainable_cls_token", "cls"),
    *norm_rows(_BLOCK + "layernorm_before", "block#/norm1"),
    *attention_rows(_BLOCK + "attention.", "attention.query attention.key attention.value output.dense", "block#/attn"),
    *attention_rows(_BLOCK + "attention.", "to_q to_k to_v to_out.0", "block#/attn", only="diffusers"),
    *norm_rows(_BLOCK + "layernorm_after", "block#/norm2"),
    *dense_rows(_BLOCK + "intermediate.dense", "block#/mlp/up"),
    *dense_rows(_BLOCK + "output.dense", "block#/mlp/down"),
    *norm_rows("decoder_norm", "norm"),
    *dense_rows("decoder_pred", "pred"),
]
