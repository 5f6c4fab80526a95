"""Sampling of indices from a network that predicts hidden ones: one `lax.scan` over the steps, for use under `jit`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.halton import halton_ranks
from vqrae_jax.generation.masking import hidden_share
from vqrae_jax.generation.sampler_config import SamplerConfig

Predict = Callable[[Int[Array, "B N"]], Float[Array, "B N F"]]  # F is K, or the sum of `factors`


class Steps(NamedTuple):
    """Settings of every step.

    Attributes:
      number: from 0.
      hidden: share of hidden indices after the step.
      noise: scale of the noise of "confidence".
      temperature: of the logits.
      guidance: scale of the guidance.
    """

    number: Int[Array, " S"]
    hidden: Float[Array, " S"]
    noise: Float[Array, " S"]
    temperature: Float[Array, " S"]
    guidance: Float[Array, " S"]


def sample(
    predict: Predict,
    key: PRNGKeyArray,
    indices: Int[Array, "B N"],
    num_embeddings: int,
    config: SamplerConfig,
    grids: tuple[tuple[int, ...], ...] = (),
    rows: Int[Array, " B"] | None = None,
    factors: tuple[int, ...] = (),
    history: bool = False,
    schedule: Steps | None = None,
) -> Int[Array, "*S B N"]:
    """Samples the hidden indices and keeps the others.

    Args:
      predict: returns finite logits [B, N, F] for partly hidden indices; called once per step. With guidance it gets
        [2B, N], every row twice in succession: the first is conditional and the second unconditional, as `pair_labels`
        orders their labels.
      key: seed of all samples.
      indices: `num_embeddings` (K) where hidden: everywhere for new images, in a region to repaint it.
      grids: shapes of the grids that the N positions come from, for "halton"; see `halton_ranks`.
      rows: numbers of the samples, by default 0 to B - 1. Noise depends on `key` and this number only, not on the mesh
        nor on the batch, so that a number is the same sample everywhere.
      factors: sizes of digits whose logits follow each other, most significant first; (): logits are of whole codes.
      history: return the indices after every step, [S, B, N].
      schedule: `schedule_steps` of the config, if it is an argument of the compiled program.

    Returns:
      Int32 indices in [0, K), [B, N].

    Raises:
      ConfigError: the grids do not have N positions.
    """
    batch, positions = indices.shape
    ranks = _ranks(grids, positions) if config.method == "halton" else None
    schedule = schedule_steps(config, positions) if schedule is None else schedule
    per_step = (1 + config.remasking) / len(schedule.number)
    repainted = indices == num_embeddings
    to_sample = jnp.sum(repainted, axis=1)
    rows = jnp.arange(batch) if rows is None else rows
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def step(indices: Int[Array, "B N"], s: Steps) -> tuple[Int[Array, "B N"], Int[Array, "B N"] | None]:
        index_keys, order_keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, s.number)))(row_keys).T
        hidden = indices == num_embeddings
        logits = _guided(predict, indices, s.guidance if config.guidance else None) / s.temperature
        sampled, log_p = sample_codes(index_keys, logits, factors or (num_embeddings,))
        draw = jax.random.gumbel if config.method == "confidence" else jax.random.uniform
        noise = jax.vmap(lambda k: draw(k, (positions,)))(order_keys)
        count, target = jnp.sum(hidden, axis=1), _floor(s.hidden * to_sample)
        if config.method == "remask":
            # ReMDM's sigma is again / (to_sample - count). Every step reveals the same number, as far as possible.
            reveals = _floor((s.number + 1) * per_step * to_sample) - _floor(s.number * per_step * to_sample)
            again = jnp.clip(reveals - (count - target), 0, jnp.minimum(target, to_sample - count))
            hide = _lowest(noise, hidden, target - again) | _lowest(noise, repainted & ~hidden, again)
        else:
            score = noise if ranks is None else -ranks
            if config.method == "confidence":
                score = log_p + s.noise * noise
            hide = _lowest(score, hidden, jnp.minimum(target, count - 1))  # at least one is revealed
        indices = jnp.where(hide, num_embeddings, jnp.where(hidden, sampled, indices))
        return indices, indices if history else None

    indices, states = jax.lax.scan(step, indices.astype(jnp.int32), schedule)
    return states if history else indices


def sample_codes(
    keys: Key[Array, " B"],
    logits: Float[Array, "B *n F"],
    factors: Sequence[int],
    truncate: Callable[[Float[Array, "B *n f"]], Float[Array, "B *n f"]] = lambda logits: logits,
) -> tuple[Int[Array, " B *n"], Float[Array, " B *n"]]:
    """Returns codes and their log p; the digits of a code, whose logits `truncate` changes, are independent."""
    digits, log_p = [], jnp.zeros(logits.shape[:-1])
    for i, part in enumerate(map(truncate, jnp.split(logits, np.cumsum(factors)[:-1], axis=-1))):
        # Noise of mode "low" has no tail, as at a lower temperature (Zheng et al. 2024, arXiv:2409.02908).
        choose = jax.vmap(lambda k, x, i=i: jax.random.categorical(jax.random.fold_in(k, i), x, mode="high"))
        digits.append(choose(keys, part))
        log_p += jnp.take_along_axis(jax.nn.log_softmax(part), digits[-1][..., None], axis=-1)[..., 0]
    return jnp.ravel_multi_index(digits, factors, mode="clip").astype(jnp.int32), log_p


def guide(logits: Float[Array, "R *n F"], scale: Float[Array, ""]) -> Float[Array, "B *n F"]:
    """Applies classifier-free guidance to R = 2 B rows, conditional and unconditional in turn (arXiv:2207.12598)."""
    conditional, unconditional = jnp.moveaxis(logits.reshape(-1, 2, *logits.shape[1:]), 1, 0)
    return conditional + scale * (conditional - unconditional)


def pair_labels(labels: Int[Array, " B"], unconditional: int) -> Int[Array, " 2*B"]:
    """Returns the labels of the rows that `sample` predicts with guidance; pairs stay on the device of their row."""
    return jnp.stack([labels, jnp.full_like(labels, unconditional)], axis=1).reshape(-1)


def schedule_steps(config: SamplerConfig, positions: int) -> Steps:
    """Returns the settings of every step: all of guidance, temperature and noise that `sample` reads."""
    count = config.steps if config.method == "remask" else min(config.steps, positions)
    number = jnp.arange(count)
    hidden = hidden_share(1 - (number + 1) / count, config.schedule)
    noise = config.choice_temperature * (1 - (number + 1) / count)
    return Steps(number, hidden, noise, *schedules(config, count))


def schedules(config: SamplerConfig, count: int) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Returns temperature and guidance of each of `count` steps, or codes of autoregression."""
    progress = 1 - (count - 1 - jnp.arange(count)) / max(count - 1, 1)  # 1 if there is one step
    end = config.temperature if config.last_temperature is None else config.last_temperature
    temperature = config.temperature + (end - config.temperature) * progress
    first, last = config.guidance_interval
    ramp = {
        "constant": jnp.ones(count),
        "linear": progress,
        "power-cosine": (1 - jnp.cos(jnp.pi * progress**config.guidance_power)) / 2,
        "interval": jnp.float32((first <= progress) & (progress <= last)),
    }[config.guidance_schedule]
    return temperature, config.guidance * ramp


