"""A state dict of PyTorch tensors -> a Flax tree, by a table of names. The change of layout follows from the target."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.pretrained.tables import PretrainedError, Table

SHOWN = 8  # names listed of each kind in an error


def convert(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    target: Mapping[str, Any],
    unwanted: tuple[str, ...] = (),
    source: str = "",
) -> dict[str, Any]:
    """Fills the tree `target` from `tensors`.

    Args:
      tensors: name -> array, as the file has them; read one at a time.
      table: rows of (pattern, path), see `tables`.
      target: tree of arrays or shapes to be filled.
      unwanted: paths that the table knows and this target may lack (an affine norm that is dropped, say).
      source: what the tensors come from, for messages.

    Returns:
      The tree, float32 numpy arrays.

    Raises:
      PretrainedError: names everything that is missing, unexpected or of another size, all at once.
    """
    want = flatten_dict(target, sep="/")
    got: dict[str, np.ndarray] = {}
    unexpected, misfit = [], []
    for name in tensors:
        match, path = _find(name, table)
        if match is None:
            unexpected.append(name)
            continue
        if path is None:
            continue
        paths = list(_paths(match, path))
        if all(p in unwanted and p not in want for p in paths):
            continue
        if not all(p in want for p in paths):
            unexpected.append(f"{name} (as {', '.join(paths)})")
            continue
        for p, part in zip(paths, np.split(np.asarray(tensors[name]), len(paths)), strict=True):
            try:
                got[p] = _fit(p, part, want[p].shape)
            except ValueError as error:
                misfit.append(f"{name}: {error}")
    missing = [p for p in want if p not in got and not any(f" {p} " in f" {m} " for m in misfit)]
    if unexpected or missing or misfit:
        raise PretrainedError(_report(source, missing, unexpected, misfit))
    return unflatten_dict(got, sep="/")


def _find(name: str, table: Table) -> tuple[re.Match[str] | None, str | None]:
    for pattern, path in table:
        if match := re.fullmatch(pattern, name):
            return match, path
    return None, None


def _paths(match: re.Match[str], path: str) -> Iterator[str]:
    """`block#1/attn/{query,key}/kernel` -> `block03/attn/query/kernel`, `block03/attn/key/kernel`."""
    path = re.sub(r"#(\d)", lambda group: f"{int(match[int(group[1])]):02d}", path)
    braces = re.search(r"\{(.*)\}", path)
    if braces is None:
        yield path
        return
    for name in braces[1].split(","):
        yield path.replace(braces[0], name)


def _fit(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Convolution (out, in, row, column) -> (row * column * in, out), linear (out, in) -> (in, out), heads unfolded."""
    given = tensor.shape
    if path.endswith("kernel"):
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    if tensor.size != math.prod(shape):
        raise ValueError(f"{path} is {given} in the file and {tuple(shape)} here")
    return np.ascontiguousarray(tensor.reshape(shape), dtype=np.float32)


def _report(source: str, missing: list[str], unexpected: list[str], misfit: list[str]) -> str:
    lines = [f"the weights{f' of {source}' if source else ''} do not fit this architecture:"]
    for title, names in (("of another size", misfit), ("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
    return "\n".join(lines)
