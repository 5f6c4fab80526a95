"""Conversion of PyTorch state dicts to Flax trees by a table of names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import families, tables
from vqrae_jax.pretrained.layout import from_file, unstack_blocks
from vqrae_jax.pretrained.tables import Table

MAX_LISTED = 64  # groups of names that an error lists per kind


def convert(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    target: Mapping[str, Any],
    optional: tuple[str, ...] = (),
    source: str = "",
    prefix: str = "",
) -> dict[str, Any]:
    """Fills the tree `target` from `tensors`.

    Args:
      tensors: name -> array, as in the file; read one at a time.
      table: rows of names and paths, see `tables`.
      target: tree of arrays or shapes to fill, with stacked blocks.
      optional: paths in the table that the target may lack; their tensors are skipped.
      source: file or folder of the tensors, for messages.
      prefix: prefix of the names in the file, see `tables.strip_prefix`.

    Returns:
      The tree, float32 numpy arrays. An error lists all tensors that are missing, unexpected or of another shape, or
      otherwise those with NaN or infinity.
    """
    filled = {path: np.empty(leaf.shape, np.float32) for path, leaf in flatten_dict(target, sep="/").items()}
    arrays, converted = unstack_blocks(filled), set()  # views, one per block
    unexpected, mismatched, infinite = [], {}, []
    for name in tensors:
        match = tables.find_row(table, tables.strip_prefix(name, prefix))
        paths = match[1] if match else []
        if match is None or any(p not in arrays and p not in optional for p in paths):
            if match is None or np.size(tensors[name]):  # an encoder without registers may have an empty tensor of them
                unexpected.append(name)
        elif all(p in arrays for p in paths) and paths:
            tensor = np.asarray(tensors[name])
            try:
                parts = np.split(tensor, len(paths)) if len(paths) > 1 else [tensor]
                for p, part in zip(paths, parts, strict=True):
                    arrays[p][...] = from_file(p, part, arrays[p].shape)
                converted.update(paths)
                if not all(np.isfinite(arrays[p]).all() for p in paths):
                    infinite.append(name)
            except ValueError as error:
                mismatched |= dict.fromkeys(paths, f"{name} ({error})")
    missing = [p for p in arrays if p not in converted and p not in mismatched]
    if unexpected or missing or mismatched:
        lines = [f"the weights{f' of {source}' if source else ''} do not fit this architecture:"]
        kinds = {"shape mismatch": list(mismatched.values()), "missing": missing, "unexpected": unexpected}
        lines += [f"  {kind} ({len(names)}): {_summarize(names)}" for kind, names in kinds.items() if names]
        raise WeightsError("\n".join(lines + _hint(tensors, table)))
    if infinite:
        raise WeightsError(f"{source or 'the file'} has NaN or infinity in {_summarize(infinite)}; weights are finite")
    return unflatten_dict(filled, sep="/")


def _summarize(names: Iterable[str]) -> str:
    """Joins names; those that differ only in the block's index are one: `block00/norm1/scale (and 11 more blocks)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(block|layers?\.)\d+", r"\1#", name), []).append(name)
    listed = [
        first if not rest else f"{first} (and {len(rest)} more block{'s' * (len(rest) > 1)})"
        for first, *rest in groups.values()
    ]
    more = f", and {len(listed) - MAX_LISTED} more groups" if len(listed) > MAX_LISTED else ""
    return ", ".join(listed[:MAX_LISTED]) + more


def _hint(names: Iterable[str], table: Table) -> list[str]:
    """Returns a line that says which network has these names, if not the one of the table."""
    kind = families.guess_kind(names)
    kinds = {id(family.table): name for name, family in families.FAMILIES.items()}
    expected = (kinds | {id(tables.DECODER_TABLE): families.DECODER}).get(id(table))
    if kind is None or kind == expected:
        return []
    return [f"  the names are those of {kind}" + (f", but {expected} was expected" if expected else "")]