def _guided(predict: Predict, indices: Int[Array, "B N"], scale: Float[Array, ""] | None) -> Float[Array, "B N F"]:
    if scale is None:
        return predict(indices).astype(jnp.float32)
    return guide(predict(jnp.repeat(indices, 2, axis=0)).astype(jnp.float32), scale)


def _ranks(grids: tuple[tuple[int, ...], ...], positions: int) -> Int[Array, " N"]:
    ranks = halton_ranks(*grids) if grids else ()
    if len(ranks) != positions:
        raise ConfigError(f"have {len(ranks)} positions, the indices have {positions}", field="grids", value=grids)
    return jnp.asarray(ranks)


def _floor(x: Float[Array, " B"]) -> Int[Array, " B"]:
    return jnp.floor(x + 1e-3).astype(jnp.int32)  # 8 / 9 of 9 positions are 8, also rounded to float32


def _lowest(
    score: Float[Array, "*B N"] | Int[Array, "*B N"], hidden: Bool[Array, "B N"], count: Int[Array, " B"]
) -> Bool[Array, "B N"]:
    """Marks the `count` hidden positions of each row with the lowest score."""
    order = jnp.argsort(jnp.where(hidden, score, jnp.inf), axis=1)
    return jnp.argsort(order, axis=1) < count[:, None]
