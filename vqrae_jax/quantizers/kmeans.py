"""The first codes of a codebook: k-means over one batch of latents.

Seeding follows k-means++ (Arthur & Vassilvitskii 2007: a new code is drawn with probability proportional to the squared
distance to the codes there are) in a few rounds of many codes, as k-means|| does (Bahmani et al. 2012,
arXiv:1203.6402), because K rounds of one code would take K passes. Then Lloyd's iterations. Everything is an operation
on the global batch: under `jit` over a mesh the result is that of one device.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vqrae_jax.quantizers.nearest import Distance, nearest, nearest_with_distance, unit
from vqrae_jax.quantizers.statistics import code_counts, code_totals

Start = Literal["kmeans", "data", "normal"]
First = Callable[[], tuple[Float[Array, "N C"], Bool[Array, " N"]]]  # the first latents, and which of them count

ROUNDS = 8  # of seeding
ITERATIONS = 5  # of Lloyd; on image features later ones hardly move the error on unseen images


def kmeans(
    key: PRNGKeyArray,
    z: Float[Array, "N C"],
    codes: Float[Array, "K C"],
    distance: Distance = "l2",
    keep: Bool[Array, " N"] | None = None,
) -> tuple[Float[Array, "K C"], Float[Array, " K"]]:
    """Codes and the number of latents that each stands for.

    With fewer latents than codes the surplus codes repeat latents and stand for none.

    Args:
      key: draws the seeds.
      z: latents, of unit length if the distance is "cosine". Rows that do not count may be NaN.
      codes: gives K, and its place in memory; its values are not read.
      distance: as in `nearest`.
      keep: latents that count; all where absent.
    """
    keep = jnp.ones(len(z), bool) if keep is None else keep
    codes = _seeds(key, z, codes, keep)

    # In float32 at once: in loops around a search by bfloat16 first XLA would store all rows in bfloat16 as well.
    def iterate(_, codes):
        indices = nearest(z, codes, distance, "float32")
        counts = code_counts(indices, len(codes), keep)
        means = code_totals(z, indices, len(codes), keep) / jnp.maximum(counts, 1)[:, None]
        means = unit(means) if distance == "cosine" else means
        return jnp.where(counts[:, None] > 0, means, codes)

    codes = jax.lax.fori_loop(0, ITERATIONS, iterate, codes)
    counts = code_counts(nearest(z, codes, distance, "float32"), len(codes), keep)
    return codes, counts.astype(jnp.float32)


def begin(
    begins: Bool[Array, ""],
    key: PRNGKeyArray,
    first: First,
    codes: Float[Array, "K C"],
    counts: Float[Array, " K"],
    start: Start,
    distance: Distance,
) -> tuple[Float[Array, "K C"], Float[Array, " K"]]:
    """Where `begins`, codes made from latents and the number of latents that each stands for; else both as given.

    Args:
      first: what it computes is computed only where `begins`. For "cosine" latents are brought to unit length.
      start: "kmeans" clusters the latents, "data" takes random ones of them, which stand for none.
      key, distance: as in `kmeans`.
    """

    def make(_, state):
        z, keep = first()
        z = unit(z) if distance == "cosine" else z
        if start == "kmeans":
            return kmeans(key, z, state[0], distance, keep)
        drawn = draw(key, keep.astype(jnp.float32), len(codes))
        return jnp.where(keep[drawn][:, None], z[drawn], 0.0), jnp.zeros_like(counts)

    # A loop of one turn or none: unlike the branches of a condition, it leaves the codebook in its place in memory.
    return jax.lax.fori_loop(0, begins.astype(jnp.int32), make, (codes, counts))


def draw(key: PRNGKeyArray, weights: Float[Array, " N"], count: int) -> Int[Array, " count"]:
    """Indices drawn with probability proportional to the weights, without repetition until all were drawn.

    By the largest of log weight + Gumbel noise (Efraimidis & Spirakis 2006), so that every device draws the same.
    """
    noisy = jnp.log(weights) + jax.random.gumbel(key, weights.shape)
    _, order = jax.lax.top_k(noisy, min(count, len(weights)))
    return order[jnp.arange(count) % len(order)]


def _seeds(
    key: PRNGKeyArray, z: Float[Array, "N C"], codes: Float[Array, "K C"], keep: Bool[Array, " N"]
) -> Float[Array, "K C"]:
    size, channels = codes.shape
    rounds = next(r for r in range(min(size, ROUNDS), 0, -1) if size % r == 0)

    def add(i, state):
        gap, seeds = state
        drawn = draw(jax.random.fold_in(key, i), jnp.where(keep, gap, 0.0), size // rounds)
        new = jnp.where(keep[drawn][:, None], z[drawn], 0.0)
        _, distance = nearest_with_distance(z, new, block="float32")
        # Round i fills rows i, i + rounds, ...: a codebook sharded over its rows stays where it is.
        return jnp.minimum(gap, distance), jax.lax.dynamic_update_index_in_dim(seeds, new, i, axis=1)

    seeds = codes.reshape(-1, rounds, channels)
    _, seeds = jax.lax.fori_loop(0, rounds, add, (jnp.ones(len(z)), seeds))
    return seeds.reshape(size, channels)
