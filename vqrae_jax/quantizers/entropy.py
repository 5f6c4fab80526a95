"""Entropies of soft assignments: sure about every latent, undecided over the whole batch."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vqrae_jax.quantizers.base import kept_mean
from vqrae_jax.quantizers.blocks import strided

SOFT_BLOCK = 2**24  # probabilities that exist at once (64 MiB)


def entropies(probabilities: Float[Array, "N K"], keep: Bool[Array, " N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean entropy of the rows, and the entropy of the mean row; nats, over the rows that `keep` marks.

    A codebook is used well when the first is low and the second high (Yu et al. 2023, arXiv:2310.05737, eq. 4).
    """
    mean = jnp.sum(jnp.where(keep[:, None], probabilities, 0.0), axis=0) / jnp.maximum(jnp.sum(keep), 1)
    return kept_mean(_entropy(probabilities)[:, None], keep), _entropy(mean)


def diversity(
    z: Float[Array, "N C"],
    codebook: Float[Array, "K C"],
    keep: Bool[Array, " N"],
    temperature: float,
    block: int = SOFT_BLOCK,
) -> Float[Array, ""]:
    """log K less the entropy of the batch's mean soft code: zero where all codes are used alike; nats, in [0, log K].

    The soft code of a latent is softmax(-|z - code|^2 / temperature), the second term of Yu et al. 2023
    (arXiv:2310.05737, eq. 4). Latents and codes receive its gradient. Blocks of rows are visited one by one, forwards
    and backwards, so that no N x K matrix exists.

    Args:
      keep: rows that count; where none does, the result is log K.
      block: probabilities that exist at once, at least K.
    """
    rows = max(1, block // len(codebook))
    # The blocks are scanned, not sliced in turn: the gradient of a slice is as large as what it was cut from.
    blocks = (strided(z, rows).swapaxes(0, 1), strided(keep, rows).swapaxes(0, 1))

    @jax.checkpoint
    def use(z: Float[Array, "R C"], keep: Bool[Array, " R"], codes: Float[Array, "K C"]) -> Float[Array, " K"]:
        logits = 2 * jnp.dot(z, codes.T, precision=jax.lax.Precision.HIGHEST) - jnp.sum(codes**2, axis=1)
        return jnp.sum(jnp.where(keep[:, None], jax.nn.softmax(logits / temperature, axis=-1), 0.0), axis=0)

    def visit(total, part):
        return total + use(*part, codebook), None

    total, _ = jax.lax.scan(visit, jnp.zeros(len(codebook)), blocks)
    return math.log(len(codebook)) - _entropy(total / jnp.maximum(jnp.sum(keep), 1))


def _entropy(p: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)), axis=-1)
