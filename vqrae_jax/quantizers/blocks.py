"""Blocks of rows and of a codebook whose layout keeps both on the devices that hold them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

LANES = 8  # contiguous parts of the codebook that are searched in parallel; a codebook may be sharded this many ways


class Block(NamedTuple):
    """The number of rows and of embeddings that are compared at once in float32."""

    rows: int
    codes: int


class Screen(NamedTuple):
    """The number of rows and of embeddings that are compared at once in bfloat16 (`screened`); None: all."""

    rows: int | None
    codes: int | None


def map_rows(function: Callable[..., Any], rows: int, *arrays: Shaped[Array, " N ..."]) -> Any:
    """Applies `function` to blocks of about `rows` rows, one after the other; results keep the order of the rows."""
    n = len(arrays[0])
    if n <= rows:
        return function(*arrays)
    blocks = [strided(x, rows) for x in arrays]

    def visit(_: None, i: jax.Array) -> tuple[None, Any]:
        return None, function(*(jax.lax.dynamic_index_in_dim(b, i, axis=1, keepdims=False) for b in blocks))

    _, results = jax.lax.scan(visit, None, jnp.arange(blocks[0].shape[1]))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n], results)


def strided(x: Shaped[Array, " N ..."], rows: int) -> Shaped[Array, " R S ..."]:
    """Cuts rows into S blocks of about `rows`: block i holds rows i, i + S, ...; if R S > N, the last rows are zero.

    Contiguous blocks would cut the row axis, and a loop over a sharded axis gathers it.
    """
    n = len(x)
    size = next(d for d in range(min(n, rows), 0, -1) if n % d == 0)
    if 4 * size < min(n, rows):
        size = min(n, rows)
        x = jnp.pad(x, ((0, -n % size), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(size, -1, *x.shape[1:])


def split_lanes(
    codebook: Float[Array, "K C"], offsets: Float[Array, " K"], block: int
) -> tuple[Float[Array, "L S C"], Float[Array, "L S"], int]:
    """Splits a codebook into L contiguous lanes, padded by infinite offsets; also returns the rows of each block."""
    size = len(codebook)
    lanes = min(LANES, size & -size)  # a power of two that divides K
    width = max(1, min(block, size) // lanes)
    padding = -(size // lanes) % width
    codebook = jnp.pad(codebook.reshape(lanes, size // lanes, -1), ((0, 0), (0, padding), (0, 0)))
    offsets = jnp.pad(offsets.reshape(lanes, -1), ((0, 0), (0, padding)), constant_values=jnp.inf)
    return codebook, offsets, width
