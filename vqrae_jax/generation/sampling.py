"""Codes from a network that predicts hidden ones: revealed over several steps, by chance or the surest first."""

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
    codes: Int[Array, "B N"],
    num_embeddings: int,
    steps: int = 12,
    order: Order = "confidence",
    schedule: Schedule = "cosine",
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
) -> Int[Array, "B N"]:
    """Draws what is hidden of `codes`, and leaves the rest as it is.

    Args:
      predict: logits [B, N, K] for codes of which some are hidden; it is called `steps` times.
      codes: `num_embeddings` (K) where a code is to be drawn: everywhere for new pictures, in a region to repaint it.
      steps: at least one. With "chance" more steps come closer to what the network has learned; MaskGIT's order is at
        its best with 8 to 16.
      order: "confidence" reveals what was drawn with the largest probability, plus noise that fades (MaskGIT,
        arXiv:2202.04200, section 3.2); "chance" reveals any position alike, which is the reverse process of masked
        diffusion (Sahoo et al. 2024, arXiv:2406.07524).
      schedule: how much is hidden still after which step.
      temperature: of the codes: below one, likelier ones.
      choice_temperature: of the noise in "confidence": the larger, the more varied pictures are, and the worse each.

    Returns:
      Int32 in [0, K), if the rest of `codes` is.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one")
    wanted = codes == num_embeddings

    def step(codes: Int[Array, "B N"], i: Int[Array, ""]) -> tuple[Int[Array, "B N"], None]:
        for_codes, for_order = jax.random.split(jax.random.fold_in(key, i))
        hidden = codes == num_embeddings
        logits = predict(codes).astype(jnp.float32) / temperature
        # The other mode's noise has no tail, as if the temperature were lower (Zheng et al. 2024, arXiv:2409.02908).
        drawn = jax.random.categorical(for_codes, logits, mode="high").astype(jnp.int32)
        before, after = (hidden_share(1 - (i + n) / steps, schedule) for n in (0, 1))
        if order == "confidence":
            left = 1 - (i + 1) / steps
            noise = choice_temperature * left * jax.random.gumbel(for_order, codes.shape)
            keep = _unsure(_log_probability(logits, drawn) + noise, hidden, _count(wanted, after))
        else:
            keep = jax.random.uniform(for_order, codes.shape) < after / before
        keep &= i < steps - 1  # whatever rounding leaves of `after`
        return jnp.where(hidden & ~keep, drawn, codes), None

    codes, _ = jax.lax.scan(step, codes.astype(jnp.int32), jnp.arange(steps))
    return codes


def guided(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): further from what any class would have; 0 is
    `conditional` itself."""
    return lambda codes: (1 + scale) * conditional(codes) - scale * unconditional(codes)


def _count(wanted: Bool[Array, "B N"], share: Float[Array, ""]) -> Int[Array, " B"]:
    """How many of the positions to draw stay hidden."""
    return jnp.floor(share * jnp.sum(wanted, axis=1)).astype(jnp.int32)


def _log_probability(logits: Float[Array, "B N K"], codes: Int[Array, "B N"]) -> Float[Array, "B N"]:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)[..., 0]


def _unsure(confidence: Float[Array, "B N"], hidden: Bool[Array, "B N"], count: Int[Array, " B"]) -> Bool[Array, "B N"]:
    """The `count` hidden positions of each row whose confidence is least."""
    order = jnp.argsort(jnp.where(hidden, confidence, jnp.inf), axis=1)
    rank = jnp.argsort(order, axis=1)
    return rank < count[:, None]
