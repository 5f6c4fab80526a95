"""The tables that tie tensor names in PyTorch files to parameter paths of ours: how they read, and the decoder's.

A table is read both ways: `convert` fills our trees from files, `export` writes our trees under the file's names. Rows
follow the names in hub files, which are those of transformers 4; where transformers 5 has other names in memory, the
row has both, because training checkpoints of the origin carry whichever version trained them.

In a name: `#` is the number of a block, `(a|b)` the spellings of transformers 4 and 5, and a `*` at the end stands for
anything. In a path: `#` is the block's number in two digits, `{a,b}` are equal parts of the tensor along its first
axis, and `[0]` at the end means that the file lacks our leading axis of one.
"""

import functools
import re
from typing import NamedTuple


class Row(NamedTuple):
    """One tensor, or one per block."""

    name: str  # in the file
    path: str | None  # in our tree; None: known and not wanted
    only: str = ""  # what export asks before it writes this name: "plain" or "gated" mlp, transformers "4" or "5"
    # (value, shape) of what export writes where we keep nothing, as in (0.0, "3D D"): D width, M mlp, K codes
    filler: tuple[float, str] | None = None


Table = list[Row]


def dense(name: str, path: str, only: str = "") -> Table:
    return [Row(f"{name}.weight", f"{path}/kernel", only), Row(f"{name}.bias", f"{path}/bias", only)]


def norm(name: str, path: str) -> Table:
    return [Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")]


def nested(table: Table, name: str, path: str) -> Table:
    """The table one level down: `name` in front of every name, `path` in front of every path."""
    return [row._replace(name=name + row.name, path=row.path and path + row.path) for row in table]


def find(table: Table, name: str) -> tuple[Row, list[str]] | None:
    """The first row that knows `name`, and the paths it fills: none, one, or several parts. None: no row knows it."""
    for row in table:
        if match := _pattern(row.name).fullmatch(name):
            block = int(match[1]) if match.groups() else 0
            return row, paths(row, block)
    return None


def paths(row: Row, block: int) -> list[str]:
    """`block#/attn/{query,key}/kernel` -> `block03/attn/query/kernel`, `block03/attn/key/kernel`."""
    if row.path is None:
        return []
    path = row.path.replace("#", f"{block:02d}").removesuffix("[0]")
    parts = re.search(r"\{(.*)\}", path)
    return [path.replace(parts[0], part) for part in parts[1].split(",")] if parts else [path]


def spell(row: Row, block: int, transformers: int) -> str:
    """The row's name as transformers 4 or 5 writes it."""
    name = re.sub(r"\(([^|]*)\|([^)]*)\)", lambda match: match[transformers - 3], row.name)
    return name.replace("#", str(block))


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", ".*")
    return re.compile(pattern.replace(r"\(", "(?:").replace(r"\)", ")").replace(r"\|", "|"))


_BLOCK = "decoder_layers.#."

# GeneralDecoder of the origin (RAE releases hold exactly these names); its code is the origin's own, so that they are
# the same whatever transformers it runs with.
DECODER_TABLE: Table = [
    *dense("decoder_embed", "embed"),
    Row("decoder_pos_embed", "pos_embed"),
    Row("trainable_cls_token", "cls"),
    *norm(_BLOCK + "layernorm_before", "block#/norm1"),
    *dense(_BLOCK + "attention.attention.query", "block#/attn/query"),
    *dense(_BLOCK + "attention.attention.key", "block#/attn/key"),
    *dense(_BLOCK + "attention.attention.value", "block#/attn/value"),
    *dense(_BLOCK + "attention.output.dense", "block#/attn/out"),
    *norm(_BLOCK + "layernorm_after", "block#/norm2"),
    *dense(_BLOCK + "intermediate.dense", "block#/mlp/up"),
    *dense(_BLOCK + "output.dense", "block#/mlp/down"),
    *norm("decoder_norm", "norm"),
    *dense("decoder_pred", "pred"),
]
