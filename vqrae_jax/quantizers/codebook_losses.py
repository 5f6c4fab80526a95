"""Losses that keep a codebook in use: entropies of soft assignments, diversity and orthogonality."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Mask, Rows, Scalar
from vqrae_jax.quantizers.base import masked_mean
from vqrae_jax.quantizers.blocks import strided
from vqrae_jax.quantizers.nearest import unit

SOFT_BLOCK = 2**24  # probabilities that exist at once (64 MiB)


def entropies(probabilities: Float[AnyArray, "N K"], mask: Mask) -> tuple[Scalar, Scalar]:
    """Returns the mean entropy of the rows in `mask` and the entropy of their mean, in nats.

    A codebook is used well if the first is low and the second high (Yu et al. 2023, arXiv:2310.05737, eq. 4).
    """
    mean = jnp.sum(jnp.where(mask[:, None], probabilities, 0.0), axis=0) / jnp.maximum(jnp.sum(mask), 1)
    return masked_mean(_entropy(probabilities)[:, None], mask), _entropy(mean)


def diversity(z: Rows, codebook: Codebook, mask: Mask, temperature: float, block: int = SOFT_BLOCK) -> Scalar:
    """Returns log K minus the entropy of the mean soft assignment, in nats, in [0, log K]; 0: all are used equally.

    The soft assignment of a latent is softmax(-|z - e|^2 / temperature) over the embeddings e, as in the second term of
    Yu et al. 2023 (arXiv:2310.05737, eq. 4). Latents and codebook receive its gradient. Blocks of rows are visited one
    by one, forwards and backwards: only `block` probabilities exist at once, at least K. An empty mask gives log K.
    """
    rows = max(1, block // len(codebook))
    # The blocks are scanned, not sliced one by one: the gradient of a slice is as large as the array it is cut from.
    blocks = (strided(z, rows).swapaxes(0, 1), strided(mask, rows).swapaxes(0, 1))

    @jax.checkpoint
    def soft_counts(z: Float[AnyArray, "R C"], mask: Bool[AnyArray, " R"], codebook: Codebook) -> Array:
        logits = 2 * jnp.dot(z, codebook.T, precision=jax.lax.Precision.HIGHEST) - jnp.sum(codebook**2, axis=1)
        return jnp.sum(jnp.where(mask[:, None], jax.nn.softmax(logits / temperature, axis=-1), 0.0), axis=0)

    def visit(total, part):
        return total + soft_counts(*part, codebook), None

    total, _ = jax.lax.scan(visit, jnp.zeros(len(codebook)), blocks)
    return math.log(len(codebook)) - _entropy(total / jnp.maximum(jnp.sum(mask), 1))


def orthogonality(codebook: Codebook) -> Scalar:
    """Returns the mean squared cosine between embeddings, in [0, 1] (Shin et al. 2021, arXiv:2112.00384).

    This is |U U^T - I|^2 / K^2 for the unit embeddings U, computed as (|U^T U|^2 - K) / K^2, which needs a C x C matrix
    instead of K x K.
    """
    units = unit(codebook)
    gram = jnp.dot(units.T, units, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(gram**2) - len(units), 0.0) / len(units) ** 2


def _entropy(p: Float[AnyArray, "*b K"]) -> Float[Array, "*b"]:
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)), axis=-1)
