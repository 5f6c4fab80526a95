"""A state dict of PyTorch tensors -> a Flax tree, by a table of names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained import families, tables
from vqrae_jax.pretrained.layout import from_file
from vqrae_jax.pretrained.tables import Table

SHOWN = 64  # groups of names listed of each kind in an error


def convert(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    target: Mapping[str, Any],
    unwanted: tuple[str, ...] = (),
    source: str = "",
    prefix: str = "",
) -> dict[str, Any]:
    """Fills the tree `target` from `tensors`.

    Args:
      tensors: name -> array, as the file has them; read one at a time.
      table: rows of names and paths, see `tables`.
      target: tree of arrays or shapes to be filled.
      unwanted: paths that the table knows and this target may lack (an affine norm that is dropped, say).
      source: what the tensors come from, for messages.
      prefix: of names in the file, dropped where it is there.

    Returns:
      The tree, float32 numpy arrays.

    Raises:
      WeightsError: names everything that is missing, unexpected or of another size, all at once.
    """
    want = flatten_dict(target, sep="/")
    got: dict[str, np.ndarray] = {}
    unexpected, misfit = [], {}
    for name in tensors:
        found = tables.find(table, name.removeprefix(prefix))
        paths = found[1] if found else []
        if found is None or any(p not in want and p not in unwanted for p in paths):
            unexpected.append(name)
        elif all(p in want for p in paths) and paths:
            tensor = np.asarray(tensors[name])
            try:
                parts = np.split(tensor, len(paths)) if len(paths) > 1 else [tensor]
                got |= {p: from_file(p, part, want[p].shape) for p, part in zip(paths, parts, strict=True)}
            except ValueError as error:
                misfit |= dict.fromkeys(paths, f"{name} ({error})")
    missing = [p for p in want if p not in got and p not in misfit]
    if unexpected or missing or misfit:
        report = _report(source, missing, unexpected, list(misfit.values()))
        raise WeightsError(report + _hint(tensors, table))
    return unflatten_dict(got, sep="/")


def _report(source: str, missing: list[str], unexpected: list[str], misfit: list[str]) -> str:
    lines = [f"the weights{f' of {source}' if source else ''} do not fit this architecture:"]
    for title, names in (("of another size", misfit), ("missing", missing), ("unexpected", unexpected)):
        if names:
            groups = _grouped(names)
            more = f", and {len(groups) - SHOWN} more kinds" if len(groups) > SHOWN else ""
            lines.append(f"  {title} ({len(names)}): {', '.join(groups[:SHOWN])}{more}")
    return "\n".join(lines)


def _grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in the block's number only, as one: `block00/norm1/scale (and 11 more blocks)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(block|layers?\.)\d+", r"\1#", name), []).append(name)
    return [
        first if not others else f"{first} (and {len(others)} more block{'s' * (len(others) > 1)})"
        for first, *others in groups.values()
    ]


def _hint(names: Iterable[str], table: Table) -> str:
    kind = families.looks_like(names)
    known = {id(family.table): name for name, family in families.FAMILIES.items()} | {
        id(tables.DECODER_TABLE): families.A_DECODER
    }
    asked = known.get(id(table))
    if kind is None or kind == asked:
        return ""
    return f"\n  by its names it looks like {kind}" + (f", and {asked} was asked for" if asked else "")
