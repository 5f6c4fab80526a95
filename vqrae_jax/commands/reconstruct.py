"""Encodes and decodes images, and shows input | reconstruction | code map.

vqrae reconstruct --checkpoint=runs/quickstart --image=cat.png --output=out.png
"""

import argparse
import glob
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, get_args

import jax
import numpy as np

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.data import images
from vqrae_jax.data.folder import list_images
from vqrae_jax.errors import ConfigError, DataError, ImageError
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.metrics import compare_pixels
from vqrae_jax.inference import inputs
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.progress import progress

log = logging.getLogger(__name__)

SHOW = "input,reconstruction,codes"

parser = command_line.Parser("reconstruct", __doc__.partition("\n\n")[0])
parser.add_checkpoint()
parser.add("--image", "images, folders, or patterns as 'a/*.png'", required=True, nargs="+")
parser.add(
    "--output", "one image for all (.png, .jpg, .webp), or a folder of any other name for one image each", required=True
)
parser.add("--show", f"which of {','.join(visualize.KINDS)}; {SHOW} by default")
parser.add("--only", "write the bare reconstructions instead of --show", action="store_true")
parser.add("--format", "of images in a folder", default="png", choices=["png", "jpg", "webp"])
FITS = (
    "crop: the central square; pad: the whole image on a plain ground; stretch: other proportions; model: as PyTorch; "
    "keep: not squares, grids of the same proportions"
)
parser.add("--fit", f"how images become square; {FITS}", default="crop", choices=get_args(inputs.Fit))
parser.add("--metrics", "JSON file for the metrics of each image")
parser.add_count("--batch", "images per batch", 32, command_line.MAX_BATCH)
parser.add_max_pixels()


def reconstruct(args: argparse.Namespace) -> list[storage.Path]:
    """Runs the command; returns the images written."""
    to_folder = not args.output.lower().endswith(images.SUFFIXES) or os.path.isdir(args.output)
    if to_folder:
        output = command_line.output_folder(args.output)
    else:
        output = command_line.output_file(args.output, images.SAVE_OPTIONS)
    metrics_file = command_line.output_file(args.metrics, field="--metrics") if args.metrics else None
    if args.only and args.show is not None:
        raise ConfigError("--only replaces it; leave one of them out", field="--show", value=args.show)
    show = (args.show or SHOW).split(",")
    if not set(show) <= set(visualize.KINDS):
        raise ConfigError(f"expected some of {','.join(visualize.KINDS)}", field="--show", value=args.show)
    files = [file for name in args.image for file in _find_files(name)]
    tokenizer = Tokenizer.load(
        args.checkpoint, args.step, encoder=args.encoder, batch_size=max(1, min(args.batch, len(files))), fit=args.fit
    )

    def render(rows: list[list[Any]]) -> np.ndarray:
        columns = zip(*rows, strict=True)
        originals, reconstructions, indices = (None if column[0] is None else np.stack(column) for column in columns)
        if args.only:
            return np.concatenate(reconstructions, axis=1)
        per_row = 1 if len(rows) == 1 else 2
        return visualize.reconstruction_grid(originals, reconstructions, indices, tokenizer.grid, per_row, show)

    skipped, written, rows, metrics = [], [], [], {}
    batches = _read_batches(files, tokenizer, skipped, args.max_pixels)
    for names, originals, encoded in progress(batches, len(files), "images", lambda batch: len(batch[0])):
        if rows and originals.shape[1:] != rows[0][0].shape:
            problem = "images of several shapes do not fit into one image; pass the name of a folder"
            raise DataError(problem, field="--output", value=args.output)
        (latents,) = tokenizer.stream("encode_to_indices" if tokenizer.has_codes else "encode", [encoded])
        indices = latents if tokenizer.has_codes else [None] * len(names)
        decoded = tokenizer.decode_from_indices(latents) if tokenizer.has_codes else tokenizer.decode(latents)
        values = jax.device_get(compare_pixels(decoded, originals / np.float32(255)))
        for i, (name, *row) in enumerate(zip(names, originals, visualize.to_uint8(decoded), indices, strict=True)):
            metrics[name] = {metric: float(value[i]) for metric, value in values.items()}
            text = f"{name}: {_format(metrics[name])}"
            if tokenizer.has_codes:
                text += (
                    f", {indices[i].size} codes, {len(np.unique(indices[i]))} different of {tokenizer.codebook_size}"
                )
            print(text)
            if to_folder:
                written.append(output / f"{len(written):05d}_{pathlib.Path(name).stem}.{args.format}")
                images.write_image(written[-1], render([row]))
            else:
                rows.append(row)
    if not metrics:
        raise DataError(f"none of {len(files)} files is readable; the first: {skipped[0]}", field="--image")
    if rows:
        images.write_image(output, render(rows))
        written.append(output)
    _report(metrics_file, metrics, skipped, written)
    return written


def _find_files(name: str) -> list[str]:
    """Returns the files of a folder or pattern; a file itself."""
    if pathlib.Path(name).is_dir():
        return list_images(name, field="--image")
    if pathlib.Path(name).exists() or not glob.has_magic(name):
        return [name]
    if files := sorted(glob.glob(name, recursive=True)):
        return files
    raise DataError("no file matches", field="--image", value=name)


def _read_batches(
    files: list[str], tokenizer: Tokenizer, skipped: list[str], max_pixels: int
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Yields names, images of the decoded size, and the same images as they are encoded; a batch has one shape.

    Adds the reason to `skipped` for each file that is not readable.
    """
    batch: list[tuple[Any, ...]] = []
    sizes = [True, False] if tokenizer.fit == "model" else [True]  # as decoded, and as encoded if it differs
    for file in files:
        try:
            image = [images.read_image(file, max_pixels=max_pixels)]
            row = (file, *(tokenizer.fit_images(image, decoded=decoded)[:] for decoded in sizes))
        except ImageError as error:
            skipped.append(str(error) if file in str(error) else f"{file}: {error}")
            log.warning("%s", skipped[-1])
            continue
        if batch and (len(batch) == tokenizer.batch_size or row[1].shape != batch[0][1].shape):
            yield _stack(batch)
            batch = []
        batch.append(row)
    if batch:
        yield _stack(batch)


def _stack(batch: list[tuple[Any, ...]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    names, *arrays = zip(*batch, strict=True)
    originals, *encoded = map(np.concatenate, arrays)
    return list(names), originals, *(encoded or [originals])


def _format(metrics: dict[str, float]) -> str:
    return f"PSNR {metrics['psnr']:.2f} dB" + (f", SSIM {metrics['ssim']:.3f}" if "ssim" in metrics else "")


def _report(
    file: storage.Path | None, metrics: dict[str, Any], skipped: list[str], written: list[storage.Path]
) -> None:
    names = next(iter(metrics.values()))
    mean = {name: float(np.mean([values[name] for values in metrics.values()])) for name in names}
    if file:
        text = json.dumps({"mean": mean, "images": metrics, "skipped": skipped}, indent=1, ensure_ascii=False) + "\n"
        storage.write_bytes(file, text.encode(errors="backslashreplace"))  # file names need not be UTF-8
    if len(metrics) > 1:
        print(f"mean of {len(metrics)} images: {_format(mean)}")
    if skipped:
        print(f"skipped {len(skipped)} unreadable files: {', '.join(skipped[:5])}", file=sys.stderr)
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""))


main = command_line.build_main(parser, reconstruct)

if __name__ == "__main__":
    main()
