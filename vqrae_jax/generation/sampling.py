"""Sampling of indices from a network that predicts hidden ones: revealed in several steps, randomly or surest first."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vqrae_jax.generation.masking import Schedule, hidden_share

Predict = Callable[[Int[Array, "B N"]], Float[Array, "B N K"]]
Order = Literal["confidence", "chance"]


def sample(
    predict: Predict,
    key: PRNGKeyArray,
    indices: Int[Array, "B N"],
    num_embeddings: int,
    steps: int = 12,
    order: Order = "confidence",
    schedule: Schedule = "cosine",
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
) -> Int[Array, "B N"]:
    """Samples the hidden indices and keeps the others.

    Args:
      predict: returns logits [B, N, K] for partly hidden indices; called `steps` times.
      indices: `num_embeddings` (K) where hidden: everywhere for new images, in a region to inpaint it.
      steps: at least one. With "chance", more steps come closer to the learned distribution; "confidence" is best with
        8 to 16.
      order: "confidence" reveals the most probable samples first, with noise that fades (MaskGIT, arXiv:2202.04200,
        section 3.2); "chance" reveals random positions, the reverse process of masked diffusion (Sahoo et al. 2024,
        arXiv:2406.07524).
      schedule: share of hidden indices after each step.
      temperature: of the indices; lower values favour probable ones.
      choice_temperature: of the noise in "confidence"; higher values trade quality for variety.

    Returns:
      Int32 indices in [0, K).
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    to_sample = jnp.sum(indices == num_embeddings, axis=1)

    def step(indices: Int[Array, "B N"], i: Int[Array, ""]) -> tuple[Int[Array, "B N"], None]:
        index_key, order_key = jax.random.split(jax.random.fold_in(key, i))
        hidden = indices == num_embeddings
        logits = predict(indices).astype(jnp.float32) / temperature
        # Noise of mode "low" has no tail, as at a lower temperature (Zheng et al. 2024, arXiv:2409.02908).
        sampled = jax.random.categorical(index_key, logits, mode="high").astype(jnp.int32)
        before, after = (hidden_share(1 - (i + n) / steps, schedule) for n in (0, 1))
        if order == "confidence":
            noise = choice_temperature * (1 - (i + 1) / steps) * jax.random.gumbel(order_key, indices.shape)
            probability = jnp.take_along_axis(jax.nn.log_softmax(logits), sampled[..., None], axis=-1)[..., 0]
            count = jnp.floor(after * to_sample).astype(jnp.int32)
            hide = _least_confident(probability + noise, hidden, count)
        else:
            hide = jax.random.uniform(order_key, indices.shape) < after / before
        hide &= i < steps - 1  # the last step reveals all, whatever the rounding of `after`
        return jnp.where(hidden & ~hide, sampled, indices), None

    indices, _ = jax.lax.scan(step, indices.astype(jnp.int32), jnp.arange(steps))
    return indices


def guided(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Applies classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); scale 0 is `conditional` itself."""
    return lambda indices: (1 + scale) * conditional(indices) - scale * unconditional(indices)


def _least_confident(
    confidence: Float[Array, "B N"], hidden: Bool[Array, "B N"], count: Int[Array, " B"]
) -> Bool[Array, "B N"]:
    """Marks the `count` hidden positions of each row with the lowest confidence."""
    order = jnp.argsort(jnp.where(hidden, confidence, jnp.inf), axis=1)
    return jnp.argsort(order, axis=1) < count[:, None]
