"""Autoregression over codes: orders of prediction, and sampling with a cache in one loop.

The loss is the mean of the cross-entropies of codes given those before them: in raster order, or in `permuted_orders`
of RAR (Yu et al. 2024, arXiv:2411.00776).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vqrae_jax.generation.sampling import guide, sample_codes

# Maps a state, the code before code t [R] (K if t is 0), and t to the logits of code t [R, F] and the next state.
Step = Callable[[Any, Int[Array, " R"], Int[Array, ""]], tuple[Float[Array, "R F"], Any]]
Schedule = Float[Array, "*T"] | float  # one value, or one for each code


def permuted_orders(key: PRNGKeyArray, shape: tuple[int, int], randomness: Schedule) -> Int[Array, "B N"]:
    """Returns orders [B, N] of positions: random with probability `randomness`, otherwise 0, 1, ..."""
    order_key, choice_key = jax.random.split(key)
    raster = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    permuted = jax.random.permutation(order_key, raster, axis=1, independent=True)
    return jnp.where(jax.random.uniform(choice_key, (shape[0], 1)) < randomness, permuted, raster)


def anneal_randomness(step: Int[Array, ""] | int, start: int, end: Int[Array, ""] | int) -> Float[Array, ""]:
    """Returns RAR's probability of random orders: 1 until step `start`, then linear to 0 at step `end`."""
    return jnp.clip((end - step) / jnp.maximum(end - start, 1), 0.0, 1.0)


def sample(
    step: Step,
    state: Any,
    key: PRNGKeyArray,
    indices: Int[Array, "B T"],
    num_embeddings: int,
    rows: Int[Array, " B"] | None = None,
    temperature: Schedule = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: Schedule | None = None,
    factors: Sequence[int] = (),
) -> Int[Array, "B T"]:
    """Samples the hidden indices one after the other and keeps the others; returns int32 indices in [0, K).

    Args:
      step: predicts a code from the one before, for B rows, or 2 B with guidance.
      state: of `step`, before the first code.
      key: seed of all samples.
      indices: `num_embeddings` (K) where hidden: everywhere for new images, after a prefix to continue it. Indices that
        are kept have an effect on later ones only.
      rows: numbers of the samples, by default 0 to B - 1. Noise depends on `key` and this number only, not on the mesh
        nor on the batch.
      temperature: divides the logits; 0 chooses the most probable code.
      top_k: number of most probable entries that are sampled, and all as probable as the last. None: all.
      top_p: the most probable entries whose sum reaches it are sampled, in (0, 1] (Holtzman et al. 2020). None: all.
      guidance: scale s of classifier-free guidance (Ho & Salimans 2022): u + (1 + s) (c - u) for the logits c and u of
        two rows in succession, labelled by `sampling.pair_labels`. None: one row for each image.
      factors: sizes of digits whose logits follow each other; (): the logits are of whole codes.
    """
    (batch, length), fold = indices.shape, jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch) if rows is None else rows)
    truncate = functools.partial(truncate_logits, top_k=top_k, top_p=top_p)
    schedules = (jnp.broadcast_to(jnp.float32(x), length) for x in (temperature, 0.0 if guidance is None else guidance))

    def visit(carry: tuple[Any, Any], inputs: Any) -> tuple[tuple[Any, Any], Any]:
        (state, previous), (t, current, heat, scale) = carry, inputs
        logits, state = step(state, previous if guidance is None else jnp.repeat(previous, 2), t)
        logits = logits.astype(jnp.float32)
        logits = (logits if guidance is None else guide(logits, scale)) / jnp.maximum(heat, 1e-6)
        sampled, _ = sample_codes(fold(keys, t), logits, factors or (num_embeddings,), truncate)
        code = jnp.where(current < num_embeddings, current, sampled).astype(jnp.int32)
        return (state, code), code

    first = jnp.full(batch, num_embeddings, jnp.int32)
    _, codes = jax.lax.scan(visit, (state, first), (jnp.arange(length), indices.T, *schedules))
    return codes.T


def truncate_logits(logits: Float[Array, "*b F"], top_k: int | None, top_p: float | None) -> Float[Array, "*b F"]:
    """Sets logits of improbable entries to -inf; see `sample`."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered)
        count = jnp.sum(jnp.cumsum(share, axis=-1) - share < top_p, axis=-1, keepdims=True)
        logits = jnp.where(logits < jnp.take_along_axis(ordered, count - 1, axis=-1), -jnp.inf, logits)
    return logits
