"""Reports how a tokenizer uses its codebook on a set of images.

vqrae codebook --checkpoint=runs/quickstart --source=photographs --output=report

Writes report.json and four images: use.png, how often each code occurs; map.png, the codes on their first two principal
axes, darker where used more; patches.png, the image patches nearest to the most used codes; positions.png, the entropy
of the codes at each position of the grid, white for the highest.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.data import images as image_files
from vqrae_jax.data import pipeline
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.evaluation import codebook_health, visualize
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.quantizers.nearest import nearest_other

BATCH = 16
SIDE = 512  # pixels of square charts
CODES, PATCHES = 16, 12  # rows and columns of patches.png
PATCH = 40  # pixels of a patch in patches.png, at least

parser = command_line.Parser("codebook", __doc__.partition("\n\n")[0])
parser.add_checkpoint()
parser.add_data()
parser.add("--output", "folder for report.json and the images", required=True)
parser.add_count("--limit", "use the first LIMIT images only", 1000)
parser.add("--alarm", "warn if a smaller share of the codes is used", type=float, default=0.1)


@command_line.names_arguments()
def report(args: argparse.Namespace) -> dict[str, float | int]:
    """Runs the command; returns the content of report.json."""
    tokenizer = Tokenizer.load(args.checkpoint, args.step)
    metrics, charts = analyze(tokenizer, _read_images(args, tokenizer.image_size))
    output = storage.resolve_path(args.output)
    for name, chart in charts.items():
        image_files.write_image(output / f"{name}.png", chart)
    storage.write_bytes(output / "report.json", json.dumps(metrics, indent=2).encode())
    for name, value in metrics.items():
        print(f"{name:>24}: {value:.4g}")
    if metrics["usage"] < args.alarm:
        print(f"ALARM: {metrics['usage']:.1%} of the codes are used, less than {args.alarm:.1%}", file=sys.stderr)
    print(f"wrote {output}")
    return metrics


def analyze(
    tokenizer: Tokenizer, images: UInt8[np.ndarray, "B S S 3"]
) -> tuple[dict[str, float | int], dict[str, UInt8[np.ndarray, "..."]]]:
    """Computes the metrics and charts of the report.

    The metrics are those of the training log, means over batches. Charts are of the first level or group, or of the
    finest scale, and of its embeddings before any projection.
    """
    if not tokenizer.has_codes:
        problem = 'is a continuous autoencoder (quantizer "none"), whose use of codes cannot be reported'
        raise ConfigError(problem, field="--checkpoint")
    indices, distances, levels, errors = (
        np.concatenate(parts) for parts in zip(*_encode(tokenizer, images), strict=True)
    )
    size, levels = tokenizer.codebook_size, levels.sum(0)
    counts, embeddings = np.bincount(indices.ravel(), minlength=size), _embeddings(tokenizer)
    metrics = {
        "images": len(images),
        "codes": size,
        **codebook_health.health(levels),
        "quantization_error": float(errors.mean()),
        **measure_spacing(embeddings[counts > 0]),
    }
    title = f"{(counts > 0).sum()} of {size} codes in use"
    charts = {
        "use": visualize.histogram(np.sort(counts)[::-1], title, "codes, most used first"),
        "map": map_chart(embeddings, counts),
        "patches": visualize.enlarge(patches_chart(images, indices, distances, counts), PATCH * min(CODES, size)),
        "positions": positions_chart(indices, size),
    }
    return metrics, charts


def measure_spacing(embeddings: Float[np.ndarray, "K C"]) -> dict[str, float]:
    """Returns mean, median and minimum of the distances from (at most 2,048) codes to the nearest other code."""
    if len(embeddings) < 2:
        return {}
    distance = np.asarray(nearest_other(embeddings, 2048), np.float64)
    statistics = {"": distance.mean(), "_median": np.median(distance), "_min": distance.min()}
    return {f"code_distance{name}": float(value) for name, value in statistics.items()}


def map_chart(embeddings: Float[np.ndarray, "K C"], counts: Int[np.ndarray, " K"]) -> UInt8[np.ndarray, "S S 3"]:
    """Plots codes as dots in the plane of their first two principal axes."""
    centered = embeddings - embeddings.mean(0)
    plane = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    low, high = plane.min(0), plane.max(0)
    x, y = (4 + (SIDE - 9) * (plane - low) / np.maximum(high - low, 1e-12)).astype(int).T
    shade = np.where(counts > 0, 160 * (1 - np.log1p(counts) / np.log1p(max(counts.max(), 1))), 225).astype(np.uint8)
    chart = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for i in np.argsort(counts, kind="stable"):  # the most used on top
        chart[y[i] - 1 : y[i] + 2, x[i] - 1 : x[i] + 2] = shade[i]
    return chart


def patches_chart(
    images: UInt8[np.ndarray, "B S S 3"],
    indices: Int[np.ndarray, "B h w"],
    errors: Float[np.ndarray, "B h w"],
    counts: Int[np.ndarray, " K"],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Shows the patches whose latents are nearest to their code, a row for each of the most used codes."""
    side = images.shape[1] // indices.shape[1]
    rows = []
    for code in np.argsort(-counts, kind="stable")[:CODES]:
        positions = np.argwhere(indices == code)
        nearest = positions[np.argsort(errors[tuple(positions.T)], kind="stable")][:PATCHES]
        row = np.full((side, PATCHES * side, 3), 255, np.uint8)
        for i, (image, y, x) in enumerate(nearest):
            row[:, i * side : (i + 1) * side] = images[image, y * side :, x * side :][:side, :side]
        rows.append(row)
    return np.concatenate(rows)


