"""python -m vqrae_jax.commands.codebook --checkpoint=runs/quickstart --source=photographs --output=report

How a tokenizer uses its codes on images: numbers on the screen and in report.json, and four pictures.
use.png: how often each code occurs, sorted. map.png: the codes in their first two principal axes, darker where used
more, pale where never. patches.png: one row per code, most used first, with the image patches nearest to it.
positions.png: entropy of the codes at each position of the grid, white for the highest.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.commands import data_arguments as data_flags
from vqrae_jax.data import images, pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import codebook_health as codebook
from vqrae_jax.evaluation.visualize import enlarged, histogram
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.quantizers.nearest import nearest_other

BATCH = 16
SIDE = 512  # pixels of charts
CODES, PATCHES = 16, 12  # rows and columns of patches.png
PATCH = 40  # pixels of a patch in patches.png, at least: smaller ones are no pleasure to look at


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.codebook",
        description=__doc__.partition("\n\n")[2],
    )
    parser.add_argument("--checkpoint", required=True, help=command.CHECKPOINT)
    data_flags.add(parser)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint step; the newest by default")
    parser.add_argument("--limit", type=command.at_least_1, default=1000, help="images to use; default: %(default)s")
    parser.add_argument(
        "--alarm",
        type=float,
        default=0.1,
        help="warn when a smaller share of the codes is in use; default: %(default)s",
    )
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> dict[str, float]:
    """Runs the command; returns the numbers."""
    tokenizer = Tokenizer.load(args.checkpoint, args.step)
    numbers, charts = study(tokenizer, _read(args, tokenizer.image_size))
    output = storage.resolve_path(args.output)
    for name, chart in charts.items():
        images.write_image(output / f"{name}.png", chart)
    storage.write_bytes(output / "report.json", json.dumps(numbers, indent=2).encode())
    for name, value in numbers.items():
        print(f"{name:>24}: {value:.4g}")
    if numbers["usage"] < args.alarm:
        print(f"ALARM: {numbers['usage']:.1%} of the codes are in use, fewer than {args.alarm:.1%}", file=sys.stderr)
    print(f"wrote {output}")
    return numbers


def study(
    tokenizer: Tokenizer, pictures: UInt8[np.ndarray, "B S S 3"]
) -> tuple[dict[str, float], dict[str, UInt8[np.ndarray, "y x 3"]]]:
    """Numbers and pictures; of several levels, those of the first.

    Raises:
      DataError: the codes form no grid (multi-scale), or cannot be looked up by themselves (product).
    """
    latents, indices, codes = (np.concatenate(parts) for parts in zip(*_encode(tokenizer, pictures), strict=True))
    size = tokenizer.codebook_size
    counts = np.bincount(indices.reshape(-1), minlength=size)
    table = _lookup(tokenizer, np.arange(size))
    errors = ((latents - codes) ** 2).sum(-1)
    numbers = {
        "images": len(pictures),
        "codes": size,
        **codebook.health(counts),
        "quantization_error": float(errors.mean() / latents.var(axis=(0, 1, 2)).sum()),
        **_spacing(table[counts > 0]),
    }
    charts = {
        "use": histogram(
            np.sort(counts)[::-1], f"{(counts > 0).sum()} of {size} codes in use", "codes, most used first"
        ),
        "map": map_chart(table, counts),
        "patches": enlarged(patches_chart(pictures, indices, errors, counts), PATCH * min(CODES, size)),
        "positions": positions_chart(indices, size),
    }
    return numbers, charts


def map_chart(table: Float[np.ndarray, "K C"], counts: Int[np.ndarray, " K"]) -> UInt8[np.ndarray, "S S 3"]:
    """Codes as dots in the plane of their two principal axes."""
    centred = table - table.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    plane = centred @ axes.T
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    low, high = plane.min(0), plane.max(0)
    x, y = (4 + (SIDE - 9) * (plane - low) / np.maximum(high - low, 1e-12)).astype(int).T
    shade = np.where(counts > 0, 160 * (1 - np.log1p(counts) / np.log1p(max(counts.max(), 1))), 225).astype(np.uint8)
    chart = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for i in np.argsort(counts, kind="stable"):  # the most used on top
        chart[y[i] - 1 : y[i] + 2, x[i] - 1 : x[i] + 2] = shade[i]
    return chart


def patches_chart(
    pictures: UInt8[np.ndarray, "B S S 3"],
    indices: Int[np.ndarray, "B h w"],
    errors: Float[np.ndarray, "B h w"],
    counts: Int[np.ndarray, " K"],
) -> UInt8[np.ndarray, "y x 3"]:
    """The patches whose latents are nearest to their code, for the most used codes."""
    side = pictures.shape[1] // indices.shape[1]
    rows = []
    for code in np.argsort(-counts, kind="stable")[:CODES]:
        where = np.argwhere(indices == code)
        nearest = where[np.argsort(errors[tuple(where.T)], kind="stable")][:PATCHES]
        row = np.full((side, PATCHES * side, 3), 255, np.uint8)
        for i, (image, y, x) in enumerate(nearest):
            row[:, i * side : (i + 1) * side] = pictures[image, y * side :, x * side :][:side, :side]
        rows.append(row)
    return np.concatenate(rows)


def positions_chart(indices: Int[np.ndarray, "B h w"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Entropy of the codes at each position as a grey value, black for the lowest."""
    B, h, w = indices.shape
    counts = np.stack([np.bincount(column, minlength=size) for column in indices.reshape(B, -1).T])
    share = counts / B
    entropy = -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=1).reshape(h, w)
    grey = 255 * (entropy - entropy.min()) / max(np.ptp(entropy), 1e-12)
    cell = max(SIDE // h, 1)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2).repeat(cell, 0).repeat(cell, 1)


def _encode(tokenizer: Tokenizer, pictures: UInt8[np.ndarray, "B S S 3"]) -> list[tuple[np.ndarray, ...]]:
    """Latents, codes of the first level and their vectors, batch by batch."""
    module, grid = tokenizer.module, tokenizer.grid

    def encode(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent = module.apply(variables, image, method=lambda m, x: m.encoder(x))
        return latent, module.apply(variables, image, method="encode_to_indices")

    encode, parts = jax.jit(encode), []
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH].astype(np.float32) / 255
        latent, indices = (np.asarray(x) for x in encode(tokenizer.variables, batch))
        levels, rest = divmod(indices.size, len(batch) * grid**2)
        if rest:
            raise DataError(f"codes of shape {indices.shape} form no {grid}x{grid} grid: no report for multi-scale")
        if levels > 1 and not module.quantizer.decodes_prefixes:
            raise DataError(f"{type(module.quantizer).__name__} has no vectors of single codes: no report")
        first = indices.reshape(len(batch), grid, grid, -1)[..., 0]
        parts.append((latent.reshape(len(batch), grid, grid, -1), first, _lookup(tokenizer, first)))
    return parts


def _lookup(tokenizer: Tokenizer, indices: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b C"]:
    if tokenizer.module.quantizer.decodes_prefixes:
        indices = indices[..., None]
    lookup = tokenizer.module.apply(tokenizer.variables, indices, method=lambda m, i: m.quantizer.lookup(i))
    return np.asarray(lookup)


def _spacing(codes: Float[np.ndarray, "K C"]) -> dict[str, float]:
    """Mean, median and smallest distance from a code in use to the nearest other one; of at most 2,048 codes."""
    if len(codes) < 2:
        return {}
    distance = np.asarray(nearest_other(codes, 2048), np.float64)
    statistics = {"": distance.mean(), "_median": np.median(distance), "_min": distance.min()}
    return {f"code_distance{name}": float(value) for name, value in statistics.items()}


@data_flags.told()
def _read(args: argparse.Namespace, size: int) -> UInt8[np.ndarray, "B S S 3"]:
    data = data_flags.data_config(args, image_size=size, eval_batch_size=BATCH)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    pictures = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    if skipped := batches.count - len(pictures):
        print(f"skipped: {skipped} images that cannot be read", file=sys.stderr)
    if not len(pictures):
        raise DataError(f"--data={args.data}: none of {batches.count} images is readable")
    return pictures


def main() -> None:
    command.run(lambda: report(parse()))


if __name__ == "__main__":
    main()
