"""What a run begins with: its own newest checkpoint that can be read, or parts of another run's model."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, distributed
from vqrae_jax.assembly import Placement
from vqrae_jax.checkpoint import CheckpointError, Checkpoints, DamagedError
from vqrae_jax.config import ConfigError, TrainConfig
from vqrae_jax.models.vit import restack_blocks, stacked_blocks
from vqrae_jax.train.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Start:
    """What a run goes on with."""

    state: TrainState
    frozen: dict[str, Any]
    own: tuple[str, ...] = ()  # frozen networks that only checkpoints of this project hold, so this run's must as well
    data: dict[str, Any] | None = None  # where the input stands; None: at its beginning


def resume(checkpoints: Checkpoints, target: TrainState, frozen: dict[str, Any], place: Placement) -> Start | None:
    """The newest readable checkpoint onto the shapes and shardings of `target`; None where there is none.

    One that is damaged is told and set aside, so that its step can be saved again. Layers may have been stacked for
    scanning or not.

    Raises:
      CheckpointError: there are checkpoints and none can be read, or they are of another architecture.
    """
    damaged = {}
    for step in reversed(checkpoints.steps):
        path = checkpoints.folder / str(step)
        found, problem = distributed.together(functools.partial(_attempt, path, target, frozen, place))
        problems = [said for said in distributed.exchange(problem) if said]
        if not problems:
            for bad, reason in damaged.items():
                log.warning("%s; step %d is taken in its place", reason, step)
                if not checkpoints.reading:
                    checkpoints.set_aside(bad)
            return found
        damaged[step] = problems[0]
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {checkpoints.folder} can be read; to begin anew take another --workdir:\n"
            + "\n".join(damaged.values())
        )
    return None


def _attempt(path: Any, target: TrainState, frozen: dict[str, Any], place: Placement) -> tuple[Start | None, str]:
    """What is in the checkpoint, or else what is wrong with it."""
    try:
        checkpoint.read_meta(path)
        saved = checkpoint.saved_shapes(path)["params"]
        own = tuple(name for name in frozen if name in saved)
        model = _shapes(with_own(target.inference(), frozen, own))
        wanted = ours = (model, target.rest())
        stacked = stacked_blocks(saved)
        if convert := _differs(stacked, model["params"]):
            wanted = _placed(jax.eval_shape(functools.partial(restack_blocks, stacked=stacked), ours), place)
        *trees, data = checkpoint.read(path, *wanted)
        if convert:
            trees = _restacked(tuple(trees), stacked_blocks(model["params"]), jax.tree.map(lambda x: x.sharding, ours))
        model, rest = trees
        params = model["params"]
        trained = {n: tree for n, tree in params.items() if n not in own}
        state = TrainState.join({**model, "params": trained}, rest)
        return Start(state, {**frozen, **{n: params[n] for n in own}}, own, data), ""
    except DamagedError as error:
        return None, str(error)


def with_own(model: dict[str, Any], frozen: dict[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """The `model` item of a checkpoint: what inference needs of the state, and the frozen networks that are its own."""
    return {**model, "params": {**{name: frozen[name] for name in own}, **model["params"]}}


def start_from(config: TrainConfig, state: TrainState, frozen: dict[str, Any], place: Placement) -> Start:
    """State and frozen networks with what `config.start_from` names in the place of their own beginning.

    Taken are EMA parameters and mutable state; the optimizer begins anew.

    Raises:
      CheckpointError: nothing is there, or what is taken does not fit; every leaf is named.
      ConfigError: a part that the checkpoint does not have.
    """
    path = checkpoint.find(config.start_from)
    checkpoint.read_meta(path)
    saved = {  # our name -> name and shape in the checkpoint
        _renamed(name, config.start_renames): (name, shape)
        for name, shape in flatten_dict(checkpoint.saved_shapes(path), sep="/").items()
    }
    taken = {name: pair for name, pair in saved.items() if _is_taken(name, config.start_parts)}
    absent = [part for part in config.start_parts if not any(_is_taken(name, (part,)) for name in taken)]
    if absent or not taken:
        tops = sorted({name.split("/")[1] for name in saved})
        raise ConfigError(f"train.start_parts={config.start_parts}: {path} has {', '.join(tops)}, not {absent}")
    stacked = stacked_blocks(unflatten_dict(taken, sep="/"))
    ours = {"params": {**frozen, **state.params}, "batch_stats": state.batch_stats}
    parts = {tuple(name.split("/")[:2]) for name in taken}
    ours = unflatten_dict(
        {n: x for n, x in flatten_dict(ours).items() if n[:2] in parts and _is_taken("/".join(n), config.start_parts)}
    )
    wanted = jax.eval_shape(functools.partial(restack_blocks, stacked=stacked), ours)
    checkpoint.check_shapes(unflatten_dict({n: shape for n, (_, shape) in taken.items()}, sep="/"), wanted, path)
    wanted = flatten_dict(_placed(wanted, place), sep="/")
    theirs = {name: wanted[n] for n, (name, _) in taken.items()}
    read = flatten_dict(checkpoint.read_model(path, unflatten_dict(theirs, sep="/"), partial=True), sep="/")
    read = unflatten_dict({n: read[name] for n, (name, _) in taken.items()}, sep="/")
    if _differs(stacked, ours):
        read = _restacked(read, stacked_blocks(ours), jax.tree.map(lambda x: x.sharding, ours))
    log.info("%d arrays from %s", len(taken), path)
    params = read.get("params", {})
    state = state.replace(
        params=_overlaid(state.params, params),
        ema_params=_overlaid(state.ema_params, jax.tree.map(jnp.copy, params)),  # the step donates both
        batch_stats=_overlaid(state.batch_stats, read.get("batch_stats", {})),
    )
    return Start(state, _overlaid(frozen, params), tuple(name for name in frozen if name in params))


def _differs(stacked: dict[str, bool], params: Any) -> bool:
    ours = stacked_blocks(params)
    return any(ours.get(name, form) != form for name, form in stacked.items())


def _restacked(tree: Any, stacked: dict[str, bool], where: Any) -> Any:
    return jax.jit(functools.partial(restack_blocks, stacked=stacked), out_shardings=where)(tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _placed(shapes: Any, place: Placement) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, place(shapes))


def _renamed(name: str, renames: dict[str, str]) -> str:
    """`name` is a collection and a path, "params/decoder/..."; renames are of the path."""
    kind, path = name.split("/", 1)
    for old, new in renames.items():
        if path == old or path.startswith(f"{old}/"):
            return f"{kind}/{new}{path[len(old) :]}"
    return name


def _is_taken(name: str, parts: tuple[str, ...]) -> bool:
    path = name.split("/", 1)[1]
    return not parts or any(path == part or path.startswith(f"{part}/") for part in parts)


def _overlaid(tree: Any, over: Any) -> Any:
    """`tree` with the leaves that `over` has as well."""
    given = flatten_dict(over)
    leaves = flatten_dict(tree, keep_empty_nodes=True)
    return unflatten_dict({name: given.get(name, leaf) for name, leaf in leaves.items()})
