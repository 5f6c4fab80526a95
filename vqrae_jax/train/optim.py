"""AdamW with its schedule and clipping, and the moving average of parameters."""

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
    """Returns AdamW with clipping by the global norm and weight decay on kernels only.

    Its `update` takes `horizon` as a keyword. Its state has the same form with clipping and without.
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.chain(
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, _kernel_mask),
        _scale_by_rates(rates),
    )

    def update(grads: Any, state: Any, params: Any, *, horizon: ArrayLike) -> tuple[Any, Any]:
        if config.clip_norm:
            grads, _ = clip.update(grads, optax.EmptyState())
        return adamw.update(grads, state, params, horizon=horizon)

    return optax.GradientTransformationExtraArgs(adamw.init, update)


def _scale_by_rates(rates: Rates) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, horizon: ArrayLike) -> tuple[Any, Any]:
        rate = rates(state.count, horizon)
        if isinstance(rate, dict):
            scaled = {name: optax.tree.scale(-rate[name], tree) for name, tree in updates.items()}
        else:
            scaled = optax.tree.scale(-rate, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def ema_decay(config: OptimizerConfig, step: ArrayLike) -> jax.Array:
    """Returns the decay of the moving average after optimizer step 0, 1, ..."""
    warm = (1 + step) / (10 + step)
    return jnp.minimum(config.ema_decay, warm) if config.ema_warmup else jnp.asarray(config.ema_decay)


def update_ema(ema: Any, params: Any, decay: ArrayLike) -> Any:
    """Returns decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def _kernel_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
