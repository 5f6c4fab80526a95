"""The variables that a run starts with: its newest readable checkpoint, or parts of another run's model."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, distributed, storage
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import TrainConfig
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError
from vqrae_jax.train.task import TrainState

T = TypeVar("T")

log = logging.getLogger(__name__)

Resumed = tuple[TrainState, dict[str, Any]]  # with the position of the input


def resume(checkpoints: Checkpoints, target: TrainState, only: int | None = None) -> Resumed | None:
    """Reads the newest readable checkpoint onto the shapes and shardings of `target`; without checkpoints it is None.

    Damaged checkpoints are reported and renamed, so that their steps can be saved again. With `only`, the model of that
    step is read and nothing else; no other checkpoint replaces it, because metrics belong to the requested step.
    """
    damaged = {}
    for step in reversed(checkpoints.steps) if only is None else (only,):
        path = checkpoints.folder / str(step)
        _, reason = _attempt_together(lambda path=path: _verify_share(path, only is not None))
        if not reason:
            resumed, reason = _attempt_together(lambda path=path: _read(path, target, only is not None))
        if not reason:
            for damaged_step, reason in damaged.items():
                log.warning("%s; using step %d instead", reason, step)
                checkpoints.set_aside(damaged_step)
            return resumed
        damaged[step] = reason
    if only is not None:
        rest = [step for step in checkpoints.steps if step != only]
        remedy = f"--step={rest[-1]} evaluates another (available: {rest})" if rest else "it is the only one"
        raise DamagedError(f"{damaged[only]}; {remedy}")
    if damaged:
        message = f"none of the checkpoints in {checkpoints.folder} can be read; use another --workdir to start again:"
        raise CheckpointError("\n".join([message, *damaged.values()]))
    return None


def _attempt_together(action: Callable[[], T]) -> tuple[T | None, str]:
    """Returns the result of `action`, which every process calls, or what is wrong with a checkpoint in any of them."""

    def attempt() -> tuple[T | None, str]:
        try:
            return action(), ""
        except DamagedError as error:
            return None, str(error)

    result, reason = distributed.run_together(attempt)
    return result, next(filter(None, distributed.exchange(reason)), "")


def _verify_share(path: storage.Path, model_only: bool) -> None:
    items = ("model", "data") if model_only else ("model", "train", "data")
    checkpoint.verify(path, *items, share=distributed.process_index(), shares=distributed.process_count())


def _read(path: storage.Path, target: TrainState, model_only: bool) -> Resumed:
    rest = None if model_only else target.rest()
    model, rest, data = checkpoint.read_checkpoint(path, target.inference(), rest)
    if model_only:
        rest = {"step": jnp.asarray(int(path.name)), "params": {}, "opt_state": ()}
    return TrainState.join(model, rest), data


def own_shapes(folder: storage.Path, only: int | None = None) -> dict[str, Any] | None:
    """Returns the shapes of the model in the newest readable checkpoint of `folder`, or in that of the step `only`."""
    with storage.convert_errors(folder, "read"):
        steps = checkpoint.completed_steps(folder) if only is None else [only]
    for step in reversed(steps):
        try:
            return checkpoint.saved_shapes(folder / str(step))
        except DamagedError:
            continue
    return None


def start_shapes(config: TrainConfig, shapes: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the part of a model's variables `shapes` that `config.start_from` gives; checks that it fits.

    `own`, the shapes of the model in a checkpoint of this run, include it; the other run may then be deleted.
    """
    if own is not None:
        return {kind: {n: x for n, x in trees.items() if n in own.get(kind, {})} for kind, trees in shapes.items()}
    path = checkpoint.find_checkpoint(config.start_from)
    checkpoint.read_meta(path)
    saved = unflatten_dict({name: shape for name, (_, shape) in _start_leaves(config, path).items()}, sep="/")
    parts = config.start_parts or tuple(saved["params"])
    target = {
        "params": {n: tree for n, tree in shapes["params"].items() if n in parts},
        "batch_stats": {n: t for n, t in shapes["batch_stats"].items() if not config.start_parts or n in parts},
    }
    checkpoint.check_shapes(saved, target, path)
    return target


def read_start(config: TrainConfig, target: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays of `start_shapes` onto the shapes and shardings of `target`."""
    path = checkpoint.find_checkpoint(config.start_from)
    leaves, flat = _start_leaves(config, path), flatten_dict(target, sep="/")
    saved_target = unflatten_dict({saved: flat[name] for name, (saved, _) in leaves.items()}, sep="/")
    arrays = flatten_dict(checkpoint.read_model(path, saved_target, partial=True), sep="/")
    log.info("read %d arrays from %s", len(leaves), path)
    renamed = {name: arrays[saved] for name, (saved, _) in leaves.items()}
    return {"params": {}, "batch_stats": {}, **unflatten_dict(renamed, sep="/")}


def _start_leaves(config: TrainConfig, path: storage.Path) -> dict[str, tuple[str, Any]]:
    """Maps the name of every leaf to take to its name and shape in the checkpoint."""
    flat = flatten_dict(checkpoint.saved_shapes(path), sep="/")
    saved = {_rename(name, config.start_renames): (name, shape) for name, shape in flat.items()}
    parts = {name.split("/")[1] for name in saved}
    if missing := sorted(set(config.start_parts) - parts):
        message = f"{path} does not have {', '.join(missing)}; its parts are {', '.join(sorted(parts))}"
        raise ConfigError(message, field="train.start_parts", value=config.start_parts)
    return {n: pair for n, pair in saved.items() if not config.start_parts or n.split("/")[1] in config.start_parts}


def _rename(name: str, renames: dict[str, str]) -> str:
    """Renames a leaf: `name` is a collection and a path, "params/decoder/..."; `renames` apply to the path."""
    kind, path = name.split("/", 1)
    for old, new in renames.items():
        if path == old or path.startswith(f"{old}/"):
            return f"{kind}/{new}{path[len(old) :]}"
    return name
