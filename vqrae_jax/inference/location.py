"""Location of trained tokenizers: workdirs, checkpoints, saved folders, buckets and the model hub."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import checkpoint, sharding, storage
from vqrae_jax import config as config_lib
from vqrae_jax.build.encoder import replace_encoder
from vqrae_jax.build.tokenizer import build_tokenizer, initial_params, variable_shapes
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError, WeightsError
from vqrae_jax.evaluation.report import EVALUATION_FILE, METRICS_FILE
from vqrae_jax.inference import saving
from vqrae_jax.inference.batching import leaf_shardings
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import sources

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Location:
    """A tokenizer on this machine or in a bucket."""

    path: storage.Path  # the saved folder, or the folder of one checkpoint
    config: config_lib.ModelConfig  # without the paths of weights and statistics that the files have
    frozen: bool  # whether the encoder is the pretrained one that the config names, and not in the files
    provenance: dict[str, Any]  # version and, if known, revision, step, metrics and data of the training run
    run: config_lib.Config | None = None  # the whole config of a checkpoint; None for a saved folder


def locate(path: str | os.PathLike, step: int | None = None, encoder: Any = None) -> Location:
    """Finds a tokenizer and reads its config.

    Args:
      path: a run's workdir, one of its checkpoints, a saved folder (each local or gs://...), or a hub id.
      step: checkpoint of a workdir; None: the newest.
      encoder: folder or hub id of the encoder's weights; None: the one in the config.
    """
    if encoder is not None:
        storage.check_path(encoder, "encoder")
    location = _locate(path, step)
    if encoder is None:
        return location
    if not location.frozen or location.config.encoder_config_path is None:
        raise ConfigError("the encoder's weights are in the tokenizer's own files", field="encoder", value=encoder)
    if location.run is not None:
        log.warning("the checkpoint has no hash of its encoder: %s is used without a comparison", encoder)
    return dataclasses.replace(location, config=replace_encoder(location.config, os.fspath(encoder)))


def _locate(path: str | os.PathLike, step: int | None) -> Location:
    local = fetch(path)
    if is_saved(local, step):
        config, encoder, provenance = saving.read_description(local)
        return Location(local, config, encoder is not None, provenance)
    step_path = checkpoint.find_checkpoint(local, step)
    with suggest_other_steps(step_path):
        meta, saved = checkpoint.read_meta(step_path), checkpoint.saved_shapes(step_path)
    run = config_lib.from_saved(config_lib.Config, meta["config"])
    if run.train.task == "generator":
        message = f"is the run of a generator: {saving.USE_GENERATOR}"
        raise CheckpointError(message, field=saving.FIELD, value=str(path))
    provenance = {name: meta[name] for name in ("version", "revision", "step") if name in meta}
    provenance["data"] = {n: v for n, v in meta["config"]["data"].items() if n in ("source", "name") and v}
    provenance |= read_metrics(step_path.parent.parent, meta.get("step"))
    absent = {"normalization_stat_path": None}  # the files that the run started from may be gone
    if "decoder" in saved["params"]:
        absent["pretrained_decoder_path"] = None
    model = run.model.model_copy(update=absent)
    return Location(step_path, model, "encoder" not in saved["params"], provenance, run)


def holds_generator(path: str | os.PathLike, step: int | None = None) -> bool:
    """Returns whether a path, see `locate`, is that of a generator."""
    local = fetch(path)
    if is_saved(local, step):
        return saving.is_generator(local)
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(local, step))
    return meta["config"].get("train", {}).get("task") == "generator"


def is_saved(local: storage.Path, step: int | None) -> bool:
    """Returns whether a path is that of a saved folder; raises ConfigError if one is loaded with a step."""
    if storage.is_remote(local) or not saving.is_saved_folder(local):
        return False
    if step is not None:
        message = f"chooses a checkpoint of a run, but {local} is a saved folder with one model; leave it out"
        raise ConfigError(message, field="step", value=step)
    return True


def fetch(path: str | os.PathLike) -> storage.Path:
    """Returns the path of a run or saved folder; folders that were saved to a bucket or the hub become local copies."""
    storage.check_path(path, saving.FIELD)
    local, name = storage.resolve_path(path), str(path)
    with storage.convert_errors(local, "read"):
        saved_remotely = storage.is_remote(local) and (local / saving.CONFIG).is_file()
    if saved_remotely:
        local = storage.download(local)
    elif not local.exists() and name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/":
        local = sources.fetch_folder(name, saving.FIELD)
    return local


def stored_shapes(location: Location) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the variables in the files by their paths, as in "params/decoder/..."."""
    if location.run is None:
        tensors = saving.read_weights(location.path)
        return {name: jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype) for name in tensors}
    return flatten_dict(checkpoint.saved_shapes(location.path), sep="/")


