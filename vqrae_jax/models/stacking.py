"""Two ways to hold the parameters of a network's blocks: one tree each, or stacked along a leading axis for a scan."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """{block00: ..., block01: ..., rest} -> {blocks: stacked along a leading axis, rest}."""
    names = sorted(n for n in params if re.fullmatch(r"block\d+", n))
    rest = {n: p for n, p in params.items() if n not in names}
    return {**rest, "blocks": jax.tree.map(_stack, *(params[n] for n in names))}


def _stack(*leaves: Any) -> Any:
    # What was read from files stays on the host, and is placed from there.
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    stacked = params["blocks"]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    single = {f"block{i:02d}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
    return {**{n: p for n, p in params.items() if n != "blocks"}, **single}


def stacked_blocks(params: dict[str, Any], name: str = "") -> dict[str, bool]:
    """Of every network in params, by name, whether its blocks are stacked."""
    if not isinstance(params, dict):
        return {}
    found = {}
    if "blocks" in params or "block00" in params:
        found[name] = "blocks" in params
    for n, tree in params.items():
        found |= stacked_blocks(tree, n)
    return found


def restack_blocks(tree: Any, stacked: dict[str, bool], name: str = "") -> Any:
    """`tree`, any nest that holds trees of params (an optimizer's state, say), with blocks as `stacked_blocks` says."""
    if isinstance(tree, dict):
        if stacked.get(name) and "block00" in tree:
            return stack_blocks(tree)
        if stacked.get(name) is False and "blocks" in tree:
            return unstack_blocks(tree)
        return {n: restack_blocks(value, stacked, n) for n, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [restack_blocks(part, stacked, name) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree
