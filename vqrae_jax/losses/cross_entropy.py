"""Cross-entropy of large vocabularies in blocks, forward and backward, without the logits of all entries at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 8192  # entries whose logits exist at once
LANES = 256  # contiguous parts of the table, which may be sharded as many ways: every block has rows of all lanes


def cross_entropy(
    hidden: Float[Array, "*b D"],
    table: Float[Array, "K D"],
    bias: Float[Array, " K"],
    targets: Int[Array, "*b"],
    smoothing: float = 0.0,
    block: int = BLOCK,
    shard: Callable[[Any], Any] = lambda logits: logits,
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """Returns -log p(target), and whether no entry is more probable, for the logits hidden @ table^T + bias.

    Args:
      hidden: its dtype is that of the products; logits, sums and results are float32.
      targets: in [0, K).
      smoothing: share of the target's probability that is spread over all entries (Szegedy et al. 2016).
      block: larger vocabularies are visited in blocks of about this size; the gradient computes their logits again.
      shard: identity that constrains the sharding of logits, as tables that are split over "data" would decide it.
    """
    dtype, wide = hidden.dtype, hidden.astype(jnp.float32)  # the gradient is summed over blocks in float32
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    products = {"precision": precision, "preferred_element_type": jnp.float32}

    def visit(carry: Any, part: Any) -> Any:
        (largest, total, target), (rows, offsets, entries) = carry, part
        logits = shard(jnp.einsum("...d,lsd->...ls", wide.astype(dtype), rows.astype(dtype), **products) + offsets)
        higher = jnp.maximum(largest, jax.lax.stop_gradient(logits.max((-2, -1))))
        total = total * jnp.exp(largest - higher) + jnp.exp(logits - higher[..., None, None]).sum((-2, -1))
        target += jnp.where(entries == targets[..., None, None], logits, 0.0).sum((-2, -1))
        return (higher, total, target), None

    carry = tuple(jnp.full(targets.shape, value, jnp.float32) for value in (-jnp.inf, 0.0, 0.0))
    parts = [_split(x, block, fill) for x, fill in ((table, 0), (bias, -jnp.inf), (jnp.arange(len(table)), -1))]
    if len(parts[0]) == 1:
        (largest, total, target), _ = visit(carry, [x[0] for x in parts])
    else:
        (largest, total, target), _ = jax.lax.scan(jax.checkpoint(visit, prevent_cse=False), carry, parts)
    nats = jnp.log(total) + largest - (1 - smoothing) * target
    if smoothing:
        nats -= smoothing * (jnp.dot(wide, table.mean(0), precision=precision) + bias.mean())
    return nats, target >= largest


def _split(x: Any, block: int, fill: float | int) -> Any:
    """Cuts [K, ...] into [blocks, lanes, rows, ...], padded by `fill`."""
    lanes = min(LANES, len(x) & -len(x), block)  # a power of two that divides K
    blocks = math.ceil(len(x) / block)
    x = x.reshape(lanes, -1, *x.shape[1:])
    width = math.ceil(x.shape[1] / blocks)
    x = jnp.pad(x, ((0, 0), (0, width * blocks - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(lanes, blocks, width, *x.shape[2:]).swapaxes(0, 1)
