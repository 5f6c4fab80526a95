"""python -m vqrae_jax.commands.detokenize --checkpoint=runs/quickstart --codes=/data/codes --output=/data/pictures

Codes -> pictures, named by the number of each image in the tokenized dataset, or by its id.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.data import codes as code_files
from vqrae_jax.data import images
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.inference.tokenizer import Tokenizer

BATCH = 32
WRITERS = 4  # threads that compress pictures
LONGEST = 200  # bytes of an id in a file name; most systems take 255 in all


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.detokenize",
        description="Paints codes: those of a tokenized dataset, or an array of codes that a generator made.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--codes", required=True, help="folder of inference.tokenize, or .npy with codes [N, ...]")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--format", default="png", choices=["png", "jpg", "webp"], help="default: png")
    parser.add_argument(
        "--names", default="index", choices=["index", "id"],
        help="of the pictures: the image's number in its source, or its id made a file name; default: index",
    )  # fmt: skip
    parser.add_argument("--limit", type=command.at_least_1, help="the first so many images only")
    parser.add_argument("--force", action="store_true", help="paint the codes of another tokenizer")
    parser.add_argument(
        "--batch", type=command.at_least_1, default=BATCH, help=f"pictures computed at once; default: {BATCH}"
    )
    return parser.parse_args(argv)


def detokenize(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the pictures written.

    Raises:
      DataError: codes of another tokenizer, of another grid, or out of range.
    """
    path, output = storage.resolve_path(args.codes), storage.resolve_path(args.output)
    dataset = None if path.suffix == ".npy" else code_files.Codes(path, cached=1)
    if dataset is None and args.names == "id":
        raise DataError(f"--names=id: --codes={path} is an array, whose rows have no ids; leave out --names")
    tokenizer = Tokenizer.load(args.checkpoint, args.step, batch_size=args.batch)
    if dataset is None:
        array = _read_array(storage.download(path))
        total, shards = len(array), iter([(_numbered(range(len(array))), array)])
    else:
        _check(dataset, tokenizer, args.force)
        named, total = _Named() if args.names == "id" else None, len(dataset)
        shards = (
            (_numbered(part.index.tolist()) if named is None else [named(name) for name in part.id], part.codes)
            for part in dataset.shards()
        )
    total = min(total, args.limit or total)
    views = dataset is not None and dataset.plan.views != "one"
    written: list[storage.Path] = []
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as disk:
        for stems, grids in command.progress(_batches(shards, total, args.batch), total, "images", _count):
            flat = grids.reshape(-1, *grids.shape[2:]) if views else grids
            painted = pictures.to_uint8(tokenizer.decode_from_indices(flat)).reshape(
                len(grids), -1, tokenizer.image_size, tokenizer.image_size, 3
            )
            names = [
                output / f"{stem}{f'_{view}' if views else ''}.{args.format}"
                for stem in stems
                for view in range(painted.shape[1])
            ]
            list(disk.map(images.write_image, names, painted.reshape(-1, *painted.shape[2:])))
            written += names
    print(f"wrote {len(written)} pictures to {output}")
    return written


def _check(dataset: code_files.Codes, tokenizer: Tokenizer, force: bool) -> None:
    if dataset.plan.tokenizer != tokenizer.hash and not force:
        raise DataError(
            f"--codes={dataset.path} are of the tokenizer {dataset.plan.tokenizer[:12]}, this one is "
            f"{tokenizer.hash[:12]}: its codes mean something else; give that one, or --force"
        )


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.atleast_1d(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"--codes={path} cannot be read as an array: {error}") from None


def _batches(
    shards: Iterator[tuple[list[str], np.ndarray]], total: int, size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and codes of `total` images, `size` at a time; a batch ends with its shard."""
    for names, grids in shards:
        for start in range(0, min(len(names), total), size):
            stop = min(start + size, total)
            yield names[start:stop], grids[start:stop]
        total -= len(names)
        if total <= 0:
            return


def _numbered(numbers: Iterable[int]) -> list[str]:
    return [f"{number:08d}" for number in numbers]


class _Named:
    """Ids as file names without a suffix: of letters, digits, dots, - and _ only, and each once, whatever its case."""

    def __init__(self):
        self._given: set[str] = set()

    def __call__(self, name: str) -> str:
        stem, suffix = os.path.splitext(name)
        safe = re.sub(r"[^\w.-]+", "_", stem if suffix.lower() in images.SUFFIXES else name).lstrip(".")
        safe = unique = safe.encode(errors="replace")[:LONGEST].decode(errors="ignore") or "_"
        number = 1
        while unique.lower() in self._given:  # a.png and a.jpg, or "a b" and "a_b"
            number += 1
            unique = f"{safe}_{number}"
        self._given.add(unique.lower())
        return unique


def _count(batch: tuple[list[str], np.ndarray]) -> int:
    return len(batch[0])


def main() -> None:
    command.run(lambda: detokenize(parse()))


if __name__ == "__main__":
    main()
