"""One file -> its tensors under PyTorch's names. Whatever is wrong with it becomes a WeightsError naming it."""

import contextlib
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vqrae_jax.errors import WeightsError, first_line

Tensors = Mapping[str, np.ndarray]
SUFFIXES = ".safetensors, .npz, .msgpack, .pt, .pth, .bin"


def read_tensors(file: pathlib.Path, field: str) -> Mapping[str, Any]:
    """Tensors of one file: .safetensors, .npz, Flax .msgpack, or PyTorch (.pt, .pth, .bin; possibly a dict of dicts).

    Args:
      file: its suffix says the format.
      field: the config field or flag that named it, for messages.

    Raises:
      WeightsError: missing, damaged, of another format, or a pickle that would run code.
    """
    readers = {".safetensors": _one_safetensors, ".npz": _read_npz, ".msgpack": _read_msgpack}
    readers |= dict.fromkeys((".pt", ".pth", ".bin"), read_torch)
    if file.suffix not in readers:
        raise WeightsError(f"{file} ({field}): weights are read from {SUFFIXES}, not from {file.suffix or 'this'!r}")
    if not file.is_file():
        raise WeightsError(f"{file} ({field}) is not there")
    return readers[file.suffix](file, field)


class Safetensors(Tensors):
    """The tensors of one or several safetensors files, read when asked for."""

    def __init__(self, files: list[pathlib.Path], field: str):
        import ml_dtypes  # noqa: F401  (makes bfloat16 a type that numpy knows)
        import safetensors

        self._where, self._field = {}, field
        for file in files:
            with _guarded(file, field, "a complete safetensors file"), safetensors.safe_open(file, "np") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        import safetensors

        file = self._where[name]
        # Opened for each tensor: a file that stays mapped keeps every page that was read in memory, a second copy.
        with _guarded(file, self._field, "a complete safetensors file"), safetensors.safe_open(file, "np") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _one_safetensors(file: pathlib.Path, field: str) -> Tensors:
    return Safetensors([file], field)


def _read_npz(file: pathlib.Path, field: str) -> Tensors:
    with _guarded(file, field, "a complete npz file of plain arrays"), np.load(file, allow_pickle=False) as npz:
        return {name: npz[name] for name in npz.files}


def _read_msgpack(file: pathlib.Path, field: str) -> Tensors:
    """A tree of Flax modules that mirror PyTorch's, as the hub's flax_model.msgpack is."""
    with _guarded(file, field, "a complete Flax msgpack file"):
        import flax.serialization
        from flax.traverse_util import flatten_dict

        tree = flax.serialization.msgpack_restore(file.read_bytes())
        return dict(_torch_tensor(path, np.asarray(leaf)) for path, leaf in flatten_dict(tree).items())


def _torch_tensor(path: tuple[str, ...], leaf: np.ndarray) -> tuple[str, np.ndarray]:
    """Flax's leaf names and layouts -> PyTorch's."""
    *modules, last = path[1:] if path[0] == "params" else path
    if last == "kernel":
        leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    torch_name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join([*modules, torch_name.get(last, last)]), leaf


def read_torch(file: pathlib.Path, field: str) -> dict[str, Any]:
    """A .pt or .pth file as (nested) dicts of numpy arrays, by torch's weights-only reader, which runs no code."""
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{file} ({field}) is a PyTorch file: reading it needs PyTorch; pip install 'vqrae-jax[torch]'"
        ) from None

    import ml_dtypes

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if value.dtype == torch.bfloat16:  # numpy has no such type of its own
                return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()
        return {str(k): to_numpy(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    with _guarded(file, field, "a PyTorch file of plain tensors (others could run code when read, and are refused)"):
        # Mapped into memory where the format allows: of a training checkpoint most is never looked at.
        mapped = zipfile.is_zipfile(file)
        try:
            loaded = to_numpy(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
        except pickle.UnpicklingError as error:  # of which torch would say how to run the code all the same
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            if not wanted:
                raise WeightsError(f"{file} ({field}) is damaged, or not a PyTorch file of plain tensors") from error
            raise WeightsError(
                f"{file} ({field}) holds more than plain tensors: it asks for {wanted[1]}, which is refused, as it "
                "could run code; if you trust the file, save its tensors alone by PyTorch"
            ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file} ({field}) holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def read_json(file: pathlib.Path, field: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        loaded = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing; {field} must be a folder (or hub id) that has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} ({field}) is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file} ({field}) holds a JSON {type(loaded).__name__}, expected an object")
    return loaded


@contextlib.contextmanager
def _guarded(file: pathlib.Path, field: str, kind: str) -> Iterator[None]:
    """Damaged files make their readers fail in every way there is: bad headers, sizes, names, text, compression."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise WeightsError(f"{file} ({field}) is not {kind} ({type(error).__name__}: {reason})") from error
