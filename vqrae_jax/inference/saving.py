"""A trained model as a folder to pass on: config.json and model.safetensors, read by `Tokenizer.load`.

A frozen pretrained encoder is not in it: config.json says where it is had (hub id) and the content hash it must have.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqrae_jax import __version__
from vqrae_jax import config as config_lib
from vqrae_jax.build.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.errors import WeightsError
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.pretrained import readers, writers

FORMAT = "vqrae_jax"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(
    folder: str | os.PathLike,
    config: config_lib.ModelConfig,
    variables: Any,
    frozen: bool,
    provenance: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Writes `variables` ({"params", "batch_stats"}, all parts) to `folder`.

    Args:
      folder: made where it is missing.
      config: the model section.
      variables: arrays of any kind.
      frozen: the encoder is the pretrained one that the config names; it is left out, and its content hash noted.
      provenance: plain values to note: where it comes from, its figures.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frozen = frozen and config.encoder_config_path is not None
    params = {name: tree for name, tree in variables["params"].items() if not (frozen and name == "encoder")}
    described = {
        "format": FORMAT,
        "version": __version__,
        # Both are in model.safetensors now.
        "model": config.model_copy(update={"pretrained_decoder_path": None}).model_dump(mode="json"),
        "encoder": None,
        "provenance": {"version": __version__} | (provenance or {}),
    }
    if frozen:
        digest = writers.content_hash(variables["params"]["encoder"])
        described["encoder"] = {"source": config.encoder_config_path, "sha256": digest}
    writers.write_safetensors({"params": params, "batch_stats": variables["batch_stats"]}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    return folder


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `write` made this folder."""
    file = pathlib.Path(path).expanduser() / CONFIG
    return file.is_file() and readers.read_json(file, "--checkpoint").get("format") == FORMAT


def read_config(path: str | os.PathLike) -> config_lib.ModelConfig:
    """The model section of the folder's config."""
    return config_lib.from_dict(config_lib.ModelConfig, _described(path)["model"])


def has_pretrained_encoder(path: str | os.PathLike) -> bool:
    """Whether the encoder is not in the folder, but had from elsewhere."""
    return _described(path).get("encoder") is not None


def read_provenance(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` was told, and the version of this package that the folder is from."""
    described = _described(path)
    return {"version": described.get("version")} | (described.get("provenance") or {})


def stored_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the folder."""
    tensors = readers.read_tensors(pathlib.Path(path).expanduser() / WEIGHTS, "--checkpoint")
    return {name: tuple(tensors[name].shape) for name in tensors}


def read(path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None) -> tuple[VQRAE, dict[str, Any]]:
    """The module, to run on `mesh` if on one, and its variables, with the encoder from where config.json says.

    Raises:
      WeightsError: the folder is damaged, or the encoder cannot be had or is another one than it was.
    """
    folder, encoder = pathlib.Path(path).expanduser(), _described(path).get("encoder")
    file = folder / WEIGHTS
    flat = {name: np.asarray(leaf) for name, leaf in readers.read_tensors(file, "--checkpoint").items()}
    variables = {"params": {}, "batch_stats": {}} | unflatten_dict(flat, sep="/")
    stats = variables["batch_stats"].get("latent", {})
    built = build_tokenizer(read_config(folder), latent_stats=stats, weights=encoder is not None, mesh=mesh)
    if encoder is not None:
        loaded = built.pretrained["encoder"]
        if (digest := writers.content_hash(loaded)) != encoder["sha256"]:
            raise WeightsError(
                f"{folder} was trained on an encoder {encoder['source']} whose content hash is {encoder['sha256']}, "
                f"but what is there now has {digest}: its codes would mean something else. Use the weights of that time"
            )
        variables["params"]["encoder"] = loaded
    _check(variables, variable_shapes(built), file)
    return built.module, variables


def _described(path: str | os.PathLike) -> dict[str, Any]:
    file = pathlib.Path(path).expanduser() / CONFIG
    described = readers.read_json(file, "--checkpoint")
    encoder = described.get("encoder")
    complete = encoder is None or (isinstance(encoder, dict) and {"source", "sha256"} <= set(encoder))
    if described.get("format") != FORMAT or not isinstance(described.get("model"), dict) or not complete:
        raise WeightsError(f"{file} is not the config of an exported {FORMAT} model")
    return described


def _check(variables: Any, shapes: Any, file: pathlib.Path) -> None:
    have, want = ({n: tuple(x.shape) for n, x in flatten_dict(t, sep="/").items()} for t in (variables, shapes))
    if have != want:
        differing = sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n))
        shown = ", ".join(
            f"{n} ({have.get(n, 'missing')} in the file, {want.get(n, 'unknown')} expected)" for n in differing[:8]
        )
        raise WeightsError(f"{file} does not fit its config.json in {len(differing)} tensors: {shown}")
