"""What a run begins with: its own newest checkpoint that can be read, or parts of another run's model."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, distributed, storage
from vqrae_jax.build.tokenizer import Placement
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import TrainConfig
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError
from vqrae_jax.train.optim import as_clipped
from vqrae_jax.train.state import TrainState

log = logging.getLogger(__name__)


Resumed = tuple[TrainState, dict[str, Any]]  # and where the input stands


def resume(checkpoints: Checkpoints, target: TrainState, place: Placement, only: int | None = None) -> Resumed | None:
    """The newest readable checkpoint onto the shapes and shardings of `target`; None where there is none.

    A checkpoint that is damaged is told and set aside, so that its step can be saved again. Gradients may have been
    clipped or not.

    With `only`, the model of that step: the state has what inference needs, and neither parameters to train nor an
    optimizer, which are not read. Nothing takes its place: figures and codes are of the step that was asked for.

    Raises:
      DamagedError: `only` cannot be read.
      CheckpointError: there are checkpoints and none can be read, or they are of another architecture.
    """
    damaged = {}
    for step in reversed(checkpoints.steps) if only is None else (only,):
        path = checkpoints.folder / str(step)
        found, problem = distributed.run_together(functools.partial(_attempt, path, target, place, only is not None))
        problems = [said for said in distributed.exchange(problem) if said]
        if not problems:
            for bad, reason in damaged.items():
                log.warning("%s; step %d is taken in its place", reason, step)
                checkpoints.set_aside(bad)
            return found
        damaged[step] = problems[0]
    if only is not None:
        others = [step for step in checkpoints.steps if step != only]
        there = f"--step={others[-1]} takes another (there are {others})" if others else "there is no other"
        raise DamagedError(f"{damaged[only]}; {there}")
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {checkpoints.folder} can be read; to begin anew take another --workdir:\n"
            + "\n".join(damaged.values())
        )
    return None


def _attempt(path: Any, target: TrainState, place: Placement, model_only: bool) -> tuple[Resumed | None, str]:
    """What is in the checkpoint, or else what is wrong with it."""
    try:
        checkpoint.read_meta(path)
        model, rest = target.inference(), None if model_only else target.rest()
        if not model_only:
            rest = _clipped_as(rest, checkpoint.saved_shapes(path, "train"))
        model, rest, data = checkpoint.read_checkpoint(path, model, rest)
        if model_only:
            rest = {"step": jnp.asarray(int(path.name)), "params": {}, "opt_state": ()}
        else:
            rest = _clipped_as(rest, target.rest())
        return (TrainState.join(model, rest), data), ""
    except DamagedError as error:
        return None, str(error)


def own_model(folder: storage.Path, only: int | None = None) -> dict[str, Any] | None:
    """Shapes of the model in the newest checkpoint of `folder` (or in that of the step `only`) that tells them."""
    with storage.convert_errors(folder, "read"):
        steps = checkpoint.completed_steps(folder) if only is None else [only]
    for step in reversed(steps):
        try:
            return checkpoint.saved_shapes(folder / str(step))
        except DamagedError:
            continue
    return None


def start_shapes(config: TrainConfig, shapes: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `config.start_from` gives of the model whose variables are `shapes`: the same tree, or parts of it.

    Names are ours (`start_renames`). `own`, the model in a checkpoint of this run, has all
    that it began with, so that the run it began from may be gone.

    Raises:
      CheckpointError: nothing is there, or what is taken does not fit; every leaf is named.
      ConfigError: a part that the checkpoint does not have.
    """
    if own is not None:
        return {
            kind: {n: tree for n, tree in trees.items() if n in own.get(kind, {})} for kind, trees in shapes.items()
        }
    path = checkpoint.find_checkpoint(config.start_from)
    checkpoint.read_meta(path)
    theirs = unflatten_dict({name: shape for name, (_, shape) in _taken(config, path).items()}, sep="/")
    parts = config.start_parts or tuple(theirs["params"])
    kinds = {
        "params": {n: tree for n, tree in shapes["params"].items() if n in parts},
        "batch_stats": {n: t for n, t in shapes["batch_stats"].items() if not config.start_parts or n in parts},
    }
    checkpoint.check_shapes(theirs, kinds, path)
    return kinds


def read_start(config: TrainConfig, target: dict[str, Any], place: Placement) -> dict[str, Any]:
    """The arrays of `start_shapes`, onto the shapes and shardings of `target`."""
    path = checkpoint.find_checkpoint(config.start_from)
    taken = _taken(config, path)
    wanted = flatten_dict(_placed(target, place), sep="/")
    theirs = unflatten_dict({name: wanted[ours] for ours, (name, _) in taken.items()}, sep="/")
    read = flatten_dict(checkpoint.read_model(path, theirs, partial=True), sep="/")
    read = unflatten_dict({ours: read[name] for ours, (name, _) in taken.items()}, sep="/")
    read = {"params": {}, "batch_stats": {}, **read}
    log.info("%d arrays from %s", len(taken), path)
    return read


def _taken(config: TrainConfig, path: Any) -> dict[str, tuple[str, Any]]:
    """Our name -> name and shape in the checkpoint, of every leaf that is taken."""
    saved = {
        _renamed(name, config.start_renames): (name, shape)
        for name, shape in flatten_dict(checkpoint.saved_shapes(path), sep="/").items()
    }
    parts = {name.split("/")[1] for name in saved}
    if absent := sorted(set(config.start_parts) - parts):
        raise ConfigError(
            f"train.start_parts={config.start_parts}: {path} has {', '.join(sorted(parts))}, not {', '.join(absent)}"
        )
    return {n: pair for n, pair in saved.items() if not config.start_parts or n.split("/")[1] in config.start_parts}


def _clipped_as(rest: dict[str, Any], other: Any) -> dict[str, Any]:
    """What only resuming needs, its optimizers' states in the form of `other`, whose runs may clip or not."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(other)]

    def fit(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        clipped = any(name.startswith(f"{prefix}opt_state/1/") for name in names)
        return {**tree, "opt_state": as_clipped(tree["opt_state"], clipped)}

    adversary = {"adversary": fit(rest["adversary"], "adversary/")} if "adversary" in rest else {}
    return fit(rest, "") | adversary


def _placed(shapes: Any, place: Placement) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, place(shapes))


def _renamed(name: str, renames: dict[str, str]) -> str:
    """`name` is a collection and a path, "params/decoder/..."; renames are of the path."""
    kind, path = name.split("/", 1)
    for old, new in renames.items():
        if path == old or path.startswith(f"{old}/"):
            return f"{kind}/{new}{path[len(old) :]}"
    return name
