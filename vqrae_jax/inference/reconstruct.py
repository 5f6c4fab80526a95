"""python -m vqrae_jax.inference.reconstruct --checkpoint=runs/quickstart --image=cat.png --output=out.png"""

import argparse
import logging
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from vqrae_jax.checkpoint import CheckpointError
from vqrae_jax.config import ConfigError
from vqrae_jax.data import images
from vqrae_jax.data.errors import DataError, ImageError
from vqrae_jax.evaluation.psnr import psnr
from vqrae_jax.inference import pictures
from vqrae_jax.inference.tokenizer import Tokenizer, TokenizerError
from vqrae_jax.pretrained.errors import PretrainedError

log = logging.getLogger(__name__)

BATCH = 16


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.inference.reconstruct",
        description="Encodes pictures to codes, paints them again, and shows input | reconstruction | code map.",
    )
    parser.add_argument("--checkpoint", required=True, help="workdir of a run, or one step of its checkpoints folder")
    parser.add_argument("--image", required=True, nargs="+", help="pictures and folders of pictures")
    parser.add_argument(
        "--output", required=True, help="picture to write (.png, .jpg, .webp), or a folder for one each"
    )
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument(
        "--only", action="store_true", help="write the reconstructions alone, without input and code map"
    )
    return parser.parse_args(argv)


def reconstruct(args: argparse.Namespace) -> list[pathlib.Path]:
    """Runs the command; returns the files written."""
    output = pathlib.Path(args.output)
    each = not output.suffix
    if not each and output.suffix.lower() not in images.WRITTEN:
        raise DataError(f"--output={output}: pictures are written as {', '.join(sorted(images.WRITTEN))}")
    files = [f for name in args.image for f in _files(name)]
    tokenizer = Tokenizer.load(args.checkpoint, args.step)
    names, originals, skipped = _read(files, tokenizer.image_size)
    if not originals:
        raise DataError(f"--image: none of {len(files)} files is a readable picture; the first is {skipped[0]}")
    originals = np.stack(originals)
    painted, codes = _paint(tokenizer, originals)
    figures = psnr(painted, originals / np.float32(255))
    painted = pictures.to_uint8(painted)
    for name, decibels in zip(names, figures, strict=True):
        print(f"{name}: PSNR {decibels:.2f} dB, {codes[0].size} codes of {tokenizer.codebook_size}")
    if skipped:
        print(f"skipped {len(skipped)} unreadable files: {', '.join(skipped[:5])}", file=sys.stderr)

    groups = [slice(i, i + 1) for i in range(len(names))] if each else [slice(None)]
    written = []
    for group in groups:
        if args.only:
            picture = np.concatenate(painted[group], axis=1)
        else:
            columns = 1 if len(names[group]) == 1 else 2
            picture = pictures.reconstruction_grid(
                originals[group], painted[group], codes[group], tokenizer.grid, columns
            )
        path = output / f"{len(written):05d}_{pathlib.Path(names[group][0]).stem}.png" if each else output
        images.write_image(path, picture)
        written.append(path)
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""))
    return written


def _files(name: str) -> list[str]:
    return images.image_files(name, field="--image") if pathlib.Path(name).is_dir() else [name]


def _read(files: list[str], size: int) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Readable files, their central squares at `size` pixels, and the files that are no pictures."""
    names, originals, skipped = [], [], []
    for file in files:
        try:
            originals.append(images.center_crop(images.read_image(file), size))
            names.append(file)
        except ImageError as error:
            log.warning("%s", error)
            skipped.append(str(error))
    return names, originals, skipped


def _paint(tokenizer: Tokenizer, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructions and codes, in batches of one size so that nothing compiles twice."""
    size = min(BATCH, len(originals))
    padded = np.concatenate([originals, np.repeat(originals[-1:], -len(originals) % size, axis=0)])
    codes = np.concatenate([tokenizer.encode_to_indices(padded[i : i + size]) for i in range(0, len(padded), size)])
    painted = np.concatenate([tokenizer.decode_from_indices(codes[i : i + size]) for i in range(0, len(padded), size)])
    return painted[: len(originals)], codes[: len(originals)]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        reconstruct(parse())
    except (CheckpointError, ConfigError, DataError, PretrainedError, TokenizerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
