"""k-means over one batch of latents: the first codes of a codebook.

Seeding follows k-means++ (Arthur & Vassilvitskii 2007: a new code is drawn with probability proportional to the squared
distance to the codes there are) in a few rounds of many codes, as k-means|| does (Bahmani et al. 2012,
arXiv:1203.6402), because K rounds of one code would take K passes. Then Lloyd's iterations. Everything is an operation
on the global batch: under `jit` over a mesh the result is that of one device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vqrae_jax.quantizers.nearest import Distance, nearest, unit
from vqrae_jax.quantizers.statistics import code_counts, code_totals

ROUNDS = 8  # of seeding
ITERATIONS = 5  # of Lloyd; on image features later ones hardly move the error on unseen images


def kmeans(
    key: PRNGKeyArray,
    z: Float[Array, "N C"],
    num_embeddings: int,
    distance: Distance = "l2",
    keep: Bool[Array, " N"] | None = None,
) -> tuple[Float[Array, "K C"], Int[Array, " K"]]:
    """Codes and the number of latents that each stands for.

    With fewer latents than codes the surplus codes repeat latents and stand for none.

    Args:
      key: draws the seeds.
      z: latents, finite; unit length if the distance is "cosine".
      num_embeddings: K.
      distance: as in `nearest`.
      keep: latents that count; all where absent.
    """
    keep = jnp.ones(len(z), bool) if keep is None else keep
    codes = _seeds(key, z, num_embeddings, distance, keep)

    def iterate(_, codes):
        indices = nearest(z, codes, distance)
        counts = code_counts(indices, num_embeddings, keep)
        totals = code_totals(jnp.where(keep[:, None], z, 0), indices, num_embeddings)
        means = totals / jnp.maximum(counts, 1)[:, None]
        means = unit(means) if distance == "cosine" else means
        return jnp.where(counts[:, None] > 0, means, codes)

    codes = jax.lax.fori_loop(0, ITERATIONS, iterate, codes)
    return codes, code_counts(nearest(z, codes, distance), num_embeddings, keep)


def draw(key: PRNGKeyArray, weights: Float[Array, " N"], count: int) -> Int[Array, " count"]:
    """Indices drawn with probability proportional to the weights, without repetition until all were drawn.

    By the largest of log weight + Gumbel noise (Efraimidis & Spirakis 2006), so that every device draws the same.
    """
    noisy = jnp.log(weights) + jax.random.gumbel(key, weights.shape)
    _, order = jax.lax.top_k(noisy, min(count, len(weights)))
    return order[jnp.arange(count) % len(order)]


def _seeds(
    key: PRNGKeyArray, z: Float[Array, "N C"], num_embeddings: int, distance: Distance, keep: Bool[Array, " N"]
) -> Float[Array, "K C"]:
    share = -(-num_embeddings // ROUNDS)

    def add(carry, key):
        gap = carry
        codes = z[draw(key, jnp.where(keep, gap, 0.0), share)]
        new = jnp.sum((z - codes[nearest(z, codes, distance)]) ** 2, axis=1)
        return jnp.minimum(gap, new), codes

    _, codes = jax.lax.scan(add, jnp.ones(len(z)), jax.random.split(key, ROUNDS))
    return codes.reshape(-1, z.shape[1])[:num_embeddings]
