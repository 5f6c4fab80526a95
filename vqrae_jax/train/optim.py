"""AdamW or Muon with its schedule and clipping, and the moving average of parameters."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
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


def make_tokenizer_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the tokenizer, whose parts have their own learning rates."""
    return make_optimizer(config, functools.partial(part_rates, config), config.method == "muon")


def make_optimizer(config: AdamWConfig, rates: Rates, muon: bool = False) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with weight decay on kernels only; its state has the same form with clipping and without.

    With `muon`, matrices of transformer blocks take the steps of Muon (Jordan et al. 2024) instead of Adam's, scaled to
    Adam's usual root mean square of 0.2, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    is_kernel = functools.partial(jax.tree.map_with_path, lambda path, _: path[-1].key == "kernel")
    decay = optax.add_decayed_weights(config.weight_decay, is_kernel)
    scale = optax.scale_by_adam(config.b1, config.b2)
    optimizer = optax.chain(_scale_by_muon(scale) if muon else scale, decay, _scale_by_rates(rates))

    def update(grads: Any, state: Any, params: Any, *, horizon: ArrayLike) -> tuple[Any, Any]:
        if config.clip_norm:
            grads, _ = clip.update(grads, optax.EmptyState())
        return optimizer.update(grads, state, params, horizon=horizon)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _scale_by_muon(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Muon for the matrices of blocks, each with a root mean square of 0.2, and `adam` for the rest."""

    def resize(updates: Any, params: Any) -> Any:  # an orthogonal matrix has the root mean square 1 / sqrt(longer side)
        def scale(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
            sides = (math.prod(update.shape[i] for i in side) for side in axes)
            return 0.2 * math.sqrt(max(sides)) * update

        return jax.tree.map(scale, updates, _matrix_axes(updates))

    muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=_matrix_axes), optax.stateless(resize))
    return optax.partition({"muon": muon, "adam": adam}, functools.partial(jax.tree.map_with_path, _method))


def _method(path: tuple[Any, ...], x: Any) -> str:
    names = [key.key for key in path]
    return "muon" if "blocks" in names and names[-1] == "kernel" else "adam"


def _matrix_axes(kernels: Any) -> Any:
    """Returns the axes in and out of the kernels of stacked blocks, whose first axis is the block."""

    def axes(path: tuple[Any, ...], x: Any) -> optax.contrib.MuonDimensionNumbers:
        inner = (1, 2) if path[-2].key == "out" else (1,)  # [L, heads, d, D]; query, key and value are [L, D, heads, d]
        return optax.contrib.MuonDimensionNumbers(inner, tuple(range(1 + len(inner), x.ndim)))

    return jax.tree.map_with_path(axes, kernels)


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
