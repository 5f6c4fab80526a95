"""Entropies of soft assignments: sure about every latent, undecided over the whole batch."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vqrae_jax.quantizers.base import kept_mean


def entropies(probabilities: Float[Array, "N K"], keep: Bool[Array, " N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean entropy of the rows, and the entropy of the mean row; nats, over the rows that `keep` marks.

    A codebook is used well when the first is low and the second high (Yu et al. 2023, arXiv:2310.05737, eq. 4).
    """
    mean = jnp.sum(jnp.where(keep[:, None], probabilities, 0.0), axis=0) / jnp.maximum(jnp.sum(keep), 1)
    return kept_mean(_entropy(probabilities)[:, None], keep), _entropy(mean)


def _entropy(p: Float[Array, "*b K"]) -> Float[Array, "*b"]:
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)), axis=-1)
