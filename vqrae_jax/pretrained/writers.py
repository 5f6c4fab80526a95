"""Our trees -> files of others: the tables of `families`, `tables` and `origin` read backwards."""

import hashlib
import logging
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from vqrae_jax import storage
from vqrae_jax.errors import WeightsError, first_line
from vqrae_jax.pretrained import pytorch_vqrae
from vqrae_jax.pretrained.layout import to_file
from vqrae_jax.pretrained.tables import Row, Table, paths, spell

log = logging.getLogger(__name__)

Transformers = Literal[4, 5]


def to_state_dict(tree: Mapping[str, Any], table: Table, transformers: Transformers = 4) -> dict[str, np.ndarray]:
    """The inverse of `convert.convert`: converting the result back gives `tree`, bit for bit.

    Args:
      tree: parameters or variables, decoder blocks one by one.
      table: rows of names and paths.
      transformers: whose in-memory names to write. The origin does not pin its version; hub files and most checkpoints
        in circulation have the names of 4.

    Raises:
      WeightsError: the table has no name for some of the tree.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
    depth = {prefix: 1 + max(blocks) for prefix, blocks in _blocks(flat).items()}
    active = {str(transformers), "gated" if any("/mlp/gate/" in path for path in flat) else "plain"}
    written, state = set(), {}
    for row in table:
        if not active.issuperset(row.only.split()):
            continue
        for block in range(depth.get(_stem(row), 0) if "#" in row.name else 1):
            wanted = paths(row, block)
            name = spell(row, block, transformers)
            if wanted and all(path in flat for path in wanted):
                parts = [to_file(path, flat[path]) for path in wanted]
                tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
                state[name] = tensor[0] if row.path.endswith("[0]") else tensor
                written.update(wanted)
            elif row.filler:
                state[name] = _fill(row, flat)
    if lost := sorted(set(flat) - written):
        raise WeightsError(f"these parameters have no name in a PyTorch checkpoint of this kind: {', '.join(lost)}")
    return state


def pytorch_state_dict(
    variables: Mapping[str, Any],
    encoder_cls: str,
    quantizer: str,
    transformers: Transformers = 4,
    fsq_levels: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """{"params", "batch_stats"} of a whole model -> the state dict of the origin's RAE or VQRAE.

    What the origin holds and never uses (mask tokens, SigLIP's pooling head) is written as zeros; a DINOv3 norm whose
    scale and bias were dropped as the identity. Latent statistics are no part of it, see `pytorch_statistics`.
    """
    flat = flatten_dict({name: variables[name] for name in ("params", "batch_stats")}, sep="/")
    ours = [path for path in flat if path in pytorch_vqrae.STATE or path.startswith("batch_stats/latent/")]
    kept = {path: leaf for path, leaf in flat.items() if path not in ours}
    state = to_state_dict(kept, pytorch_vqrae.name_table(encoder_cls, quantizer), transformers)
    registers = pytorch_vqrae.REGISTERS
    if encoder_cls == "Dinov2withNorm" and registers not in state:
        log.warning("%s", pytorch_vqrae.NO_REGISTERS)
        state[registers] = np.zeros(
            (1, 4, state[registers.replace("register_tokens", "cls_token")].shape[-1]), np.float32
        )
    return state | (pytorch_vqrae.fsq_constants(fsq_levels) if quantizer == "fsq" else {})


def pytorch_statistics(variables: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """The latent statistics as the origin's stat.pt has them, channel first; empty where the model has none."""
    stats = variables["batch_stats"].get("latent", {})
    first = {name: np.ascontiguousarray(np.moveaxis(np.asarray(value), -1, 0)) for name, value in stats.items()}
    return {"mean": None, "var": None} | first if first else {}


def write_torch(tree: Any, path: pathlib.Path) -> None:
    """Nested dicts of arrays and plain values -> a .pt file that torch's weights-only reader takes."""
    try:
        import torch
    except ImportError:
        raise WeightsError(f"writing {path} needs PyTorch: pip install 'vqrae-jax[torch]'") from None
    tensors: dict[int, Any] = {}  # an array that occurs twice is written once

    def to_torch(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return tensors.setdefault(id(value), torch.from_numpy(value.copy()))
        return {key: to_torch(v) for key, v in value.items()} if isinstance(value, dict) else value

    torch.save(to_torch(tree), path)


def write_safetensors(tree: Mapping[str, Any], path: pathlib.Path) -> None:
    """A tree of arrays, as tensors named by their paths."""
    import safetensors.numpy

    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten_dict(tree, sep="/").items()}
    safetensors.numpy.save_file(flat, path, metadata={"format": "vqrae_jax"})
    storage.apply_umask(path)


def content_hash(tree: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes and values of a tree: the same whatever file or layout it was read from."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(tree, sep="/").items()):
        array = np.asarray(leaf, order="C")
        digest.update(f"{name} {array.shape} {array.dtype.name};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def push_to_hub(write: Callable[[pathlib.Path], Any], repo_id: str, private: bool, token: str | None) -> str:
    """Uploads the folder that `write` fills to a model repository of the hub; returns its address.

    Raises:
      WeightsError: no network, no right to write, or no login.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory(prefix="vqrae-jax-") as folder:
        write(pathlib.Path(folder))
        try:
            hub = huggingface_hub.HfApi(token=token)
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A vqrae_jax tokenizer")
        except Exception as error:  # the hub client has many: no network, not logged in, no such owner
            raise WeightsError(
                f"push_to_hub({repo_id!r}) did not work ({type(error).__name__}: {first_line(error)}); log in with "
                f"`hf auth login`, or save_pretrained to a folder and upload that"
            ) from error
    return str(address)


def _blocks(flat: Mapping[str, Any]) -> dict[str, list[int]]:
    """What stands in front of `blockNN` in each path -> the numbers."""
    found: dict[str, list[int]] = {}
    for path in flat:
        if match := re.match(r"(.*?)block(\d+)/", path):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def _stem(row: Row) -> str | None:
    return row.path and row.path.split("block#")[0]


def _fill(row: Row, flat: Mapping[str, np.ndarray]) -> np.ndarray:
    value, shape = row.filler
    up = next(leaf for path, leaf in flat.items() if path.endswith("vit/block00/mlp/up/kernel"))
    sizes = {"D": up.shape[0], "3D": 3 * up.shape[0], "M": up.shape[1]}
    if (codebook := flat.get("batch_stats/quantizer/codebook")) is not None:
        sizes["K"] = len(codebook)
    return np.full([sizes[n] if n in sizes else int(n) for n in shape.split()], value, np.float32)
