"""Sampling of a generator's codes: one pure function for both families, for use under `jit`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from vqrae_jax.errors import ConfigError
from vqrae_jax.generation import autoregression, masking, sampling
from vqrae_jax.generation.sampler_config import SamplerConfig


def check_sampler(config: SamplerConfig, architecture: Any) -> None:
    """Raises ConfigError if a generator cannot be sampled as `config` says; the field is of the sampler."""
    if config.guidance and not architecture.classes:
        message = "moves samples towards their class, but the generator has no classes; use 0"
        raise ConfigError(message, field="guidance", value=config.guidance)
    for field in ("top_k", "top_p"):
        value = getattr(config, field)
        if value is not None and not architecture.blocks.causal:
            raise ConfigError("is for autoregressive generators; use temperature", field=field, value=value)


def schedule_codes(config: SamplerConfig, architecture: Any) -> Any:
    """Returns the values of every step as arrays: those that differ need no other program of `generate_codes`."""
    if architecture.blocks.causal:
        return sampling.schedules(config, architecture.length)
    return sampling.schedule_steps(config, architecture.length)


def generate_codes(
    module: Any,
    variables: Any,
    key: PRNGKeyArray,
    indices: Int[Array, "B T"],
    labels: Int[Array, " B"],
    config: SamplerConfig,
    rows: Int[Array, " B"] | None = None,
    history: bool = False,
    schedule: Any = None,
) -> Int[Array, "*S B T"]:
    """Samples the hidden codes of images and keeps the others; returns int32 codes in [0, K).

    Args:
      module, variables: a `models.generator.CodeTransformer`.
      key: seed of all samples.
      indices: K where hidden.
      labels: classes, or the number of classes for unconditional samples.
      rows: numbers of the samples; a number is the same sample in any batch and on any mesh. None: 0 to B - 1.
      history: return the codes after every step of masked diffusion, [S, B, T].
      schedule: `schedule_codes` of the config, if it is an argument of the compiled program.
    """
    architecture = module.config
    schedule = schedule_codes(config, architecture) if schedule is None else schedule
    guided = bool(config.guidance and architecture.classes)
    condition = sampling.pair_labels(labels, architecture.classes) if guided else labels
    if not architecture.blocks.causal:

        def predict(indices: Array) -> Array:
            return module.apply(variables, indices, condition)

        grids, levels = architecture.grids, architecture.levels
        shapes = tuple((*grid, levels) if levels > 1 else grid for grid in grids)
        settings = {"rows": rows, "factors": architecture.factors, "history": history, "schedule": schedule}
        return sampling.sample(predict, key, indices, architecture.num_embeddings, config, shapes, **settings)

    def step(cache: Any, previous: Array, code: Array) -> tuple[Array, Any]:
        return module.apply(variables, cache, previous, code, method="step")

    temperature, guidance = schedule
    return autoregression.sample(
        step, module.apply(variables, condition, method="start"), key, indices, architecture.num_embeddings, rows,
        temperature, config.top_k, config.top_p, guidance if guided else None, architecture.factors,
    )  # fmt: skip


def log_likelihood(
    module: Any, variables: Any, key: PRNGKeyArray, indices: Int[Array, "B T"], labels: Int[Array, " B"], times: int = 8
) -> tuple[Array, Array]:
    """Returns log p of the codes of each image in nats [B], a lower bound for masked diffusion, and the accuracy [B].

    The bound is estimated at `times` evenly spread times (`masking.bound`). The accuracy is the share of the predicted
    codes that are the most probable ones.
    """
    architecture = module.config
    if architecture.blocks.causal:
        nats, correct = module.apply(variables, indices, labels, method="cross_entropy")
        return -nats.sum(1), correct.mean(1)

    def visit(carry: None, key: PRNGKeyArray) -> tuple[None, tuple[Array, Array, Array]]:
        masked = masking.mask(key, indices, architecture.num_embeddings, "linear")
        nats, correct = module.apply(variables, masked.indices, labels, indices, method="cross_entropy")
        hidden = masked.hidden
        return None, (masked.weight * (nats * hidden).sum(1), (correct & hidden).sum(1), hidden.sum(1))

    _, (nats, correct, hidden) = jax.lax.scan(visit, None, jax.random.split(key, times))
    return -nats.mean(0), correct.sum(0) / jnp.maximum(hidden.sum(0), 1)
