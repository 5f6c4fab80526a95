"""Masked (absorbing) discrete diffusion over indices: the masking process and its losses.

At time t in [0, 1] every index of an image is hidden, independently of the others, with probability `hidden_share(t)`:
0 at t = 0, 1 at t = 1. A network predicts the hidden indices from the others. MaskGIT's loss is the mean over hidden
positions (Chang et al. 2022, arXiv:2202.04200); their sum, weighted by time, bounds the likelihood (Shi et al. 2024,
arXiv:2406.04329; Sahoo et al. 2024, arXiv:2406.07524).
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Schedule = Literal["cosine", "linear", "arccos"]


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
    """Returns the share of hidden positions at `time`, MaskGIT's gamma(r) at progress r = 1 - time.

    "linear" is 1 - r, "cosine" cos(pi r / 2) and "arccos" 2 arccos(r) / pi. The last two hide more at all times, so
    that sampling begins with few indices per step, and 64 % on average; "arccos" rarely hides few, "cosine" mostly
    almost all.
    """
    if schedule == "arccos":
        return 4 / jnp.pi * jnp.arcsin(jnp.sqrt(time / 2))  # accurate near 0, where arccos(1 - time) is not
    return time if schedule == "linear" else jnp.sin(jnp.pi / 2 * time)


def mask(
    key: PRNGKeyArray,
    indices: Int[Array, "B N"],
    num_embeddings: int,
    schedule: Schedule = "cosine",
    max_snr: float = math.inf,
) -> Masked:
    """Hides indices, in [0, num_embeddings), for training.

    The times of the rows are spread evenly over the batch (Kingma et al. 2021).

    Args:
      max_snr: limit of the ratio of visible to hidden positions in the weight, as in min-SNR (Hang et al. 2023,
        arXiv:2303.09556), usually 5. The gradients vary less, and `bound` is not a bound any more.
    """
    time_key, position_key = jax.random.split(key)
    rows = len(indices)
    time = 1 - (jax.random.uniform(time_key) + jnp.arange(rows) / rows) % 1  # in (0, 1]
    share, slope = jax.jvp(lambda t: hidden_share(t, schedule), (time,), (jnp.ones_like(time),))
    hidden = jax.random.uniform(position_key, indices.shape) < share[:, None]
    weight = slope * (1 + jnp.minimum((1 - share) / share, max_snr))
    return Masked(jnp.where(hidden, num_embeddings, indices), hidden, weight)


def cross_entropy(
    logits: Float[Array, "B N K"], indices: Int[Array, "B N"], smoothing: float = 0.0
) -> Float[Array, "B N"]:
    """Returns -log p(index) in nats, float32.

    Args:
      smoothing: probability of the target that is spread evenly over all K indices; MaskGIT trains with 0.1.
    """
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, indices[..., None], axis=-1)[..., 0]
    if smoothing:
        target = (1 - smoothing) * target + smoothing * jnp.mean(logits, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target


def masked_mean(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """Returns MaskGIT's loss: the mean cross-entropy of hidden indices in nats; 0 if none is hidden."""
    return jnp.sum(jnp.where(masked.hidden, nats, 0.0)) / jnp.maximum(jnp.sum(masked.hidden), 1)


def bound(nats: Float[Array, "B N"], masked: Masked) -> Float[Array, ""]:
    """Returns an unbiased estimate of an upper bound on -log p(indices), in nats per index (Shi et al. 2024).

    The bound is the integral over time of hidden_share'(t) / hidden_share(t) times the cross-entropies of the indices
    hidden at t. It is the same for all schedules, and -log p itself for an exact predictor.
    """
    hidden = jnp.where(masked.hidden, nats, 0.0)
    return jnp.mean(masked.weight * jnp.mean(hidden, axis=1))
