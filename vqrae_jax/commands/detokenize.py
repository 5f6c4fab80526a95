"""Decodes codes to image files, named by the number or the id of each image in the tokenized dataset.

vqrae detokenize --checkpoint=runs/quickstart --codes=/data/codes --output=/data/decoded
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.data import codes as code_files
from vqrae_jax.data import images
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.progress import progress

THREADS = 4  # that compress images
MAX_BYTES = 200  # of an id in a file name; most file systems allow 255 for the whole name

parser = command_line.Parser("detokenize", "Decodes the codes of a dataset, or an array of codes, to image files.")
parser.add_checkpoint()
parser.add("--codes", "folder written by tokenize, or .npy file with codes [N, ...]", required=True)
parser.add("--output", "folder for the images", required=True)
parser.add("--format", default="png", choices=["png", "jpg", "webp"])
parser.add("--names", "names of the files: number in the dataset, or id", default="index", choices=["index", "id"])
parser.add("--force", "accept codes of another tokenizer", action="store_true")
parser.add_batch_and_limit(32)


def detokenize(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the images written."""
    path, output = storage.resolve_path(args.codes), command_line.output_folder(args.output)
    dataset = None if path.suffix == ".npy" and not path.is_dir() else code_files.Codes(path, cached=1)
    if dataset is None and args.names == "id":
        raise DataError(f"the rows of the array {path} have no ids; leave --names out", field="--names", value="id")
    dtype = "bfloat16" if dataset is not None and dataset.plan.encoding.startswith("bfloat16") else "float32"
    tokenizer = Tokenizer.load(
        args.checkpoint, args.step, encoder=args.encoder, batch_size=args.batch, encoder_dtype=dtype
    )
    if dataset is None:
        array = _read_array(storage.download(path))
        total, shards = len(array), [([f"{i:08d}" for i in range(len(array))], array)]
    elif dataset.plan.tokenizer == tokenizer.hash or args.force:
        total, shards = len(dataset), _named_shards(dataset, args.names)
    else:
        raise DataError(
            f"the codes are from the tokenizer {dataset.plan.tokenizer[:12]}, not from {tokenizer.hash[:12]}, for "
            "which they mean something else; pass the checkpoint of their tokenizer, or --force",
            field="--codes", value=str(path),
        )  # fmt: skip
    total = min(total, args.limit or total)
    written: list[storage.Path] = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as disk:
        batches = _batches(shards, total, args.batch)
        for names, indices in progress(batches, total, "images", lambda batch: len(batch[0])):
            if dataset is not None and dataset.plan.views != "one":
                names = [f"{name}_{view}" for name in names for view in range(indices.shape[1])]
                indices = indices.reshape(-1, *indices.shape[2:])
            decoded = visualize.to_uint8(tokenizer.decode_from_indices(indices))
            paths = [output / f"{name}.{args.format}" for name in names]
            list(disk.map(images.write_image, paths, decoded))
            written += paths
    print(f"wrote {len(written)} images to {output}")
    return written


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        storage.check_regular(path)
        return np.atleast_1d(np.load(path, allow_pickle=False))
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"cannot be read as an array: {error}", field="--codes", value=str(path)) from None


def _named_shards(dataset: code_files.Codes, names: str) -> Iterator[tuple[list[str], np.ndarray]]:
    used: set[str] = set()
    for shard in dataset.shards():
        ids = [unique_name(i, used) for i in shard.id] if names == "id" else [f"{i:08d}" for i in shard.index]
        yield ids, shard.codes


def _batches(shards: Iterable[tuple[list[str], np.ndarray]], total: int, size: int) -> Iterator[tuple[list[str], Any]]:
    """Yields names and codes of the first `total` images, at most `size` at a time and of one shard."""
    for names, indices in shards:
        for start in range(0, min(len(names), total), size):
            stop = min(start + size, total)
            yield names[start:stop], indices[start:stop]
        total -= len(names)
        if total <= 0:
            return


def unique_name(id: str, used: set[str]) -> str:
    """Converts an id to a file name of letters, digits, dots, - and _ that is not in `used`, ignoring case; adds it."""
    stem, suffix = os.path.splitext(id)
    safe = re.sub(r"[^\w.-]+", "_", stem if suffix.lower() in images.SUFFIXES else id).lstrip(".")
    safe = name = safe.encode(errors="replace")[:MAX_BYTES].decode(errors="ignore") or "_"
    number = 1
    while name.lower() in used:  # a.png and a.jpg, or "a b" and "a_b"
        number += 1
        name = f"{safe}_{number}"
    used.add(name.lower())
    return name


main = command_line.build_main(parser, detokenize)

if __name__ == "__main__":
    main()
