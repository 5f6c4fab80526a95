"""Writing of our trees for other programs: PyTorch state dicts and files, safetensors, the model hub."""

import hashlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from vqrae_jax import storage
from vqrae_jax.errors import WeightsError, first_line
from vqrae_jax.pretrained.layout import to_file, unstack_blocks
from vqrae_jax.pretrained.tables import Row, Table, row_name, row_paths

Transformers = Literal[4, 5]


def to_state_dict(tree: Mapping[str, Any], table: Table, transformers: Transformers = 4) -> dict[str, np.ndarray]:
    """Converts a tree to a state dict; `convert.convert` restores the tree, bit for bit.

    Args:
      tree: parameters or variables, with stacked blocks.
      table: rows of names and paths.
      transformers: version whose in-memory names to write. Hub files and most checkpoints have the names of 4.
    """
    flat = unstack_blocks({path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()})
    depths: dict[str, int] = {}  # number of blocks by the path in front of them
    for match in filter(None, (re.match(r"(.*?)block(\d+)/", path) for path in flat)):
        depths[match[1]] = max(depths.get(match[1], 0), 1 + int(match[2]))
    active = {str(transformers), "gated" if any("/mlp/gate/" in path for path in flat) else "plain"}
    written, state = set(), {}
    for row in table:
        if not active.issuperset(row.only.split()):
            continue
        stem = row.path and row.path.split("block#")[0]
        for block in range(depths.get(stem, 0) if "#" in row.name else 1):
            paths = row_paths(row, block)
            name = row_name(row, block, transformers)
            if paths and all(path in flat for path in paths):
                parts = [to_file(path, flat[path]) for path in paths]
                tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
                state[name] = tensor[0] if row.path.endswith("[0]") else tensor
                written.update(paths)
            elif row.filler:
                state[name] = _fill(row, flat)
    if lost := sorted(set(flat) - written):
        raise WeightsError(f"these parameters have no name in a PyTorch checkpoint of this kind: {', '.join(lost)}")
    return state


def write_torch(tree: Any, path: pathlib.Path) -> None:
    """Writes nested dicts of arrays and plain values to a .pt file that torch's weights-only reader accepts."""
    try:
        import torch
    except ImportError:
        raise WeightsError(f"writing {path} needs PyTorch: pip install 'vqrae-jax[torch]'") from None
    tensors: dict[int, Any] = {}  # by the array's id: an array that occurs twice is written once

    def to_torch(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return tensors.setdefault(id(value), torch.from_numpy(value.copy()))
        return {key: to_torch(v) for key, v in value.items()} if isinstance(value, dict) else value

    torch.save(to_torch(tree), path)


def write_safetensors(tree: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a tree of arrays as tensors named by their paths."""
    import safetensors.numpy

    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten_dict(tree, sep="/").items()}
    safetensors.numpy.save_file(flat, path, metadata={"format": "vqrae_jax"})
    storage.apply_umask(path)


def content_hash(tree: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the names, shapes and values of a tree, its stacked blocks one by one."""
    digest = hashlib.sha256()
    for name, leaf in sorted(unstack_blocks(flatten_dict(tree, sep="/")).items()):
        array = np.asarray(leaf, order="C")
        digest.update(f"{name} {array.shape} {array.dtype.name};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def push_to_hub(write: Callable[[pathlib.Path], Any], repo_id: str, private: bool, token: str | None) -> str:
    """Uploads a folder to a model repository of the hub and returns its address; `write` writes the folder's files."""
    import huggingface_hub

    with tempfile.TemporaryDirectory(prefix="vqrae-jax-") as folder:
        write(pathlib.Path(folder))
        try:
            hub = huggingface_hub.HfApi(token=token)
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A vqrae_jax tokenizer")
        except Exception as error:  # the hub client raises many kinds: no network, not logged in, no such owner
            raise WeightsError(
                f"cannot be uploaded to the hub ({type(error).__name__}: {first_line(error)}); log in with "
                "`hf auth login`, or call save_pretrained and upload the folder",
                field="repo_id", value=repo_id,
            ) from error  # fmt: skip
    return str(address)


def _fill(row: Row, flat: Mapping[str, np.ndarray]) -> np.ndarray:
    value, shape = row.filler
    up = next(leaf for path, leaf in flat.items() if path.endswith("vit/block00/mlp/up/kernel"))
    sizes = {"D": up.shape[0], "3D": 3 * up.shape[0], "M": up.shape[1]}
    if (codebook := flat.get("batch_stats/quantizer/codebook")) is not None:
        sizes["K"] = len(codebook)
    return np.full([sizes[n] if n in sizes else int(n) for n in shape.split()], value, np.float32)
