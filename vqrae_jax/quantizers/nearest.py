"""Exact nearest-code search that never holds the N x K matrix of distances."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 4096  # codes compared at once


def nearest(z: Float[Array, "N C"], codebook: Float[Array, "K C"], block: int = BLOCK) -> Int[Array, " N"]:
    """The index of the L2-nearest code of each row; ties go to the lowest index.

    Walks over the codebook in blocks and keeps the best so far, so memory is N * block. Distances are float32 whatever
    the input: in bfloat16 about one token in a hundred changes its code.
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    size = len(codebook)
    if size <= block:
        return jnp.argmin(_scores(z, codebook), axis=1).astype(jnp.int32)
    blocks = -(-size // block)
    padded = jnp.pad(codebook, ((0, blocks * block - size), (0, 0)), constant_values=jnp.inf)

    def visit(best, part):
        start, codes = part
        scores = jnp.where(jnp.isnan(s := _scores(z, codes)), jnp.inf, s)  # padding scores inf - inf
        here = jnp.argmin(scores, axis=1)
        score = jnp.min(scores, axis=1)
        better = score < best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, start + here, best[1])), None

    first = (jnp.full(len(z), jnp.inf), jnp.zeros(len(z), jnp.int32))
    parts = (jnp.arange(blocks, dtype=jnp.int32) * block, padded.reshape(blocks, block, -1))
    return jax.lax.scan(visit, first, parts)[0][1]


def _scores(z: Float[Array, "N C"], codebook: Float[Array, "K C"]) -> Float[Array, "N K"]:
    """Squared distance less |z|^2, which is the same for all codes."""
    return jnp.sum(codebook**2, axis=1) - 2 * jnp.dot(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
