"""The codes of many indices, with little memory beside the result also where the codebook is spread over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TURNS = 16  # so many times less memory than the result takes
TILE = 8  # rows that a TPU keeps together


def look_up(codebook: Float[Array, "K C"], indices: Int[Array, " N"]) -> Float[Array, "N C"]:
    """codebook[indices], exactly; no gradient passes.

    Where a mesh axis splits the codebook, every device fills in the rows that it holds and the devices add up: of the
    whole result that is a second copy, so it is done in turns. Turns take strided rows, because contiguous ones would
    cut the axis of rows, which another mesh axis splits.
    """
    codebook, indices = jax.lax.stop_gradient(jnp.asarray(codebook)), jnp.asarray(indices)
    turns = next((t for t in range(TURNS, 1, -1) if len(indices) % (t * TILE) == 0), 1)
    if turns == 1:
        return codebook[indices]
    parts = indices.reshape(-1, turns, TILE)

    def visit(i, rows):
        part = jax.lax.dynamic_index_in_dim(parts, i, axis=1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, codebook[part], i, axis=1)

    rows = jnp.zeros((*parts.shape, codebook.shape[1]), codebook.dtype)
    return jax.lax.fori_loop(0, turns, visit, rows).reshape(len(indices), -1)
