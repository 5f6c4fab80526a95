"""Location of trained generators, as `location` has that of tokenizers."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from vqrae_jax import checkpoint, sharding, storage
from vqrae_jax import config as config_lib
from vqrae_jax.errors import CheckpointError, WeightsError
from vqrae_jax.inference import saving
from vqrae_jax.inference.batching import leaf_shardings
from vqrae_jax.inference.location import fetch, is_saved, read_metrics, suggest_other_steps


@dataclasses.dataclass(frozen=True)
class GeneratorLocation:
    """A generator on this machine or in a bucket."""

    path: storage.Path  # the saved folder, or the folder of one checkpoint
    config: config_lib.GeneratorConfig
    classes: tuple[str, ...] | None  # names
    provenance: dict[str, Any]  # version and, if known, revision, step and metrics of the training run
    run: config_lib.Config | None = None  # the whole config of a checkpoint; None for a saved folder


def locate_generator(path: str | os.PathLike, step: int | None = None) -> GeneratorLocation:
    """Finds a generator, see `Generator.load`, and reads its config.

    Raises:
      CheckpointError: there is no complete checkpoint, or it is of a tokenizer.
      WeightsError: it is the folder of a tokenizer, or damaged.
    """
    local = fetch(path)
    if is_saved(local, step):
        return GeneratorLocation(local, *saving.read_generator(local))
    folder = checkpoint.find_checkpoint(local, step)
    with suggest_other_steps(folder):
        meta = checkpoint.read_meta(folder)
    run = config_lib.from_saved(config_lib.Config, meta["config"])
    if run.train.task != "generator":
        message = f"is the run of a tokenizer: {saving.USE_TOKENIZER}"
        raise CheckpointError(message, field=saving.FIELD, value=str(path))
    provenance = {name: meta[name] for name in ("version", "revision", "step") if name in meta}
    provenance |= read_metrics(folder.parent.parent, meta.get("step"))
    classes = meta.get("classes")
    return GeneratorLocation(folder, run.generator, classes and tuple(classes), provenance, run)


def read_generator_variables(location: GeneratorLocation, shapes: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Reads the variables of the shapes onto a mesh, or onto this process's first device."""
    shardings = leaf_shardings(shapes, mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    if location.run is not None:
        with suggest_other_steps(location.path):
            return checkpoint.read_model(location.path, target)
    tensors = saving.read_weights(location.path)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(target)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    saved = {name: tuple(tensors[name].shape) for name in tensors}
    expected = {name: leaf.shape for name, leaf in names.items()}
    if differing := sorted(n for n in expected.keys() | saved.keys() if expected.get(n) != saved.get(n)):
        message = f"{location.path} does not match its config in {', '.join(differing[:8])}"
        raise WeightsError(message, field=saving.FIELD)
    placed = [sharding.place_array(np.asarray(tensors[name]), leaf.sharding) for name, leaf in names.items()]
    return jax.tree.unflatten(treedef, placed)
