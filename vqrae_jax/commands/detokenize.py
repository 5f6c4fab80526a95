"""Decodes codes to image files, named by the number or the id of each image in the tokenized dataset.

vqrae detokenize --checkpoint=runs/quickstart --codes=/data/codes --output=/data/images
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.data import codes as code_files
from vqrae_jax.data import images
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.inference.tokenizer import Tokenizer

THREADS = 4  # that compress images
MAX_BYTES = 200  # of an id in a file name; most file systems allow 255 for the whole name


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_line.build_parser(
        "detokenize", "Decodes the codes of a tokenized dataset, or an array of codes from a generator, to image files."
    )
    command_line.add_checkpoint(parser)
    parser.add_argument("--codes", required=True, help="folder written by tokenize, or .npy file with codes [N, ...]")
    parser.add_argument("--output", required=True, help="folder for the images")
    parser.add_argument("--format", default="png", choices=["png", "jpg", "webp"], help="default: png")
    parser.add_argument(
        "--names", default="index", choices=["index", "id"],
        help="name of the images: their number in the dataset, or their id; default: index",
    )  # fmt: skip
    command_line.add_limit(parser)
    parser.add_argument("--force", action="store_true", help="accept codes of another tokenizer")
    command_line.add_batch(parser, 32)
    return parser.parse_args(argv)


def detokenize(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the images written.

    Raises:
      DataError: the codes are from another tokenizer, of another shape, or out of range.
    """
    path, output = storage.resolve_path(args.codes), storage.resolve_path(args.output)
    dataset = None if path.suffix == ".npy" else code_files.Codes(path, cached=1)
    if dataset is None and args.names == "id":
        raise DataError(f"the rows of the array {path} have no ids; leave --names out", field="--names", value="id")
    tokenizer = Tokenizer.load(args.checkpoint, args.step, batch_size=args.batch)
    if dataset is None:
        array = _read_array(storage.download(path))
        total, shards = len(array), iter([(_number_names(range(len(array))), array)])
    else:
        if dataset.plan.tokenizer != tokenizer.hash and not args.force:
            raise DataError(
                f"the codes are from the tokenizer {dataset.plan.tokenizer[:12]}, not from {tokenizer.hash[:12]}, for "
                "which they mean something else; pass the checkpoint of their tokenizer, or --force",
                field="--codes", value=str(path),
            )  # fmt: skip
        total, shards = len(dataset), _named_shards(dataset, args.names)
    total = min(total, args.limit or total)
    has_views = dataset is not None and dataset.plan.views != "one"
    written: list[storage.Path] = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as disk:
        batches = _batches(shards, total, args.batch)
        for names, indices in command_line.progress(batches, total, "images", lambda batch: len(batch[0])):
            views = indices.shape[1] if has_views else 1
            flat = indices.reshape(-1, *indices.shape[2:]) if has_views else indices
            decoded = visualize.to_uint8(tokenizer.decode_from_indices(flat))
            suffixes = [f"_{view}.{args.format}" if has_views else f".{args.format}" for view in range(views)]
            paths = [output / f"{name}{suffix}" for name in names for suffix in suffixes]
            list(disk.map(images.write_image, paths, decoded))
            written += paths
    print(f"wrote {len(written)} images to {output}")
    return written


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.atleast_1d(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as an array: {error}", field="--codes", value=str(path)) from None


def _named_shards(dataset: code_files.Codes, names: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields file names and codes of each shard."""
    unique = UniqueNames()
    for shard in dataset.shards():
        yield [unique(name) for name in shard.id] if names == "id" else _number_names(shard.index), shard.codes


def _number_names(numbers: Sequence[int]) -> list[str]:
    return [f"{number:08d}" for number in numbers]


def _batches(
    shards: Iterator[tuple[list[str], np.ndarray]], total: int, size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields names and codes of the first `total` images, at most `size` at a time and of one shard."""
    for names, indices in shards:
        for start in range(0, min(len(names), total), size):
            stop = min(start + size, total)
            yield names[start:stop], indices[start:stop]
        total -= len(names)
        if total <= 0:
            return


class UniqueNames:
    """Converts ids to file names of letters, digits, dots, - and _, all different even if case is ignored."""

    def __init__(self):
        self._used: set[str] = set()

    def __call__(self, name: str) -> str:
        stem, suffix = os.path.splitext(name)
        safe = re.sub(r"[^\w.-]+", "_", stem if suffix.lower() in images.SUFFIXES else name).lstrip(".")
        safe = unique = safe.encode(errors="replace")[:MAX_BYTES].decode(errors="ignore") or "_"
        number = 1
        while unique.lower() in self._used:  # a.png and a.jpg, or "a b" and "a_b"
            number += 1
            unique = f"{safe}_{number}"
        self._used.add(unique.lower())
        return unique


def main(argv: Sequence[str] | None = None) -> None:
    command_line.run(lambda: detokenize(parse(argv)))


if __name__ == "__main__":
    main()
