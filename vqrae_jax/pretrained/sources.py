"""Where pretrained files come from (a local folder or file, a hub id) and what they say, without PyTorch."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vqrae_jax.pretrained.tables import PretrainedError

HUB_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def fetch(name: str, field: str) -> pathlib.Path:
    """The folder of a pretrained model: `name` itself if it is a local folder, else the hub snapshot of that id.

    Args:
      name: local path or hub id ("facebook/dinov2-base").
      field: the config field that named it, for messages.
    """
    local = pathlib.Path(name).expanduser()
    if local.is_dir():
        return local
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise PretrainedError(f"{field}={name!r} is neither a folder on this machine nor a hub id (owner/name)")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client has many: no network, no such model, gated, disk
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise PretrainedError(
            f"{field}={name!r} could not be had from the model hub ({type(error).__name__}: {reason}). Download the "
            f"model where there is a network and give its folder, or set HF_HOME to a cache that holds it"
        ) from error


def read_config(folder: pathlib.Path, field: str) -> dict[str, Any]:
    """config.json with the defaults that it leaves out."""
    path = folder / "config.json"
    given = read_json(path, field)
    if "model_type" not in given:
        raise PretrainedError(f"{path} ({field}) has no model_type: it is not the config of a pretrained model")
    return complete_config(given, f"{path} ({field})")


def complete_config(given: dict[str, Any], source: str) -> dict[str, Any]:
    """Fills in the defaults of `given["model_type"]`, as transformers knows them."""
    import transformers

    try:
        return transformers.AutoConfig.for_model(**given).to_dict()
    except Exception as error:
        raise PretrainedError(f"{source} is not a config that transformers reads: {error}") from error


def read_image_statistics(folder: pathlib.Path, field: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images in [0, 1], from preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    given = read_json(path, field)
    try:
        mean, std = (tuple(float(x) for x in given[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError):
        raise PretrainedError(f"{path} ({field}) lacks image_mean and image_std, three numbers each") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise PretrainedError(f"{path} ({field}): image_mean={mean}, image_std={std}; three numbers each, std positive")
    return mean, std


class Safetensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files, read when asked for."""

    def __init__(self, files: list[pathlib.Path]):
        import safetensors

        self._where = {}
        for file in files:
            try:
                opened = safetensors.safe_open(file, framework="np")
                self._where |= dict.fromkeys(opened.keys(), opened)
            except (safetensors.SafetensorError, OSError) as error:
                raise PretrainedError(f"{file} is not a complete safetensors file: {error}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_weights(folder: pathlib.Path, field: str) -> Safetensors:
    """The weights of a hub folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return Safetensors([single])
    if not index.is_file():
        raise PretrainedError(f"{folder} ({field}) has neither model.safetensors nor {index.name}")
    names = sorted(set(read_json(index, field).get("weight_map", {}).values()))
    absent = [n for n in names if not (folder / os.path.basename(n)).is_file()]
    if absent or not names:
        raise PretrainedError(f"{index} ({field}) names shards that are not there: {', '.join(absent) or 'none named'}")
    return Safetensors([folder / os.path.basename(n) for n in names])


def read_latent_statistics(path: str, field: str) -> dict[str, np.ndarray]:
    """Mean and/or variance of the latents, channel last: [C] or [h, w, C].

    Reads .npz (arrays mean and/or var, channel last) and the origin's .pt (a dict; channel first, mean may be None).
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise PretrainedError(f"{field}={path!r} is not a file")
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as npz:
            given = {k: npz[k] for k in npz.files}
    else:
        given = {k: v.numpy() for k, v in read_torch(file, field).items() if v is not None}
        given = {k: np.moveaxis(v, 0, -1) for k, v in given.items()}
    stats = {k: np.asarray(given[k], np.float32) for k in ("mean", "var") if k in given}
    if not stats or any(v.ndim not in (1, 3) for v in stats.values()):
        shapes = {k: np.shape(v) for k, v in given.items()}
        raise PretrainedError(f"{file} ({field}) holds {shapes}; expected mean and/or var per channel or per position")
    return stats


def read_torch(file: pathlib.Path, field: str) -> dict[str, Any]:
    """A .pt or .pth file, by torch's weights-only reader: a pickle that would run code is refused."""
    try:
        import torch
    except ImportError:
        raise PretrainedError(
            f"{file} ({field}) is a PyTorch file: reading it needs PyTorch; pip install 'vqrae-jax[torch]'"
        ) from None
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PretrainedError(f"{file} ({field}) is no PyTorch file of plain tensors: {error}") from error
    if not isinstance(loaded, dict):
        raise PretrainedError(f"{file} ({field}) holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def read_state_dict(path: str, field: str) -> Mapping[str, np.ndarray]:
    """Tensors of one file: .safetensors, .npz, or a .pt/.pth state dict."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise PretrainedError(f"{field}={path!r} is not a file on this machine")
    if file.suffix == ".safetensors":
        return Safetensors([file])
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files}
    return {name: tensor.float().numpy() for name, tensor in read_torch(file, field).items()}


def read_json(path: pathlib.Path, field: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PretrainedError(f"{path} is missing; {field} must be a folder (or hub id) that has it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path} ({field}) is not JSON: {error}") from None
