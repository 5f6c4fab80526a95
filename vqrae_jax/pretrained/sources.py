"""Pretrained models of local folders, buckets and the model hub: their files, read without PyTorch.

`field` is the config field that names a file or model, for messages. All functions raise WeightsError for what is
missing, damaged or cannot be downloaded.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqrae_jax import hub, storage
from vqrae_jax.errors import WeightsError
from vqrae_jax.pretrained.readers import Safetensors, Tensors, read_json, read_tensors, read_torch, unwrap

DESCRIPTIONS = ["config.json", "preprocessor_config.json"]
# Hub folders often have the same weights in several formats: the first of these that exists is downloaded.
_STEMS = {"safetensors": ("model", "diffusion_pytorch_model"), "bin": ("pytorch_model", "diffusion_pytorch_model")}
_FILES = [f"{stem}.{kind}" for kind, stems in _STEMS.items() for stem in stems]
WEIGHTS = [*(file + index for file in _FILES for index in ("", ".index.json")), "flax_model.msgpack"]
Channels = tuple[float, ...]  # one value per channel
PRINCIPAL_AXES = ["pca_mean", "pca_basis", "pca_var"]


def fetch_folder(name: str, field: str) -> pathlib.Path:
    """Returns a local folder as it is, or a copy from a bucket (gs://...) or the hub ("facebook/dinov2-base")."""
    local = storage.download(name)
    if local.is_dir():
        return local
    if not hub.is_hub_path(name, 2):
        raise WeightsError(
            "expected a folder, on this machine or in a bucket, or a hub id (owner/name)", field=field, value=name
        )

    def load(files: list[str] | None) -> str:
        import huggingface_hub

        patterns = [*WEIGHTS, "*.safetensors"]
        if files is not None:
            best = next((file for file in WEIGHTS if file in files), WEIGHTS[0])
            stem, _, kind = best.removesuffix(".index.json").rpartition(".")
            patterns = [best, f"{stem}-*.{kind}"]  # its shards, if it is an index
        return huggingface_hub.snapshot_download(
            name, allow_patterns=DESCRIPTIONS + patterns, local_files_only=files is None
        )

    return hub.download(name, load, name, field)


def fetch_file(name: str, field: str) -> pathlib.Path:
    """Returns a local file as it is, or a copy from a bucket (gs://...) or the hub ("owner/name/path/to/model.pt")."""
    local = storage.download(name)
    if local.is_file():
        return local
    if not hub.is_hub_path(name, 3) or local.is_dir():
        raise WeightsError(
            "expected a file, on this machine or in a bucket, or one of a hub repository (owner/name/path/to/file)",
            field=field, value=name,
        )  # fmt: skip
    owner, repository, path = name.split("/", 2)

    def load(files: list[str] | None) -> str:
        import huggingface_hub

        return huggingface_hub.hf_hub_download(f"{owner}/{repository}", path, local_files_only=files is None)

    return hub.download(f"{owner}/{repository}", load, name, field)


def is_hub_id(name: str) -> bool:
    """Returns whether `fetch_folder` reads `name` from the hub, so that other machines have it too."""
    return hub.is_hub_path(name, 2) and not storage.resolve_path(name).is_dir()


def read_config(folder: pathlib.Path, field: str) -> dict[str, Any]:
    """Reads config.json, which leaves out fields with default values, see `families.DEFAULTS`."""
    path = folder / "config.json"
    values = read_json(path, field)
    if not isinstance(values.get("model_type"), str):
        raise WeightsError(f"{path} has no model_type, so it is not the config of a pretrained model", field=field)
    return values


def read_image_statistics(folder: pathlib.Path, field: str) -> tuple[Channels, Channels]:
    """Reads mean and standard deviation per channel of images in [0, 1] from preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    return parse_image_statistics(read_json(path, field), str(path), field)


def parse_image_statistics(values: Mapping[str, Any], name: str, field: str) -> tuple[Channels, Channels]:
    """Returns image_mean and image_std of a description, which `name` names in messages."""
    try:
        mean, std = (tuple(float(x) for x in values[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise WeightsError(f"{name} lacks image_mean and image_std, three numbers each", field=field) from None
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise WeightsError(
            f"{name} has image_mean={mean}, image_std={std}; expected three numbers each, std positive", field=field
        )
    return mean, std


def read_weights(folder: pathlib.Path, field: str) -> Tensors:
    """Reads the weights of a hub folder: safetensors or PyTorch files, one or shards, or a Flax file."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} has none of {', '.join(WEIGHTS)}", field=field)
    if file.suffix != ".json":
        return unwrap(read_tensors(file, field), str(file))
    weight_map = read_json(file, field).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(f"{file} has no weight_map from tensors to files", field=field)
    # Only files next to the index are read, whatever folder the index names.
    shards = sorted({pathlib.PurePath(shard).name for shard in weight_map.values()})
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent or not shards:
        raise WeightsError(f"{file} names missing shards: {', '.join(absent) or 'it lists no file'}", field=field)
    files = [folder / name for name in shards]
    if ".safetensors" in file.suffixes:
        return unwrap(Safetensors(files, field), str(folder))
    tensors = [read_torch(shard, field) for shard in files]
    return unwrap({name: shard[name] for shard in tensors for name in shard}, str(folder))


def read_latent_statistics(path: str, field: str, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Reads mean and/or variance of the latents, channel last: [C], or [h, w, C] if they differ by position.

    The file is .npz (arrays mean and/or var, channel last), or the PyTorch VQRAE's .pt (a dict; channel first, mean may
    be None). Arrays of any shape that broadcasts to `shape`, (h, w, C), are accepted, and per-channel ones of any rank.
    """
    file = fetch_file(path, field)
    tensors = read_tensors(file, field)
    values = {k: tensors[k] for k in ("mean", "var") if isinstance(tensors.get(k), np.ndarray | float | int)}
    try:
        stats = {k: broadcast_statistics(v, shape, file.suffix != ".npz") for k, v in values.items()}
    except ValueError:
        stats = {}
    if not stats or np.any(stats.get("var", np.zeros(1)) < 0):
        shapes = {k: np.shape(v) for k, v in (values or tensors).items()}
        expected = f"finite, one value, one per channel ({shape[-1]}), or one per position ({shape[0]}x{shape[1]}) too"
        raise WeightsError(f"{file} has {shapes}; expected mean and/or var (0 or more), {expected}", field=field)
    return stats


def broadcast_statistics(value: Any, shape: tuple[int, int, int], channel_first: bool) -> np.ndarray:
    """Broadcasts a statistic of latents to [C], or [h, w, C] = `shape`; raises ValueError for other shapes."""
    value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
        raise ValueError("not all of its values are finite")
    if value.size in (1, shape[-1]) and value.size == max(value.shape, default=1):
        return np.broadcast_to(value.reshape(-1), shape[-1:]).copy()
    value = value.reshape(value.shape[-3:])  # a batch axis of one
    if channel_first:
        value = np.moveaxis(value.reshape((1, 1, *value.shape)[-3:]), 0, -1)
    return np.broadcast_to(value, shape).copy()


def read_latent_description(path: str, field: str) -> dict[str, Any] | None:
    """Reads the description of the latents that a file of statistics is of; None for files without one."""
    file = fetch_file(path, field)
    text = read_tensors(file, field).get("latent")
    if text is None:
        return None
    try:
        values = json.loads(str(text))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise WeightsError(f"{file} does not describe its latents: {text!r}; create it again", field=field)
    return values


def read_principal_axes(path: str, field: str) -> dict[str, np.ndarray] | None:
    """Reads `pca_mean` [C], `pca_basis` [C, n] and `pca_var` [n] of the latents; None if the file has none of them."""
    file = fetch_file(path, field)
    tensors = read_tensors(file, field)
    axes = {name: np.asarray(tensors[name], np.float32) for name in PRINCIPAL_AXES if name in tensors}
    if not axes:
        return None
    shapes = {name: value.shape for name, value in axes.items()}
    channels, count = shapes.get("pca_basis", (0,))[0], shapes.get("pca_basis", (0,))[-1]
    expected = dict(zip(PRINCIPAL_AXES, [(channels,), (channels, count), (count,)], strict=True))
    if shapes != expected or not all(np.isfinite(value).all() for value in axes.values()):
        raise WeightsError(
            f"{file} has {shapes}; expected finite pca_mean [C], pca_basis [C, n] and pca_var [n], as "
            "vqrae_jax.commands.latent_statistics writes them",
            field=field,
        )
    return axes


def fetch_weights(name: str, field: str) -> pathlib.Path:
    """Returns the local file or folder of weights: a path, a hub id, or a file inside a hub repository."""
    local = storage.download(name)
    if not (local.exists() or storage.is_remote(name)) and (name.startswith((".", "/", "~")) or local.parent.is_dir()):
        raise WeightsError(
            "is a missing local file: paths that start with ., / or ~, or whose parent folder exists, are not looked "
            "up on the model hub",
            field=field, value=name,
        )  # fmt: skip
    is_folder = local.is_dir() or (not local.exists() and hub.is_hub_path(name, 2))
    return fetch_folder(name, field) if is_folder else fetch_file(name, field)


def read_state_dict(name: str, field: str) -> Mapping[str, Any]:
    """Reads the tensors of a local file or folder, a hub id (owner/name), or a file inside a hub repository."""
    path = fetch_weights(name, field)
    return read_weights(path, field) if path.is_dir() else unwrap(read_tensors(path, field), name)
