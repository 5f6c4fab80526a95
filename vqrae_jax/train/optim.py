"""AdamW, its schedule, clipping, and the running mean of parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of optimizer step s = 0, 1, ...

    Warm-up: base * (s + 1) / warmup_steps. Then a cosine or a line down to final_learning_rate, reached at
    decay_end_steps (`steps` if None) and kept.
    """
    base, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    end = steps if config.decay_end_steps is None else config.decay_end_steps
    shape = {"cosine": lambda t: 0.5 * (1 + jnp.cos(math.pi * t)), "linear": lambda t: 1 - t, "constant": jnp.ones_like}

    def rate(step: jax.Array) -> jax.Array:
        done = jnp.where(step < end, (step - warmup) / max(end - warmup, 1), 1.0)
        decayed = final + (base - final) * shape[config.schedule](done)
        return jnp.where(step < warmup, base * (step + 1) / max(warmup, 1), decayed)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay on kernels only."""
    adamw = optax.adamw(
        learning_rate(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=_kernels
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def ema_decay(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """The decay after optimizer step s = 0, 1, ..."""
    warm = (1 + step) / (10 + step)
    return jnp.minimum(config.ema_decay, warm) if config.ema_warmup else jnp.asarray(config.ema_decay)


def update_ema(ema: Any, params: Any, decay: jax.Array | float) -> Any:
    """ema <- decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
