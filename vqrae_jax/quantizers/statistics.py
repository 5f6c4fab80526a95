"""Rows of a codebook by index and sums of latents by index, with little memory and deterministic."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Indices, Mask, Rows

ONE_HOT_BLOCK = 512  # embeddings whose one-hot columns exist at once
GATHER_STEPS = 16  # by which the temporary memory of `gather_rows` is smaller than its result
GATHER_TILE = 8  # rows that a TPU stores together


def gather_rows(codebook: Codebook, indices: Indices) -> Rows:
    """Returns codebook[indices] exactly, without a gradient.

    If a mesh axis splits the codebook, every device fills in the rows that it holds and the devices add up. At once,
    that would take a second copy of the result, so it is done in steps. A step takes strided rows, because contiguous
    rows would cut the row axis, which another mesh axis splits.
    """
    codebook, indices = jax.lax.stop_gradient(jnp.asarray(codebook)), jnp.asarray(indices)
    steps = next((n for n in range(GATHER_STEPS, 1, -1) if len(indices) % (n * GATHER_TILE) == 0), 1)
    if steps == 1:
        return codebook[indices]
    parts = indices.reshape(-1, steps, GATHER_TILE)

    def visit(i, rows):
        part = jax.lax.dynamic_index_in_dim(parts, i, axis=1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, codebook[part], i, axis=1)

    rows = jnp.zeros((*parts.shape, codebook.shape[1]), codebook.dtype)
    return jax.lax.fori_loop(0, steps, visit, rows).reshape(len(indices), -1)


def code_counts(
    indices: Int[AnyArray, "*b"], num_embeddings: int, mask: Bool[AnyArray, "*b"] | None = None
) -> Int[Array, " K"]:
    """Returns how often each index occurs among the entries in `mask`; integers, so the order of adding is free."""
    flat = indices.reshape(-1)
    ones = jnp.ones_like(flat) if mask is None else mask.reshape(-1).astype(flat.dtype)
    return jax.ops.segment_sum(ones, flat, num_embeddings)


def code_totals(z: Rows, indices: Indices, num_embeddings: int, mask: Mask | None = None) -> Codebook:
    """Returns the float32 sum of the latents of each index, over the rows in `mask`; other rows may be NaN.

    A scatter-add adds in a fixed order on CPU and TPU. On a GPU its order is that of arrival, which changes the last
    bits from run to run, so a blocked one-hot product does it there.
    """
    if mask is not None:
        indices = jnp.where(mask, indices, num_embeddings)  # beyond the end: dropped, without a copy of z
    scatter = functools.partial(jax.ops.segment_sum, num_segments=num_embeddings)
    product = functools.partial(one_hot_totals, num_embeddings=num_embeddings)
    return jax.lax.platform_dependent(z.astype(jnp.float32), indices, cpu=scatter, tpu=scatter, default=product)


def one_hot_totals(z: Rows, indices: Indices, num_embeddings: int, block: int = ONE_HOT_BLOCK) -> Codebook:
    """Returns the same as `code_totals` by products with blocks of the one-hot matrix; drops indices out of range.

    The products are bfloat16, which is fast, and exact: a one has no rounding, and a latent is the sum of three
    bfloat16 parts.
    """
    clean = jnp.where(((indices >= 0) & (indices < num_embeddings))[:, None], z, 0.0)  # 0 * NaN is NaN
    parts = jnp.concatenate(_bfloat16_parts(clean), axis=1)

    def visit(_, start):
        selected = (indices == (start + jnp.arange(block))[:, None]).astype(jnp.bfloat16)
        totals = jnp.dot(selected, parts, preferred_element_type=jnp.float32)
        return None, totals.reshape(block, 3, -1).sum(1)

    _, totals = jax.lax.scan(visit, None, jnp.arange(0, num_embeddings, block))
    return totals.reshape(-1, z.shape[1])[:num_embeddings]


def _bfloat16_parts(x: Float[AnyArray, "*b C"]) -> list[Float[Array, "*b C"]]:
    """Splits x into three bfloat16 arrays that add up to it."""
    parts = []
    for _ in range(3):
        # Not a conversion to bfloat16 and back, which XLA may remove.
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts
