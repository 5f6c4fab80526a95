"""Where pretrained files come from (a local folder or file, a hub id) and what they say, without PyTorch."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.errors import WeightsError, first_line
from vqrae_jax.pretrained.readers import Safetensors, Tensors, read_json, read_tensors

DESCRIPTIONS = ["config.json", "preprocessor_config.json"]
# A hub folder often has the same weights in several formats: only the first that is there is fetched.
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "flax_model.msgpack"]
PATIENCE = 10  # seconds until a hub that does not answer is out of reach
PRINCIPAL_AXES = ["pca_mean", "pca_basis", "pca_var"]


def fetch_folder(name: str, field: str) -> pathlib.Path:
    """The folder of a pretrained model: `name` itself if it is a local folder, else a copy from a bucket or the hub.

    Args:
      name: local path, address (gs://...) or hub id ("facebook/dinov2-base").
      field: the config field that named it, for messages.
    """
    local = storage.download(name)
    if local.is_dir():
        return local
    if storage.is_remote(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise WeightsError(
            f"{field}={name!r} is neither a folder, on this machine or in a bucket, nor a hub id (owner/name)"
        )

    def snapshot(there: list[str] | None) -> str:
        import huggingface_hub

        wanted = [*WEIGHTS, "*.safetensors"]
        if there is not None:
            best = next((file for file in WEIGHTS if file in there), WEIGHTS[0])
            wanted = ["*.safetensors", "*.safetensors.index.json"] if "safetensors" in best else [best]
        return huggingface_hub.snapshot_download(
            name, allow_patterns=DESCRIPTIONS + wanted, local_files_only=there is None
        )

    return _from_hub(snapshot, name, name, field)


def fetch_file(name: str, field: str) -> pathlib.Path:
    """One file: a local path, an address, or one inside a hub repository ("nyu-visionx/RAE-collections/.../model.pt").

    Of one in a bucket, a copy.
    """
    local = storage.download(name)
    if local.is_file():
        return local
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if storage.is_remote(name) or name.startswith((".", "/", "~")) or not path or local.is_dir():
        raise WeightsError(
            f"{field}={name!r} is neither a file on this machine nor one of a hub repository (owner/name/path/to/file)"
        )

    def download(there: list[str] | None) -> str:
        import huggingface_hub

        return huggingface_hub.hf_hub_download(f"{owner}/{repository}", path, local_files_only=there is None)

    return _from_hub(download, f"{owner}/{repository}", name, field)


def _from_hub(download: Callable[[list[str] | None], str], repository: str, name: str, field: str) -> pathlib.Path:
    """`download` of the names of the files in a repository; of None, from the cache, where the hub is out of reach."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        try:
            there = _files(repository)
        except HfHubHTTPError:
            raise  # it was reached, and says no
        except Exception as unreachable:
            try:
                return pathlib.Path(download(None))
            except Exception:
                raise unreachable from None
        return pathlib.Path(download(there))
    except Exception as error:  # the hub client has many: no network, no such model, gated, disk
        raise WeightsError(
            f"{field}={name!r} could not be had from the model hub ({type(error).__name__}: {first_line(error)}), and "
            f"is no path on this machine. Download it "
            f"where there is a network and give the local path, or set HF_HOME to a cache that holds it"
        ) from error


def _files(repository: str) -> list[str] | None:
    """What is in a hub repository, None in offline mode. Asked once: downloads try for half a minute to reach it."""
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return None
    return [file.rfilename for file in huggingface_hub.HfApi().model_info(repository, timeout=PATIENCE).siblings]


def read_config(folder: pathlib.Path, field: str) -> dict[str, Any]:
    """config.json with the defaults that it leaves out."""
    path = folder / "config.json"
    given = read_json(path, field)
    if not isinstance(given.get("model_type"), str):
        raise WeightsError(f"{path} ({field}) has no model_type: it is not the config of a pretrained model")
    return complete_config(given, f"{path} ({field})")


def complete_config(given: dict[str, Any], source: str) -> dict[str, Any]:
    """Fills in the defaults of `given["model_type"]`, as transformers knows them."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that PyTorch is absent
    import transformers

    try:
        return transformers.AutoConfig.for_model(**given).to_dict()
    except Exception as error:
        raise WeightsError(f"{source} is not a config that transformers reads: {error}") from error


def read_image_statistics(folder: pathlib.Path, field: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images in [0, 1], from preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    given = read_json(path, field)
    try:
        mean, std = (tuple(float(x) for x in given[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise WeightsError(f"{path} ({field}) lacks image_mean and image_std, three numbers each") from None
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise WeightsError(f"{path} ({field}): image_mean={mean}, image_std={std}; three numbers each, std positive")
    return mean, std


def read_weights(folder: pathlib.Path, field: str) -> Tensors:
    """The weights of a hub folder: safetensors in one file or in shards, else what PyTorch or Flax saved there."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"{folder} ({field}) has none of {', '.join(WEIGHTS)}")
    return _read_shards(found, field) if found.suffix == ".json" else read_tensors(found, field)


def _read_shards(index: pathlib.Path, field: str) -> Tensors:
    weight_map = read_json(index, field).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightsError(f"{index} ({field}) has no weight_map from tensors to files")
    # An index names files beside it; a path that leads elsewhere is not followed.
    names = sorted({pathlib.PurePath(file).name for file in weight_map.values()})
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent or not names:
        raise WeightsError(f"{index} ({field}) names shards that are not there: {', '.join(absent) or 'none named'}")
    return Safetensors([index.parent / name for name in names], field)


def read_latent_statistics(path: str, field: str) -> dict[str, np.ndarray]:
    """Mean and/or variance of the latents, channel last: [C] or [h, w, C].

    Reads .npz (arrays mean and/or var, channel last) and the origin's .pt (a dict; channel first, mean may be None).
    """
    file = fetch_file(path, field)
    given = {k: v for k, v in read_tensors(file, field).items() if isinstance(v, np.ndarray)}
    if file.suffix != ".npz":
        given = {k: np.moveaxis(v, 0, -1) if v.ndim == 3 else v for k, v in given.items()}
    stats = {k: np.asarray(given[k], np.float32) for k in ("mean", "var") if k in given}
    if not stats or any(v.ndim not in (1, 3) for v in stats.values()):
        shapes = {k: np.shape(v) for k, v in given.items()}
        raise WeightsError(f"{file} ({field}) holds {shapes}; expected mean and/or var per channel or per position")
    return stats


def read_principal_axes(path: str, field: str) -> dict[str, np.ndarray] | None:
    """`pca_mean` [C], `pca_basis` [C, n] and `pca_var` [n] of the latents; None where the file has none of them."""
    file = fetch_file(path, field)
    given = read_tensors(file, field)
    axes = {name: np.asarray(given[name], np.float32) for name in PRINCIPAL_AXES if name in given}
    if not axes:
        return None
    shapes = {name: value.shape for name, value in axes.items()}
    channels, count = shapes.get("pca_basis", (0,))[0], shapes.get("pca_basis", (0,))[-1]
    if shapes != dict(zip(PRINCIPAL_AXES, [(channels,), (channels, count), (count,)], strict=True)):
        raise WeightsError(
            f"{file} ({field}) holds {shapes}; expected pca_mean [C], pca_basis [C, n] and pca_var [n]. "
            "vqrae_jax.commands.latent_statistics writes them"
        )
    return axes


def read_state_dict(path: str, field: str) -> Mapping[str, Any]:
    """Tensors of one file (see `readers.read_tensors`), local or inside a hub repository, or of a local folder."""
    folder = storage.download(path)
    if folder.is_dir():
        return read_weights(folder, field)
    return read_tensors(fetch_file(path, field), field)


def read_named(name: str, field: str) -> Mapping[str, Any]:
    """Tensors of a local file or folder, of a hub id (owner/name), or of a file inside a hub repository."""
    if storage.download(name).exists() or name.count("/") != 1:
        return read_state_dict(name, field)
    return read_weights(fetch_folder(name, field), field)
