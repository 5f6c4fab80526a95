"""AdamW with its schedule and clipping, and the moving average of parameters."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from vqrae_jax.config import AdamWConfig, OptimizerConfig

# (step, horizon) -> the learning rate, or one for each subtree at the root of the parameters.
Rates = Callable[[ArrayLike, ArrayLike], jax.Array | dict[str, jax.Array]]


def learning_rate(config: AdamWConfig, step: ArrayLike, horizon: ArrayLike, constant: bool = False) -> jax.Array:
    """Returns the learning rate of optimizer step 0, 1, ...

    During warm-up it is base * (step + 1) / warmup_steps. Then it follows a cosine or a line to final_learning_rate,
    which it reaches at decay_end_steps and keeps; with `constant` it keeps the base rate instead. `horizon`, the length
    of the run, replaces a decay_end_steps of None. It is an array, so that a longer run is the same program.
    """
    base, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    end = horizon if config.decay_end_steps is None else config.decay_end_steps
    shape = {"cosine": lambda t: 0.5 * (1 + jnp.cos(math.pi * t)), "linear": lambda t: 1 - t, "constant": jnp.ones_like}
    progress = jnp.where(step < end, (step - warmup) / jnp.maximum(end - warmup, 1), 1.0)
    decayed = base if constant else final + (base - final) * shape[config.schedule](progress)
    return jnp.where(step < warmup, base * (step + 1) / max(warmup, 1), decayed)


def part_rates(config: OptimizerConfig, step: ArrayLike, horizon: ArrayLike) -> dict[str, jax.Array]:
    """Returns the learning rate of each part of the tokenizer."""
    return {
        part: getattr(config, f"{part}_rate") * learning_rate(config, step, horizon, part in config.constant)
        for part in ("encoder", "quantizer", "decoder")
    }


def make_optimizer(config: AdamWConfig, rates: Rates) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with weight decay on kernels only; its state has the same form with clipping and without."""
    clip = optax.clip_by_global_norm(config.clip_norm)
    is_kernel = functools.partial(jax.tree.map_with_path, lambda path, _: path[-1].key == "kernel")
    decay = optax.add_decayed_weights(config.weight_decay, is_kernel)
    adamw = optax.chain(optax.scale_by_adam(config.b1, config.b2), decay, _scale_by_rates(rates))

    def update(grads: Any, state: Any, params: Any, *, horizon: ArrayLike) -> tuple[Any, Any]:
        if config.clip_norm:
            grads, _ = clip.update(grads, optax.EmptyState())
        return adamw.update(grads, state, params, horizon=horizon)

    return optax.GradientTransformationExtraArgs(adamw.init, update)


def _scale_by_rates(rates: Rates) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, horizon: ArrayLike) -> tuple[Any, Any]:
        rate = rates(state.count, horizon)
        by_part = rate if isinstance(rate, dict) else dict.fromkeys(updates, rate)
        scaled = {name: optax.tree.scale(-by_part[name], tree) for name, tree in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )


def ema_decay(config: OptimizerConfig, step: ArrayLike) -> jax.Array:
    """Returns the decay of the moving average after optimizer step 0, 1, ..."""
    return jnp.minimum(config.ema_decay, (1 + step) / (10 + step) if config.ema_warmup else 1.0)


def update_ema(ema: Any, params: Any, decay: ArrayLike) -> Any:
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
