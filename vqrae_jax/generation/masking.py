"""Masked (absorbing) discrete diffusion over codes: what is hidden when, and what learning to restore it is worth.

At time t in [0, 1] every position of a picture's codes is hidden, independently of the others, with probability
`hidden_share(t)`: none at t = 0, all at t = 1. A network predicts the hidden codes from the others. Its loss is the
mean over hidden positions in MaskGIT (Chang et al. 2022, arXiv:2202.04200); their sum, weighed by time, bounds the
likelihood (Shi et al. 2024, arXiv:2406.04329; Sahoo et al. 2024, arXiv:2406.07524).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Schedule = Literal["cosine", "linear"]


class Masked(NamedTuple):
    """Codes of which some are hidden.

    Attributes:
      codes: with K, the size of the codebook, in place of what is hidden.
      hidden: where.
      weight: hidden_share'(t) / hidden_share(t) of each row's time, which `bound` weighs it by.
    """

    codes: Int[Array, "B N"]
    hidden: Bool[Array, "B N"]
    weight: Float[Array, " B"]


def hidden_share(time: Float[Array, "*b"], schedule: Schedule = "cosine") -> Float[Array, "*b"]:
    """The share of positions that is hidden at `time`; "cosine", sin(pi t / 2), stays longer where much is hidden."""
    return time if schedule == "linear" else jnp.sin(jnp.pi / 2 * time)


def mask(key: PRNGKeyArray, codes: Int[Array, "B N"], num_embeddings: int, schedule: Schedule = "cosine") -> Masked:
    """Hides codes for training: a time for every row, evenly spread over the batch (Kingma et al. 2021).

    Args:
      codes: in [0, num_embeddings).
    """
    for_time, for_places = jax.random.split(key)
    rows = len(codes)
    time = 1 - (jax.random.uniform(for_time) + jnp.arange(rows) / rows) % 1  # in (0, 1]
    share = hidden_share(time, schedule)
    hidden = jax.random.uniform(for_places, codes.shape) < share[:, None]
    slope = jnp.ones_like(time) if schedule == "linear" else jnp.pi / 2 * jnp.cos(jnp.pi / 2 * time)
    return Masked(jnp.where(hidden, num_embeddings, codes), hidden, slope / share)


def cross_entropy(logits: Float[Array, "B N K"], codes: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """-log p(code) in nats, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def masked_mean(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """MaskGIT's loss: the mean cross-entropy of what is hidden, nats; 0 where nothing is."""
    return jnp.sum(jnp.where(masked.hidden, nats, 0.0)) / jnp.maximum(jnp.sum(masked.hidden), 1)


def bound(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """An estimate without bias of an upper bound on -log p(codes), in nats per code (Shi et al. 2024).

    It is the integral over time of hidden_share'(t) / hidden_share(t) times the cross-entropies of what is hidden at t.
    """
    hidden = jnp.where(masked.hidden, nats, 0.0)
    return jnp.mean(masked.weight * jnp.mean(hidden, axis=1))