def positions_chart(indices: Int[np.ndarray, "B h w"], size: int) -> UInt8[np.ndarray, "Y X 3"]:
    """Shows the entropy of the codes at each position in gray, black for the lowest."""
    B, h, w = indices.shape
    share = np.stack([np.bincount(column, minlength=size) for column in indices.reshape(B, -1).T]) / B
    entropy = -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=1).reshape(h, w)
    gray = (255 * (entropy - entropy.min()) / max(np.ptp(entropy), 1e-12)).astype(np.uint8)
    return visualize.enlarge(np.repeat(gray[..., None], 3, axis=2), SIDE)


def _encode(tokenizer: Tokenizer, images: UInt8[np.ndarray, "B S S 3"]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields, for each batch, indices and squared errors [b, h, w], counts [1, *levels, K] and relative errors [b]."""
    module, grid = tokenizer.module, tokenizer.grid

    def quantize(model: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        latents = model.encoder(images)
        return latents, model.quantize(latents)

    encode = jax.jit(lambda variables, images: module.apply(variables, images, method=quantize))
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH].astype(np.float32) / 255
        latents, out = jax.device_get(encode(tokenizer.variables, batch))
        tokens = out.indices.reshape(len(batch), -1)
        depth = out.metrics["counts"].size // tokenizer.codebook_size
        first = tokens[:, ::depth][:, -(grid**2) :]  # levels are interleaved, scales one after the other
        distances = np.sum((latents.reshape(out.z.shape) - out.z) ** 2, axis=-1)
        error = np.full(len(batch), out.metrics["quantization_error"])
        yield *(x.reshape(-1, grid, grid) for x in (first, distances)), out.metrics["counts"][None], error


def _embeddings(tokenizer: Tokenizer) -> Float[np.ndarray, "K C"]:
    """Returns the vectors that the quantizer inside all wrappers compares latents with."""

    def lookup(model: Any, indices: Int[np.ndarray, " K"]) -> Float[jax.Array, "K C"]:
        return model.quantizer.innermost().lookup(indices)

    return np.asarray(tokenizer.module.apply(tokenizer.variables, np.arange(tokenizer.codebook_size), method=lookup))


def _read_images(args: argparse.Namespace, size: int) -> UInt8[np.ndarray, "B {size} {size} 3"]:
    data = command_line.data_config(args, image_size=size, eval_batch_size=BATCH)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    images = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    if skipped := batches.count - len(images):
        print(f"skipped {skipped} images that cannot be read", file=sys.stderr)
    if not len(images):
        raise DataError(f"none of its {batches.count} images is readable", field="--data", value=args.data)
    return images


main = command_line.build_main(parser, report)

if __name__ == "__main__":
    main()
