"""Sums over the latents of each code, without the N x K one-hot matrix and the same at every run."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ONE_HOT_BLOCK = 512  # codes whose one-hot columns exist at once


def code_counts(
    indices: Int[Array, "*b"], num_embeddings: int, keep: Bool[Array, "*b"] | None = None
) -> Int[Array, " K"]:
    """How often each code occurs among the entries that `keep` marks. Integers: any order of adding gives the same."""
    flat = indices.reshape(-1)
    ones = jnp.ones_like(flat) if keep is None else keep.reshape(-1).astype(flat.dtype)
    return jax.ops.segment_sum(ones, flat, num_embeddings)


def code_totals(
    z: Float[Array, "N C"], indices: Int[Array, " N"], num_embeddings: int, keep: Bool[Array, " N"] | None = None
) -> Float[Array, "K C"]:
    """The sum of the latents of each code, among the rows that `keep` marks; float32. Other rows may be NaN.

    A scatter-add adds in a fixed order on CPU and TPU. On a GPU it would add in the order of arrival, which changes the
    last bits from run to run, so there a blocked one-hot matmul does it.
    """
    if keep is not None:
        indices = jnp.where(keep, indices, num_embeddings)  # beyond the end: dropped, and z need not be copied
    return jax.lax.platform_dependent(
        z.astype(jnp.float32),
        indices,
        cpu=lambda z, i: jax.ops.segment_sum(z, i, num_embeddings),
        tpu=lambda z, i: jax.ops.segment_sum(z, i, num_embeddings),
        default=lambda z, i: one_hot_totals(z, i, num_embeddings),
    )


def one_hot_totals(
    z: Float[Array, "N C"], indices: Int[Array, " N"], num_embeddings: int, block: int = ONE_HOT_BLOCK
) -> Float[Array, "K C"]:
    """The same by matmuls with blocks of the one-hot matrix; indices outside [0, num_embeddings) are dropped.

    They multiply bfloat16, which is fast, and lose nothing: a one is exact, a latent the sum of three such parts.
    """
    clean = jnp.where(((indices >= 0) & (indices < num_embeddings))[:, None], z, 0.0)  # 0 * NaN is NaN
    parts = jnp.concatenate(_bfloat16_parts(clean), axis=1)

    def visit(_, start):
        chosen = (indices == (start + jnp.arange(block))[:, None]).astype(jnp.bfloat16)
        totals = jnp.dot(chosen, parts, preferred_element_type=jnp.float32)
        return None, totals.reshape(block, 3, -1).sum(1)

    _, totals = jax.lax.scan(visit, None, jnp.arange(0, num_embeddings, block))
    return totals.reshape(-1, z.shape[1])[:num_embeddings]


def _bfloat16_parts(x: Float[Array, "*b C"]) -> list[Float[Array, "*b C"]]:
    """Three arrays of eight bits of mantissa each, whose sum is x."""
    parts = []
    for _ in range(3):
        # Not a conversion there and back, which XLA may leave out.
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts
