"""Masked (absorbing) discrete diffusion over indices: the masking process and its losses.

At time t in [0, 1] every index of an image is hidden, independently of the others, with probability `hidden_share(t)`:
0 at t = 0, 1 at t = 1. A network predicts the hidden indices from the others. MaskGIT's loss is the mean over hidden
positions (Chang et al. 2022, arXiv:2202.04200); their sum, weighted by time, bounds the likelihood (Shi et al. 2024,
arXiv:2406.04329; Sahoo et al. 2024, arXiv:2406.07524).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Schedule = Literal["cosine", "linear"]


class Masked(NamedTuple):
    """Partly hidden indices.

    Attributes:
      indices: [B, N]; hidden ones are K, the size of the codebook.
      hidden: [B, N], which indices are hidden.
      weight: [B], hidden_share'(t) / hidden_share(t) at each row's time, for `bound`.
    """

    indices: Int[Array, "B N"]
    hidden: Bool[Array, "B N"]
    weight: Float[Array, " B"]


def hidden_share(time: Float[Array, "*b"], schedule: Schedule = "cosine") -> Float[Array, "*b"]:
    """Returns the share of hidden positions at `time`; "cosine" is sin(pi t / 2), which hides more at most times."""
    return time if schedule == "linear" else jnp.sin(jnp.pi / 2 * time)


def mask(key: PRNGKeyArray, indices: Int[Array, "B N"], num_embeddings: int, schedule: Schedule = "cosine") -> Masked:
    """Hides indices, in [0, num_embeddings), for training.

    The times of the rows are spread evenly over the batch (Kingma et al. 2021).
    """
    time_key, position_key = jax.random.split(key)
    rows = len(indices)
    time = 1 - (jax.random.uniform(time_key) + jnp.arange(rows) / rows) % 1  # in (0, 1]
    share = hidden_share(time, schedule)
    hidden = jax.random.uniform(position_key, indices.shape) < share[:, None]
    slope = jnp.ones_like(time) if schedule == "linear" else jnp.pi / 2 * jnp.cos(jnp.pi / 2 * time)
    return Masked(jnp.where(hidden, num_embeddings, indices), hidden, slope / share)


def cross_entropy(logits: Float[Array, "B N K"], indices: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Returns -log p(index) in nats, float32."""
    logits = logits.astype(jnp.float32)
    correct = jnp.take_along_axis(logits, indices[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - correct


def masked_mean(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """Returns MaskGIT's loss: the mean cross-entropy of hidden indices in nats; 0 if none is hidden."""
    return jnp.sum(jnp.where(masked.hidden, nats, 0.0)) / jnp.maximum(jnp.sum(masked.hidden), 1)


def bound(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """Returns an unbiased estimate of an upper bound on -log p(indices), in nats per index (Shi et al. 2024).

    The bound is the integral over time of hidden_share'(t) / hidden_share(t) times the cross-entropies of the indices
    hidden at t.
    """
    hidden = jnp.where(masked.hidden, nats, 0.0)
    return jnp.mean(masked.weight * jnp.mean(hidden, axis=1))
