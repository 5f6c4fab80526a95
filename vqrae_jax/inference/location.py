"""Where a trained tokenizer is, what its files say about it, and its weights."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax

from vqrae_jax import checkpoint, storage
from vqrae_jax import config as config_lib
from vqrae_jax.build.tokenizer import build_tokenizer, initial_params, variable_shapes
from vqrae_jax.errors import DamagedError
from vqrae_jax.evaluation.report import EVALUATION_FILE, METRICS_FILE
from vqrae_jax.inference import saving as exported
from vqrae_jax.inference.batching import placement
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import sources

PARTS = ("encoder", "quantizer", "decoder")


@dataclasses.dataclass(frozen=True)
class Location:
    """A tokenizer on this machine."""

    path: storage.Path  # the exported folder, or the folder of one checkpoint
    config: config_lib.ModelConfig
    frozen: bool  # the encoder is the pretrained one that the config names, and not in the files
    provenance: dict[str, Any]  # version, and where known revision, step, figures, data
    run: config_lib.Config | None = None  # of a checkpoint: the whole config


def locate(path: str | os.PathLike, step: int | None = None) -> Location:
    """Finds a run's workdir (its newest checkpoint, or that of `step`), a checkpoint, an exported folder, or a hub id.

    All but the last may be in a bucket (gs://...).

    Raises:
      CheckpointError: nothing complete is there.
      WeightsError: the folder is damaged, or the hub cannot give it.
      ConfigError: a config of another version of this package.
      StorageError: the bucket may not be read.
    """
    local = _here(path)
    if not local.exists() and _is_hub_id(str(path)):
        local = sources.fetch_folder(str(path), "tokenizer")
    if exported.is_folder(local):
        config, frozen = exported.read_config(local), exported.has_pretrained_encoder(local)
        return Location(local, config, frozen, exported.read_provenance(local))
    found = checkpoint.find_checkpoint(path if storage.is_remote(path) else local, step)
    with _others_told(found):
        meta, saved = checkpoint.read_meta(found), checkpoint.saved_shapes(found)
    run = config_lib.from_dict(config_lib.Config, meta["config"])
    provenance = {name: meta[name] for name in ("version", "revision", "step") if name in meta}
    provenance["data"] = {n: v for n, v in meta["config"]["data"].items() if n in ("source", "path", "name") and v}
    provenance |= _measured(found.parent.parent, meta.get("step"))
    frozen = "encoder" not in saved["params"]
    return Location(found, run.model, frozen, provenance, run)


def read_model(found: Location, mesh: jax.sharding.Mesh | None = None) -> tuple[VQRAE, dict[str, Any]]:
    """The module and its variables as they were trained and are exported.

    Args:
      found: by `locate`.
      mesh: that the model will run on, and where the variables of a checkpoint are placed; None: this process's first
        device. Those of a folder are numpy arrays.

    Raises:
      CheckpointError: it is of another architecture than its config.
      WeightsError: the encoder's weights cannot be had, or the folder is damaged.
    """
    if found.run is None:
        return exported.read(found.path, mesh)
    saved = checkpoint.saved_shapes(found.path)
    # What train.start_from gave and did not train is in a checkpoint too.
    held, settings = {*found.run.train.trainable, *saved["params"]}, found.config
    if "decoder" in held:  # what it started from may be gone by now
        settings = settings.model_copy(update={"pretrained_decoder_path": None})
    built = build_tokenizer(settings, latent_stats=saved["batch_stats"].get("latent", {}), mesh=mesh)
    shapes = variable_shapes(built)
    trained = {n: p for n, p in shapes["params"].items() if n in held}
    checkpoint.check_shapes(saved, {**shapes, "params": trained}, found.path)
    place = functools.partial(placement, mesh=mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, place(saved))
    with _others_told(found.path):
        model = checkpoint.read_model(found.path, target)
    key = jax.random.key(found.run.train.seed)
    rest = initial_params(built, key, [n for n in PARTS if n not in trained], place)
    return built.module, {**model, "params": {**rest, **model["params"]}}


@contextlib.contextmanager
def _others_told(path: storage.Path) -> Iterator[None]:
    """Of a damaged checkpoint, what can be given in its place: none takes it unasked, whose codes mean other things."""
    try:
        yield
    except DamagedError as error:
        others = [step for step in checkpoint.completed_steps(path.parent) if str(step) != path.name]
        there = (
            f"{path.parent}/{others[-1]} can be given in its place (there are {others})"
            if others
            else "there is no other"
        )
        raise DamagedError(f"{error}; {there}") from error


def _here(path: str | os.PathLike) -> storage.Path:
    """`path`, or a copy of an exported folder in a bucket; checkpoints are read where they are."""
    place = storage.resolve_path(path)
    with storage.convert_errors(place, "read"):
        copied = storage.is_remote(place) and (place / exported.CONFIG).is_file()
    return storage.download(place) if copied else place


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _measured(workdir: storage.Path, step: int | None) -> dict[str, Any]:
    """What the run's log says of the evaluation at `step`; more, and by what protocol, where it was evaluated."""
    log, evaluation = workdir / METRICS_FILE, workdir / EVALUATION_FILE
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    logged: dict[str, float] = {}
    for values in map(_object, lines):
        if values.get("step") == step:
            logged |= {name: value for name, value in values.items() if name.startswith("eval/")}
    told = _object(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {}
    if told.get("step") == step and "metrics" in told:
        return {"figures": told["metrics"], "protocol": told.get("protocol", {})}
    return {"figures": logged} if logged else {}


def _object(text: str) -> dict[str, Any]:
    """A JSON object; an empty one for text that a kill cut short."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
