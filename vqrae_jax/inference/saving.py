"""Trained models saved as folders: config.json and model.safetensors, read by `Tokenizer.load`.

A frozen pretrained encoder is not in the folder: config.json has its source and the content hash that it must have. It
also has the SHA-256 of both files, which are compared before they are used.
"""

import hashlib
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import __version__, storage
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.config import ModelConfig, from_saved
from vqrae_jax.errors import WeightsError
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import readers, writers

log = logging.getLogger(__name__)

FORMAT = "vqrae_jax"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELDS = {"format", "version", "model", "encoder", "provenance", "sha256"}  # of config.json
FIELD = "--checkpoint"  # what names the folder, in messages


def save_folder(
    folder: pathlib.Path, config: ModelConfig, variables: Any, frozen: bool, provenance: dict[str, Any] | None = None
) -> pathlib.Path:
    """Writes a model to a local folder, which is created if it is missing, and returns the folder.

    Args:
      folder, config: the local folder, and the model section.
      variables: {"params", "batch_stats"} of the whole model.
      frozen: whether the encoder is the pretrained one that the config names; it is left out.
      provenance: values for config.json: where the model comes from, its metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params, encoder = dict(variables["params"]), None
    if frozen and config.encoder_config_path is not None:
        digest = writers.content_hash(params.pop("encoder"))
        encoder = {"source": config.encoder_config_path, "sha256": digest}
    content = {
        "format": FORMAT,
        "version": __version__,
        # The decoder's weights are in the folder.
        "model": config.model_copy(update={"pretrained_decoder_path": None}).model_dump(mode="json"),
        "encoder": encoder,
        "provenance": {"version": __version__} | (provenance or {}),
    }
    writers.write_safetensors({"params": params, "batch_stats": variables["batch_stats"]}, folder / WEIGHTS)
    content["sha256"] = {WEIGHTS: storage.hash_file(folder / WEIGHTS), CONFIG: _digest(content)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def is_saved_folder(folder: pathlib.Path) -> bool:
    """Returns whether `save_folder` wrote this folder."""
    return (folder / CONFIG).is_file() and readers.read_json(folder / CONFIG, FIELD).get("format") == FORMAT


def read_description(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, str] | None, dict[str, Any]]:
    """Reads config.json; raises WeightsError if it is damaged or from another program.

    Returns:
      The model section, "source" and "sha256" of a pretrained encoder that is not in the folder, and the provenance.
    """
    content = _read_config(folder)
    encoder = content.get("encoder")
    complete = encoder is None or (isinstance(encoder, dict) and {"source", "sha256"} <= set(encoder))
    if content.get("format") != FORMAT or not isinstance(content.get("model"), dict) or not complete:
        raise WeightsError(f"{folder / CONFIG} is not the config of a saved {FORMAT} model", field=FIELD)
    provenance = {"version": content.get("version")} | (content.get("provenance") or {})
    return from_saved(ModelConfig, content["model"]), encoder, provenance


def stored_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors in the folder."""
    tensors = _read_weights(folder)
    return {name: tuple(tensors[name].shape) for name in tensors}


def load_folder(folder: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> tuple[VQRAE, dict[str, Any]]:
    """Returns the module, built for `mesh`, and its variables as numpy arrays; checks the encoder's content hash."""
    config, encoder, _ = read_description(folder)
    tensors = _read_weights(folder)
    variables = unflatten_dict({name: np.asarray(tensors[name]) for name in tensors}, sep="/")
    variables = {"params": {}, "batch_stats": {}} | variables
    stats = variables["batch_stats"].get("latent", {})
    built = build_tokenizer(config, latent_stats=stats, weights=encoder is not None, mesh=mesh)
    if encoder is not None:
        variables["params"]["encoder"] = built.pretrained["encoder"]
        if (digest := writers.content_hash(built.pretrained["encoder"])) != encoder["sha256"]:
            raise WeightsError(
                f"{folder} was trained with an encoder of {encoder['source']} that had the content hash "
                f"{encoder['sha256']}, but the hash is now {digest}, so its codes would have another meaning; restore "
                "the encoder's weights",
                field=FIELD,
            )
    shapes, expected = (
        {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (variables, variable_shapes(built))
    )
    if names := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
        listed = ", ".join(
            f"{n} ({shapes.get(n, 'missing')} in the file, {expected.get(n, 'nothing')} expected)" for n in names[:8]
        )
        raise WeightsError(
            f"{folder / WEIGHTS} does not match its {CONFIG} in {len(names)} tensors: {listed}", field=FIELD
        )
    return built.module, variables


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    content = readers.read_json(folder / CONFIG, FIELD)
    if unknown := sorted(content.keys() - FIELDS):
        problem = f"has unknown fields ({', '.join(unknown)}): it is damaged or of a newer version"
        raise WeightsError(f"{folder / CONFIG} {problem}", field=FIELD)
    digests = content.get("sha256", {CONFIG: _digest(content)})
    if not isinstance(digests, dict) or digests.get(CONFIG) != _digest(content):
        raise WeightsError(
            f"{folder / CONFIG} is not the file that was saved; copy the folder again, or remove sha256 from the file "
            "if it was edited on purpose",
            field=FIELD,
        )
    return content


def _read_weights(folder: pathlib.Path) -> readers.Tensors:
    digests, file = _read_config(folder).get("sha256"), folder / WEIGHTS
    if digests is None:
        log.warning("%s cannot be checked for damage: it was saved by a version that wrote no digests", folder)
    elif file.is_file() and storage.hash_file(file) != digests.get(WEIGHTS):
        raise WeightsError(f"{file} is damaged: it is not the file that was saved; copy the folder again", field=FIELD)
    return readers.read_tensors(file, FIELD)


def _digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of all fields but "sha256", as they are after a round trip through JSON."""
    fields = json.loads(json.dumps({name: value for name, value in content.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
