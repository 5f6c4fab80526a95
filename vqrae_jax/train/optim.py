"""AdamW, its schedule, clipping, and the running mean of parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.config import AdamWConfig, OptimizerConfig


def learning_rate(config: AdamWConfig, steps: int, constant: bool = False) -> optax.Schedule:
    """The rate of optimizer step s = 0, 1, ...

    Warm-up: base * (s + 1) / warmup_steps. Then a cosine or a line down to final_learning_rate, reached at
    decay_end_steps (`steps` if None) and kept; with `constant` the base rate is kept instead.
    """
    base, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    end = steps if config.decay_end_steps is None else config.decay_end_steps
    shape = {"cosine": lambda t: 0.5 * (1 + jnp.cos(math.pi * t)), "linear": lambda t: 1 - t, "constant": jnp.ones_like}

    def rate(step: jax.Array) -> jax.Array:
        done = jnp.where(step < end, (step - warmup) / max(end - warmup, 1), 1.0)
        decayed = base if constant else final + (base - final) * shape[config.schedule](done)
        return jnp.where(step < warmup, base * (step + 1) / max(warmup, 1), decayed)

    return rate


def part_rates(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """The rate of every part of the tokenizer."""

    def scaled(part: str) -> optax.Schedule:
        rate, factor = learning_rate(config, steps, part in config.constant), getattr(config, f"{part}_rate")
        return lambda step: factor * rate(step)

    return {part: scaled(part) for part in ("encoder", "quantizer", "decoder")}


def make_optimizer(
    config: AdamWConfig, rates: optax.Schedule | dict[str, optax.Schedule]
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay on kernels only.

    rates: one for all parameters, or one for each subtree at their root.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, _kernels),
        _scale_by_rates(rates) if isinstance(rates, dict) else optax.scale_by_learning_rate(rates),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def as_clipped(opt_state: Any, clipped: bool) -> Any:
    """The state of an optimizer of `make_optimizer` as it is with clip_norm or without; clipping itself has none."""
    if (len(opt_state) == 2) == clipped:
        return opt_state
    return (optax.EmptyState(), opt_state) if clipped else opt_state[1]


def _scale_by_rates(rates: dict[str, optax.Schedule]) -> optax.GradientTransformation:
    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> tuple[Any, Any]:
        now = {name: -rate(state.count) for name, rate in rates.items()}
        scaled = {name: optax.tree.scale(now[name], tree) for name, tree in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def ema_decay(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """The decay after optimizer step s = 0, 1, ..."""
    warm = (1 + step) / (10 + step)
    return jnp.minimum(config.ema_decay, warm) if config.ema_warmup else jnp.asarray(config.ema_decay)


def update_ema(ema: Any, params: Any, decay: jax.Array | float) -> Any:
    """ema <- decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