def read_stored(location: Location, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads some of the variables in the files, by their paths, onto the shardings of `target`."""
    if location.run is None:
        tensors = saving.read_weights(location.path)
        return {name: sharding.place_array(tensors[name], leaf.sharding) for name, leaf in target.items()}
    return flatten_dict(checkpoint.read_model(location.path, unflatten_dict(target, sep="/"), partial=True), sep="/")


def read_model(location: Location, mesh: jax.sharding.Mesh | None = None) -> tuple[VQRAE, dict[str, Any]]:
    """Returns the module, built for `mesh`, and its variables as they were trained.

    The variables of a checkpoint are on `mesh`, or on this process's first device; those of a folder are numpy arrays.
    """
    if location.run is None:
        return saving.load_folder(location.path, location.config, mesh)
    saved = checkpoint.saved_shapes(location.path)
    # A checkpoint also has parts that train.start_from loaded and that did not train.
    stored = {*location.run.train.trainable, *saved["params"]}
    built = build_tokenizer(location.config, latent_stats=saved["batch_stats"].get("latent", {}), mesh=mesh)
    shapes = variable_shapes(built)
    trained = {n: p for n, p in shapes["params"].items() if n in stored}
    checkpoint.check_shapes(saved, {**shapes, "params": trained}, location.path)
    shardings = partial(leaf_shardings, mesh=mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, shardings(saved))
    with suggest_other_steps(location.path):
        model = checkpoint.read_model(location.path, target)
    key = jax.random.key(location.run.train.seed)
    untrained = [n for n in ("encoder", "quantizer", "decoder") if n not in trained]
    params = initial_params(built, key, untrained, shardings)
    return built.module, {**model, "params": {**params, **model["params"]}}


@contextlib.contextmanager
def suggest_encoder(location: Location) -> Iterator[None]:
    """Adds the option that names the encoder's weights to the error of weights that cannot be read."""
    try:
        yield
    except WeightsError as error:
        if not location.frozen or not (error.field or "").startswith("model.encoder"):
            raise
        message = f"{error.message}; if the encoder is elsewhere, name it by encoder= (--encoder)"
        raise WeightsError(message, field=error.field, value=error.value) from error


@contextlib.contextmanager
def suggest_other_steps(path: storage.Path) -> Iterator[None]:
    """Adds the other checkpoints to the error of a damaged one. None is loaded instead: its codes would differ."""
    try:
        yield
    except DamagedError as error:
        steps = [step for step in checkpoint.completed_steps(path.parent) if str(step) != path.name]
        remedy = (
            f"pass {path.parent}/{steps[-1]} instead (available steps: {steps})" if steps else "no other step exists"
        )
        raise DamagedError(f"{error.message}; {remedy}", field=error.field, value=error.value) from error


def read_metrics(workdir: storage.Path, step: int | None) -> dict[str, Any]:
    """Returns the metrics of `step` and their protocol from a standalone evaluation, or metrics from the run's log."""
    evaluation, log = workdir / EVALUATION_FILE, workdir / METRICS_FILE
    report = _parse_object(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {}
    if report.get("step") == step and "metrics" in report:
        return {"metrics": report["metrics"], "protocol": report.get("protocol", {})}
    metrics: dict[str, float] = {}
    for values in map(_parse_object, log.read_text(encoding="utf-8").splitlines() if log.is_file() else []):
        if values.get("step") == step:
            metrics |= {name: value for name, value in values.items() if name.startswith("eval/")}
    return {"metrics": metrics} if metrics else {}


def _parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object; returns an empty dict for truncated text."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
