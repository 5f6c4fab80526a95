"""The variables that a run starts with: its newest readable checkpoint, or parts of another tokenizer."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, distributed, storage
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import Config, ModelConfig, TrainConfig
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError, UserError
from vqrae_jax.inference import saving
from vqrae_jax.inference.location import Location, locate, read_stored, stored_shapes
from vqrae_jax.inference.tokenizer import HASHED_FIELDS
from vqrae_jax.quantizers.factory import unread_paths
from vqrae_jax.train.task import TrainState

T = TypeVar("T")

log = logging.getLogger(__name__)

# Fields of the model section that a start fixes. The input size may change: the codes of larger images mean the same.
FIXED_FIELDS = set(HASHED_FIELDS) - {"encoder_input_size"}
# Fields that describe the same model in several ways, by the beginning of their paths.
ARCHITECTURES = ("encoder_config_path", "encoder_params.architecture", "encoder_params.d", "encoder_params.model_name",
                 "decoder_config_path", "decoder_architecture", "pretrained_", "normalization_stat_path")  # fmt: skip
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
        return TrainState.of_model(model, int(path.name)), data
    return TrainState.join(model, rest), data


def own_shapes(folder: storage.Path, only: int | None = None) -> dict[str, Any] | None:
    """Returns the shapes of the model in the newest readable checkpoint of `folder`, or in that of the step `only`."""
    for step in reversed(checkpoint.completed_steps(folder) if only is None else [only]):
        try:
            return checkpoint.saved_shapes(folder / str(step))
        except DamagedError:
            continue
    return None


@contextlib.contextmanager
def _names_start() -> Iterator[None]:
    """Reports errors of the folder of a tokenizer as errors of train.start_from; a decorator."""
    try:
        yield
    except UserError as error:
        raise error.renamed({saving.FIELD: "train.start_from"}) from error.__cause__


@_names_start()
def locate_start(config: Config) -> Location:
    """Finds the tokenizer that `config.train.start_from` names.

    Raises:
      ConfigError: a code of its quantizer would have another meaning under `config`; with the fields that differ.
    """
    location, parts = locate(config.train.start_from), config.train.start_parts
    differing = _differing_fields(config.model, location.config)
    fixed = FIXED_FIELDS - unread_paths(config.model)
    differing = {name: value for name, value in differing.items() if name in fixed}
    ours, theirs = config.model.encoder_config_path, location.config.encoder_config_path
    if location.frozen and theirs and not ours:
        differing["encoder_config_path"] = ours, theirs
    if differing and (not parts or "quantizer" in parts):
        raise ConfigError(_describe_fields(differing), field="train.start_from", value=config.train.start_from)
    return location


def start_latents(config: Config, own: dict[str, Any] | None = None) -> dict[str, np.ndarray] | None:
    """Returns zeros in the shapes of the latent statistics that the start has and `config` does not name.

    The model is built with them; `read_start` reads their values. None: those of `config`.
    """
    if config.model.normalization_stat_path or config.train.start_parts:
        return None
    saved = _saved_shapes(config) if own is None else own
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in saved["batch_stats"].get("latent", {}).items()}


def start_shapes(config: Config, shapes: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the part of a model's variables `shapes` that the start has; checks that it fits.

    `own`, the shapes of the model in a checkpoint of this run, include it; the other run may then be deleted.
    """
    if own is not None:
        return {kind: {n: x for n, x in trees.items() if n in own.get(kind, {})} for kind, trees in shapes.items()}
    location, saved, selected = locate_start(config), _saved_shapes(config), config.train.start_parts
    parts = selected or tuple(saved["params"])
    target = {
        "params": {n: tree for n, tree in shapes["params"].items() if n in parts},
        "batch_stats": {n: t for n, t in shapes["batch_stats"].items() if not selected or n in parts},
    }
    differing = _differing_fields(config.model, location.config)
    remedy = _describe_fields(differing) if differing else "train.start_parts selects the parts that fit"
    checkpoint.check_shapes(saved, target, location.path, remedy=f"train.start_from: {remedy}")
    return target


@_names_start()
def check_start_encoder(config: Config, params: Any) -> None:
    """Raises WeightsError if codes of the start are those of another frozen encoder than `params`, as far as known."""
    location, parts = locate_start(config), config.train.start_parts
    if location.run is None and (not parts or "quantizer" in parts):
        saving.check_encoder(location.path, config.model, params)


def read_start(config: Config, target: dict[str, Any]) -> dict[str, Any]:
    """Reads (some of) the arrays of `start_shapes` onto the shapes and shardings of `target`."""
    location, flat = locate_start(config), flatten_dict(target, sep="/")
    names = {name: saved for name, (saved, _) in _start_leaves(config.train, location).items() if name in flat}
    arrays = read_stored(location, {saved: flat[name] for name, saved in names.items()})
    log.info("read %d arrays from %s", len(names), location.path)
    return _unflatten({name: arrays[saved] for name, saved in names.items()})


def _saved_shapes(config: Config) -> dict[str, Any]:
    return _unflatten({n: leaf for n, (_, leaf) in _start_leaves(config.train, locate_start(config)).items()})


@_names_start()
def _start_leaves(config: TrainConfig, location: Location) -> dict[str, tuple[str, Any]]:
    """Maps the name of every leaf to take to its name and shape in the files of the start."""
    flat = stored_shapes(location)
    saved = {_rename(name, config.start_renames): (name, shape) for name, shape in flat.items()}
    parts = {name.split("/")[1] for name in saved}
    if missing := sorted(set(config.start_parts) - parts):
        message = f"{location.path} does not have {', '.join(missing)}; its parts are {', '.join(sorted(parts))}"
        raise ConfigError(message, field="train.start_parts", value=config.start_parts)
    return {n: pair for n, pair in saved.items() if not config.start_parts or n.split("/")[1] in config.start_parts}


def _unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    return {"params": {}, "batch_stats": {}, **unflatten_dict(leaves, sep="/")}


def _differing_fields(config: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the fields of two model sections that differ, with both values."""
    ours, theirs = (flatten_dict(c.model_dump(mode="json"), keep_empty_nodes=True, sep=".") for c in (config, other))
    names = [name for name in ours | theirs if not name.startswith(ARCHITECTURES)]
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def _describe_fields(differing: dict[str, tuple[Any, Any]]) -> str:
    values = ", ".join(f"model.{name}={ours!r} instead of {theirs!r}" for name, (ours, theirs) in differing.items())
    return f"this config has {values}; set them, or pass --checkpoint, which takes the model section from the tokenizer"


def _rename(name: str, renames: dict[str, str]) -> str:
    """Renames a leaf: `name` is a collection and a path, "params/decoder/..."; `renames` apply to the path."""
    kind, path = name.split("/", 1)
    for old, new in renames.items():
        if path == old or path.startswith(f"{old}/"):
            return f"{kind}/{new}{path[len(old) :]}"
    return name
