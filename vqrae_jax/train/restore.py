"""The variables that a run starts with: its newest readable checkpoint, or parts of another tokenizer."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, distributed, storage
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import Config, ModelConfig
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


@dataclasses.dataclass(frozen=True)
class Start:
    """The variables that a run takes from the tokenizer that `config.train.start_from` names."""

    location: Location | None  # None: they are in a checkpoint of the run, and the other one may be deleted
    shapes: dict[str, Any]  # {"params", "batch_stats"}
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # paths -> those in the files


@contextlib.contextmanager
def _names_start() -> Iterator[None]:
    """Reports errors of the folder of a tokenizer as errors of train.start_from; a decorator."""
    try:
        yield
    except UserError as error:
        raise error.renamed({saving.FIELD: "train.start_from"}) from error.__cause__


@_names_start()
def find_start(config: Config, folder: storage.Path | None = None, only: int | None = None) -> Start | None:
    """Finds the tokenizer that `config.train.start_from` names; None without one.

    If `folder` has checkpoints of this run, the newest readable one, or that of the step `only`, has its variables.

    Raises:
      ConfigError: a code of its quantizer would have another meaning under `config`; with the fields that differ.
    """
    if not config.train.start_from:
        return None
    for step in reversed(checkpoint.completed_steps(folder) if only is None else [only]) if folder else ():
        with contextlib.suppress(DamagedError):
            return Start(None, checkpoint.saved_shapes(folder / str(step)))
    location, parts = locate(config.train.start_from), config.train.start_parts
    differing = _differing_fields(config.model, location.config)
    fixed = FIXED_FIELDS - unread_paths(config.model)
    differing = {name: value for name, value in differing.items() if name in fixed}
    ours, theirs = config.model.encoder_config_path, location.config.encoder_config_path
    if location.frozen and theirs and not ours:
        differing["encoder_config_path"] = ours, theirs
    if differing and (not parts or "quantizer" in parts):
        raise ConfigError(_describe_fields(differing), field="train.start_from", value=config.train.start_from)
    flat = stored_shapes(location)
    names = {_rename(name, config.train.start_renames): name for name in flat}
    existing = {name.split("/")[1] for name in names}
    if missing := sorted(set(parts) - existing):
        message = f"{location.path} does not have {', '.join(missing)}; its parts are {', '.join(sorted(existing))}"
        raise ConfigError(message, field="train.start_parts", value=parts)
    names = {name: saved for name, saved in names.items() if not parts or name.split("/")[1] in parts}
    return Start(location, _unflatten({name: flat[saved] for name, saved in names.items()}), names)


def start_latents(config: Config, start: Start) -> dict[str, np.ndarray] | None:
    """Returns zeros in the shapes of the latent statistics that the start has and `config` does not name.

    The model is built with them; `read_start` reads their values. None: those of `config`.
    """
    if config.model.normalization_stat_path or config.train.start_parts:
        return None
    latents = start.shapes["batch_stats"].get("latent", {})
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in latents.items()}


def select_start(config: Config, start: Start, shapes: dict[str, Any]) -> Start:
    """Returns the start with the part of a model's variables `shapes` that it has; checks that it fits."""
    saved, selected = start.shapes, config.train.start_parts
    if start.location is None:
        own = {kind: {n: x for n, x in trees.items() if n in saved.get(kind, {})} for kind, trees in shapes.items()}
        return dataclasses.replace(start, shapes=own)
    parts = selected or tuple(saved["params"])
    target = {
        "params": {n: tree for n, tree in shapes["params"].items() if n in parts},
        "batch_stats": {n: t for n, t in shapes["batch_stats"].items() if not selected or n in parts},
    }
    differing = _differing_fields(config.model, start.location.config)
    remedy = _describe_fields(differing) if differing else "train.start_parts selects the parts that fit"
    checkpoint.check_shapes(saved, target, start.location.path, remedy=f"train.start_from: {remedy}")
    return dataclasses.replace(start, shapes=target)


@_names_start()
def check_start_encoder(config: Config, location: Location, params: Any) -> None:
    """Raises WeightsError if codes of the start are those of another frozen encoder than `params`, as far as known."""
    if location.run is None and (not config.train.start_parts or "quantizer" in config.train.start_parts):
        saving.check_encoder(location.path, config.model, params)


def read_start(config: Config, start: Start, target: dict[str, Any]) -> dict[str, Any]:
    """Reads (some of) the arrays of a start onto the shapes and shardings of `target`."""
    if start.location is None:  # a teacher, which the checkpoints of a run do not have
        start = find_start(config)
    flat = flatten_dict(target, sep="/")
    names = {name: saved for name, saved in start.names.items() if name in flat}
    arrays = read_stored(start.location, {saved: flat[name] for name, saved in names.items()})
    log.info("read %d arrays from %s", len(names), start.location.path)
    return _unflatten({name: arrays[saved] for name, saved in names.items()})


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
