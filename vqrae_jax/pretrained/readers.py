"""Reading of single weight files of all formats; anything wrong with a file is a WeightsError that names it."""

import contextlib
import json
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.errors import WeightsError, first_line

_MAX_JSON = 2**28  # bytes of a JSON file
_MAX_REPEATED = 2**30  # bytes of a tensor that repeats (a part of) its storage

Tensors = Mapping[str, np.ndarray]

# Modules that PyTorch's wrappers add to names, anywhere and in any order: DistributedDataParallel, torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_tensors(file: pathlib.Path, field: str) -> Mapping[str, Any]:
    """Reads a .safetensors, .npz, Flax .msgpack or PyTorch file (.pt, .pth, .bin, .ckpt; possibly a dict of dicts).

    `field` is the config field or flag that names it, for messages. A pickle that would run code is refused.
    """
    readers = {".safetensors": lambda f, field: Safetensors([f], field), ".npz": _read_npz, ".msgpack": _read_msgpack}
    readers |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), read_torch)
    if file.suffix not in readers:
        raise WeightsError(f"{file} has an unknown format; weights are read from {', '.join(readers)}", field=field)
    if not file.is_file():
        raise WeightsError(f"{file} does not exist", field=field)
    return readers[file.suffix](file, field)


class Safetensors(Tensors):
    """Tensors of one or several safetensors files, each read when it is used."""

    def __init__(self, files: list[pathlib.Path], field: str):
        import ml_dtypes  # noqa: F401  (adds bfloat16 to numpy's dtypes)
        import safetensors

        self._files, self._field = {}, field
        for file in files:
            with _explain(file, field, "a complete safetensors file"), safetensors.safe_open(file, "np") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        import safetensors

        file = self._files[name]
        # Opened for each tensor: a file that stays mapped keeps all pages that were read in memory, a second copy.
        with _explain(file, self._field, "a complete safetensors file"), safetensors.safe_open(file, "np") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Renamed(Tensors):
    """Tensors under other names, each read when it is used; `names` maps them to the present ones."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def unwrap(tensors: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Removes PyTorch's wrappers: modules in names, as in `decoder._orig_mod.x` and `module.x`; Lightning's dict."""
    if isinstance(state := tensors.get("state_dict"), Mapping):
        tensors = state
    names: dict[str, str] = {}
    for name in tensors:
        if name == "n_averaged":  # a counter of torch's AveragedModel, not of the model
            continue
        if (other := names.setdefault(_WRAPPERS.sub("", name), name)) != name:
            raise WeightsError(f"{source} has two tensors for one parameter: {other} and {name}; save one of them")
    return tensors if list(names) == list(tensors) else Renamed(tensors, names)


def _read_npz(file: pathlib.Path, field: str) -> Tensors:
    with _explain(file, field, "a complete npz file of plain arrays"):
        storage.check_unpacked(file)
        with np.load(file, allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files}


def _read_msgpack(file: pathlib.Path, field: str) -> Tensors:
    """Reads a tree of Flax modules that mirror PyTorch's, as in the hub's flax_model.msgpack."""
    with _explain(file, field, "a complete Flax msgpack file"):
        import flax.serialization
        from flax.traverse_util import flatten_dict

        tree = flax.serialization.msgpack_restore(file.read_bytes())
        return dict(_to_torch(path, np.asarray(leaf)) for path, leaf in flatten_dict(tree).items())


def _to_torch(path: tuple[str, ...], leaf: np.ndarray) -> tuple[str, np.ndarray]:
    """Converts Flax's leaf name and layout to PyTorch's."""
    *modules, last = path[1:] if path[0] == "params" else path
    if last == "kernel":
        leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    torch_name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join([*modules, torch_name.get(last, last)]), leaf


def read_torch(file: pathlib.Path, field: str) -> dict[str, Any]:
    """Reads a PyTorch file as (nested) dicts of numpy arrays, by torch's weights-only reader, which runs no code."""
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{file} is a PyTorch file and PyTorch is not installed: pip install 'vqrae-jax[torch]'", field=field
        ) from None

    import ml_dtypes

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if value.nbytes > max(_MAX_REPEATED, value.untyped_storage().nbytes()):
                raise ValueError(f"a tensor of {value.nbytes} bytes repeats a part of the file")
            if value.dtype == torch.bfloat16:  # torch does not convert it to numpy
                return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()
        return {str(k): to_numpy(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    with _explain(file, field, "a PyTorch file of plain tensors (other files could run code, and are refused)"):
        # Mapped into memory where the format allows it: most of a training checkpoint is never used.
        if mapped := zipfile.is_zipfile(file):
            storage.check_unpacked(file)
        try:
            loaded = to_numpy(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
        except pickle.UnpicklingError as error:  # torch's own message explains how to run the code anyway
            code = re.search(r"GLOBAL (\S+)", str(error))
            if not code:
                raise WeightsError(f"{file} is damaged, or not a PyTorch file of plain tensors", field=field) from error
            raise WeightsError(
                f"{file} needs {code[1]}, which is refused because it could run code; if you trust the file, save "
                "only its tensors with PyTorch",
                field=field,
            ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file} contains a {type(loaded).__name__}, expected a dict of tensors", field=field)
    return loaded


def read_json(file: pathlib.Path, field: str) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        loaded = json.loads(storage.read_bytes(os.fspath(file), limit=_MAX_JSON))
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing; expected a folder or hub id that contains it", field=field) from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}", field=field) from None
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file} contains a JSON {type(loaded).__name__}, expected an object", field=field)
    return loaded


@contextlib.contextmanager
def _explain(file: pathlib.Path, field: str, kind: str) -> Iterator[None]:
    """Raises WeightsError for any error: readers of damaged files fail on headers, sizes, names, text, compression."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise WeightsError(f"{file} is not {kind} ({reason})", field=field) from error
