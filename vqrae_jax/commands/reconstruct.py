"""python -m vqrae_jax.commands.reconstruct --checkpoint=runs/quickstart --image=cat.png --output=out.png"""

import argparse
import glob
import json
import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.data import folder, images
from vqrae_jax.errors import ConfigError, DataError, ImageError
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.evaluation.psnr import psnr
from vqrae_jax.evaluation.ssim import WINDOW, ssim
from vqrae_jax.inference import inputs
from vqrae_jax.inference.tokenizer import Tokenizer

log = logging.getLogger(__name__)

BATCH = 32
SHOWN = ("input", "reconstruction", "difference", "codes")
USUAL = "input,reconstruction,codes"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.reconstruct",
        description="Encodes pictures to codes, paints them again, and shows input | reconstruction | code map.",
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    parser.add_argument(
        "--image", required=True, nargs="+", help="pictures, folders of pictures, patterns as 'a/*.png'"
    )
    parser.add_argument(
        "--output", required=True, help="picture to write (.png, .jpg, .webp), or a folder for one each"
    )
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--show", help=f"of {','.join(SHOWN)}; default: {USUAL}")
    parser.add_argument(
        "--only", action="store_true", help="the reconstructions alone, pixel by pixel, in place of what --show draws"
    )
    parser.add_argument("--format", default="png", choices=["png", "jpg", "webp"], help="in a folder; default: png")
    parser.add_argument(
        "--fit", default="crop", choices=["crop", "pad", "stretch"], help="how a picture becomes square; default: crop"
    )
    parser.add_argument("--metrics", help="JSON file for the figures of each picture")
    parser.add_argument(
        "--batch", type=command.at_least_1, default=BATCH, help=f"pictures computed at once; default: {BATCH}"
    )
    return parser.parse_args(argv)


def reconstruct(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the pictures written."""
    output = storage.resolve_path(args.output)
    each = not output.suffix
    if not each and output.suffix.lower() not in images.SAVE_OPTIONS:
        raise DataError(f"--output={output}: pictures are written as {', '.join(sorted(images.SAVE_OPTIONS))}")
    if args.only and args.show is not None:
        raise ConfigError(
            f"--only and --show={args.show}: --only writes the reconstructions alone; leave one of them out"
        )
    shown = tuple((args.show or USUAL).split(","))
    if unknown := set(shown) - set(SHOWN):
        raise ConfigError(f"--show={args.show}: {', '.join(sorted(unknown))} is none of {', '.join(SHOWN)}")
    files = [file for name in args.image for file in _files(name)]
    tokenizer = Tokenizer.load(args.checkpoint, args.step, batch_size=max(1, min(args.batch, len(files))), fit=args.fit)
    skipped: list[str] = []
    written, kept, figures = [], [], {}
    for names, originals in command.progress(_read(files, tokenizer, skipped), len(files), "pictures", _count):
        painted, codes = _paint(tokenizer, originals)
        measured = _measure(painted, originals / np.float32(255))
        painted = pictures.to_uint8(painted)
        for i, name in enumerate(names):
            figures[name] = {kind: float(values[i]) for kind, values in measured.items()}
            coded = "" if codes is None else f", {_counted(codes[i], tokenizer.codebook_size)}"
            print(f"{name}: {_told(figures[name])}{coded}")
        if not each:
            kept.append((originals, painted, codes))
            continue
        for i, name in enumerate(names):
            one = slice(i, i + 1)
            picture = _draw(args, shown, tokenizer, originals[one], painted[one], None if codes is None else codes[one])
            path = output / f"{len(written):05d}_{pathlib.Path(name).stem}.{args.format}"
            images.write_image(path, picture)
            written.append(path)
    if not figures:
        raise DataError(f"--image: none of {len(files)} files is a readable picture; of the first: {skipped[0]}")
    if kept:
        originals, painted, codes = (None if x[0] is None else np.concatenate(x) for x in zip(*kept, strict=True))
        images.write_image(output, _draw(args, shown, tokenizer, originals, painted, codes))
        written.append(output)
    _report(args, figures, skipped, written)
    return written


def _files(name: str) -> list[str]:
    if pathlib.Path(name).is_dir():
        return folder.list_images(name, field="--image")
    if pathlib.Path(name).exists() or not glob.has_magic(name):
        return [name]
    if not (found := sorted(glob.glob(name, recursive=True))):
        raise DataError(f"--image={name!r}: no file is called like this")
    return found


def _count(group: tuple[list[str], Any]) -> int:
    return len(group[0])


def _read(files: list[str], tokenizer: Tokenizer, skipped: list[str]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Readable files and their squares, in groups; the files that are no pictures end in `skipped`."""
    size, colour = tokenizer.image_size, tokenizer.module.encoder.mean
    group: list[tuple[str, np.ndarray]] = []
    for i, file in enumerate(files):
        try:
            group.append((file, inputs.fitted(images.read_image(file), size, tokenizer.fit, colour)))
        except ImageError as error:
            log.warning("%s", error)
            skipped.append(str(error))
        if group and (len(group) == tokenizer.batch_size or i + 1 == len(files)):
            names, originals = zip(*group, strict=True)
            yield list(names), np.stack(originals)
            group = []


def _paint(tokenizer: Tokenizer, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Reconstructions, and codes where there are some."""
    if not tokenizer.has_codes:
        return tokenizer.reconstruct(originals), None
    codes = tokenizer.encode_to_indices(originals)
    return tokenizer.decode_from_indices(codes), codes


def _measure(painted: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of each picture; both in [0, 1]."""
    measured = {"psnr": np.asarray(psnr(painted, originals))}
    if originals.shape[1] >= WINDOW:
        measured["ssim"] = np.asarray(ssim(painted, originals))
    return measured


def _told(figures: dict[str, float]) -> str:
    similar = f", SSIM {figures['ssim']:.3f}" if "ssim" in figures else ""
    return f"PSNR {figures['psnr']:.2f} dB{similar}"


def _counted(codes: np.ndarray, codebook_size: int) -> str:
    return f"{codes.size} tokens, {len(np.unique(codes))} distinct of {codebook_size} codes"


def _draw(
    args: argparse.Namespace,
    shown: Sequence[str],
    tokenizer: Tokenizer,
    originals: np.ndarray,
    painted: np.ndarray,
    codes: np.ndarray | None,
) -> np.ndarray:
    if args.only:
        return np.concatenate(painted, axis=1)
    columns = 1 if len(originals) == 1 else 2
    return pictures.reconstruction_grid(originals, painted, codes, tokenizer.grid, columns, shown)


def _report(
    args: argparse.Namespace, figures: dict[str, dict[str, float]], skipped: list[str], written: list[storage.Path]
) -> None:
    mean = {name: float(np.mean([f[name] for f in figures.values()])) for name in next(iter(figures.values()))}
    if args.metrics:
        report = {"mean": mean, "pictures": figures, "skipped": skipped}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        storage.write_bytes(
            args.metrics, text.encode(errors="backslashreplace")
        )  # names that are no UTF-8: JSON's escapes
    if len(figures) > 1:
        print(f"mean of {len(figures)} pictures: {_told(mean)}")
    if skipped:
        print(f"skipped {len(skipped)} unreadable files: {', '.join(skipped[:5])}", file=sys.stderr)
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""))


def main() -> None:
    command.run(lambda: reconstruct(parse()))


if __name__ == "__main__":
    main()
