"""python -m vqrae_jax.inference.detokenize --checkpoint=runs/quickstart --codes=/data/codes --output=/data/pictures

Codes -> pictures, named by the number of each image in the tokenized dataset.
"""

import argparse
import concurrent.futures
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import codes as code_files
from vqrae_jax.data import images
from vqrae_jax.data.errors import DataError
from vqrae_jax.inference import command, pictures
from vqrae_jax.inference.tokenizer import Tokenizer, TokenizerError

BATCH = 32
WRITERS = 4  # threads that compress pictures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.inference.detokenize",
        description="Paints codes: those of a tokenized dataset, or an array of codes that a generator made.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--codes", required=True, help="folder of inference.tokenize, or .npy with codes [N, ...]")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--format", default="png", choices=["png", "jpg", "webp"], help="default: png")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--force", action="store_true", help="paint the codes of another tokenizer")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"pictures computed at once; default: {BATCH}")
    return parser.parse_args(argv)


def detokenize(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the pictures written.

    Raises:
      TokenizerError: codes of another tokenizer, of another grid, or out of range.
    """
    path, output = storage.at(args.codes), storage.at(args.output)
    dataset = None if path.suffix == ".npy" else code_files.Codes(path, cached=1)
    tokenizer = Tokenizer.load(args.checkpoint, args.step, batch_size=max(args.batch, 1))
    if dataset is None:
        array = _read_array(storage.fetch(path))
        total, shards = len(array), iter([(np.arange(len(array)), array)])
    else:
        _check(dataset, tokenizer, args.force)
        total, shards = len(dataset), ((part.index, part.codes) for part in dataset.shards())
    total = min(total, args.limit or total)
    views = dataset is not None and dataset.plan.views != "one"
    written: list[storage.Path] = []
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as disk:
        for numbers, grids in command.progress(_batches(shards, total, args.batch), total, "images", _count):
            flat = grids.reshape(-1, *grids.shape[2:]) if views else grids
            painted = pictures.to_uint8(tokenizer.decode_from_indices(flat)).reshape(
                len(grids), -1, tokenizer.image_size, tokenizer.image_size, 3
            )
            names = [
                output / f"{number:08d}{f'_{view}' if views else ''}.{args.format}"
                for number in numbers.tolist()
                for view in range(painted.shape[1])
            ]
            list(disk.map(images.write_image, names, painted.reshape(-1, *painted.shape[2:])))
            written += names
    print(f"wrote {len(written)} pictures to {output}")
    return written


def _check(dataset: code_files.Codes, tokenizer: Tokenizer, force: bool) -> None:
    if dataset.plan.tokenizer != tokenizer.hash and not force:
        raise TokenizerError(
            f"--codes={dataset.path} are of the tokenizer {dataset.plan.tokenizer[:12]}, this one is "
            f"{tokenizer.hash[:12]}: its codes mean something else; give that one, or --force"
        )


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.atleast_1d(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"--codes={path} cannot be read as an array: {error}") from None


def _batches(
    shards: Iterator[tuple[np.ndarray, np.ndarray]], total: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and codes of `total` images, `size` at a time; a batch ends with its shard."""
    for index, grids in shards:
        for start in range(0, min(len(index), total), size):
            stop = min(start + size, total)
            yield index[start:stop], grids[start:stop]
        total -= len(index)
        if total <= 0:
            return


def _count(batch: tuple[np.ndarray, np.ndarray]) -> int:
    return len(batch[0])


def main() -> None:
    command.run(lambda: detokenize(parse()))


if __name__ == "__main__":
    main()
