"""Rows and codes cut into blocks in such a way that neither has to leave the device that holds it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

LANES = 8  # contiguous parts of the codebook, searched side by side; a codebook may be sharded this many ways


class Block(NamedTuple):
    """How many rows are compared with how many codes at once."""

    rows: int
    codes: int


class Screen(NamedTuple):
    """The same of the search that looks at bfloat16 products first (`screened`); None: all at once."""

    rows: int | None
    codes: int | None


def over_rows(function: Callable[..., Any], rows: int, *arrays: Shaped[Array, " N *c"]) -> Any:
    """`function` of blocks of about `rows` rows, one after the other; results in the order of the rows."""
    n = len(arrays[0])
    if n <= rows:
        return function(*arrays)
    blocks = [strided(x, rows) for x in arrays]

    def visit(_: None, i: jax.Array) -> tuple[None, Any]:
        return None, function(*(jax.lax.dynamic_index_in_dim(b, i, axis=1, keepdims=False) for b in blocks))

    _, found = jax.lax.scan(visit, None, jnp.arange(blocks[0].shape[1]))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n], found)


def strided(x: Shaped[Array, " N *c"], rows: int) -> Shaped[Array, "R S *c"]:
    """Rows in S blocks of about `rows`: block i holds rows i, i + S, ...; where R S > N, the last rows are zero.

    Contiguous blocks would cut the row axis, and a loop over a sharded axis gathers it.
    """
    n = len(x)
    size = _largest_divisor(n, rows)
    if 4 * size < min(n, rows):
        size = min(n, rows)
        x = jnp.pad(x, ((0, -n % size), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(size, -1, *x.shape[1:])


def lanes_of(
    codes: Float[Array, "K C"], offsets: Float[Array, " K"], block: int
) -> tuple[Float[Array, "L S C"], Float[Array, "L S"], int]:
    """Codes in L contiguous lanes, and how many of each lane make a block; the padding is infinitely far."""
    size = len(codes)
    lanes = min(LANES, size & -size)  # a power of two that divides K
    width = max(1, min(block, size) // lanes)
    padding = -(size // lanes) % width
    return (
        jnp.pad(codes.reshape(lanes, size // lanes, -1), ((0, 0), (0, padding), (0, 0))),
        jnp.pad(offsets.reshape(lanes, -1), ((0, 0), (0, padding)), constant_values=jnp.inf),
        width,
    )


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
