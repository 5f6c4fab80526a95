"""Reports how a tokenizer uses its codebook on a set of images.

vqrae codebook --checkpoint=runs/quickstart --data=/data/val --output=report

Writes report.json, and the page index.html, which explains four charts: map.png, the codes on their first two principal
axes; use.png, how often each code occurs; patches.png, the most used codes and the image patches nearest to them;
positions.png, the entropy of the codes at each position of the grid.
"""

import argparse
import functools
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
from vqrae_jax.evaluation import report as report_page
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.progress import progress
from vqrae_jax.quantizers.nearest import nearest_other

BATCH = 16
CODES, PATCHES = 16, 12  # rows and columns of patches.png
PATCH = 40  # pixels of a patch in patches.png, at least
LABEL, HEADER = 110, 26  # pixels of the row labels and of the titles in patches.png

FIGURES = {  # title and explanation of each chart
    "map": (
        "Where the codes lie",
        "Codes on the first two principal axes of the codebook. A disc is a code in use: its color is the mean of the "
        "patches that it decodes to, its area the number of times that it occurs. Gray crosses are codes that do not "
        "occur. Smooth changes of color show that neighboring codes decode to similar patches; crosses far from all "
        "discs are codes that no latent is close to.",
    ),
    "use": (
        "How often each code occurs",
        "All codes, from the most to the least used. The flatter the curve, the more information a code carries. Codes "
        "at zero do not occur in these images.",
    ),
    "patches": (
        "What the most used codes stand for",
        "One code per row: its number and its share of all positions, the mean of the patches that it decodes to, and "
        "the image patches whose latents are nearest to it. The more alike these patches are, the clearer is the "
        "meaning of the code.",
    ),
    "positions": (
        "Where codes vary",
        "Entropy of the codes at each position of the grid. At positions of low entropy, most images have the same few "
        "codes, for example at plain borders.",
    ),
}

parser = command_line.Parser("codebook", __doc__.partition("\n\n")[0])
parser.add_checkpoint()
parser.add_data()
parser.add("--output", "folder for report.json and index.html", required=True)
parser.add_count("--limit", "use the first LIMIT images only", 1000)
parser.add("--alarm", "warn if a smaller share of the codes is used", type=float, default=0.1)


@command_line.names_arguments()
def report(args: argparse.Namespace) -> dict[str, float | int]:
    """Runs the command; returns the content of report.json."""
    output = command_line.output_folder(args.output)
    tokenizer = Tokenizer.load(args.checkpoint, args.step, encoder=args.encoder)
    metrics, charts = analyze(tokenizer, _read_images(args, tokenizer.image_size))
    for name, chart in charts.items():
        image_files.write_image(output / f"{name}.png", chart)
    storage.write_bytes(output / "report.json", json.dumps(metrics, indent=2).encode())
    for name, value in metrics.items():
        print(f"{name:>24}: {value:.4g}")
    warnings = []
    if metrics["usage"] < args.alarm:
        warnings = [f"ALARM: {metrics['usage']:.1%} of the codes are used, less than {args.alarm:.1%}"]
        print(*warnings, file=sys.stderr)
    figures = (f'<section><h2>{FIGURES[n][0]}</h2><p>{FIGURES[n][1]}<p><img src="{n}.png" alt="">' for n in charts)
    body = f'<div class="groups wide">{"</section>".join(figures)}</section></div>'
    page = report_page.render_page(f"Codebook of {args.checkpoint}", metrics, warnings, body)
    storage.write_bytes(output / "index.html", page)
    print(f"wrote {output / 'index.html'}")
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
    if not tokenizer.grid:
        raise ConfigError("has codes without positions on a grid, of which there are no charts", field="--checkpoint")
    indices, distances, decoded, levels, errors = (
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
    title = f"{(counts > 0).sum():,} of {size:,} codes in use"
    charts = {
        "map": map_chart(embeddings, counts, visualize.code_colors(indices, decoded)),
        "use": visualize.histogram(np.sort(counts)[::-1], title, "codes, most used first"),
        "patches": patches_chart(images, decoded, indices, distances, counts),
        "positions": visualize.heat_map(position_entropy(indices), "entropy of each position", "bits"),
    }
    return metrics, charts


def measure_spacing(embeddings: Float[np.ndarray, "K C"]) -> dict[str, float]:
    """Returns mean, median and minimum of the distances from (at most 2,048) codes to the nearest other code."""
    if len(embeddings) < 2:
        return {}
    distance = np.asarray(nearest_other(embeddings, 2048), np.float64)
    statistics = {"": distance.mean(), "_median": np.median(distance), "_min": distance.min()}
    return {f"code_distance{name}": float(value) for name, value in statistics.items()}


def map_chart(
    embeddings: Float[np.ndarray, "K C"], counts: Int[np.ndarray, " K"], colors: UInt8[np.ndarray, "used 3"]
) -> UInt8[np.ndarray, "Y X 3"]:
    """Plots codes in the plane of their first two principal axes; `colors` are those of the codes in use."""
    centered = embeddings - embeddings.mean(0)
    variances, axes = np.linalg.eigh(centered.T @ centered)
    plane = np.pad(centered @ axes[:, ::-1][:, :2], ((0, 0), (0, max(2 - axes.shape[1], 0))))
    first, second = np.append(variances[::-1], 0)[:2] / max(variances.sum(), 1e-12)
    labels = f"first principal axis ({first:.0%} of the variance)", f"second principal axis ({second:.0%})"
    order = np.argsort(counts == 0, kind="stable")  # those in use first, in rising order
    used = counts[counts > 0].astype(np.float64)
    return visualize.scatter(plane[order], colors, used, f"{len(used):,} of {len(counts):,} codes in use", labels)


def patches_chart(
    images: UInt8[np.ndarray, "B S S 3"],
    decoded: UInt8[np.ndarray, "B S S 3"],
    indices: Int[np.ndarray, "B h w"],
    errors: Float[np.ndarray, "B h w"],
    counts: Int[np.ndarray, " K"],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Shows a row for each of the most used codes: their mean decoded patch, and the patches nearest to them."""
    B, h, w = indices.shape
    side = images.shape[1] // h
    originals, decoded = (x.reshape(B, h, side, w, side, 3).swapaxes(2, 3) for x in (images, decoded))
    rows, labels, blank = [], [], np.full((side, side, 3), visualize.BACKGROUND, np.uint8)
    for code in np.argsort(-counts, kind="stable")[: min(CODES, (counts > 0).sum())]:
        positions = np.argwhere(indices == code)
        nearest = positions[np.argsort(errors[tuple(positions.T)], kind="stable")][:PATCHES]
        mean = (decoded[tuple(positions.T)].mean(0) + 0.5).astype(np.uint8)
        row = visualize.strip([mean, blank, *originals[tuple(nearest.T)], *[blank] * (PATCHES - len(nearest))], PATCH)
        labels.append(
            (0, HEADER + len(rows) * (len(row) + 6) + len(row) // 2 - 9, f"{code}  ({counts[code] / counts.sum():.1%})")
        )
        rows.append(np.pad(row, ((0, 6), (LABEL, 0), (0, 0)), constant_values=visualize.BACKGROUND))
    start = LABEL + 2 * (len(row) + visualize.GAP)
    labels += [(0, 0, "code"), (LABEL, 0, "decoded"), (start, 0, "nearest patches")]
    canvas = np.pad(np.concatenate(rows), ((HEADER, 0), (0, 0), (0, 0)), constant_values=visualize.BACKGROUND)
    return image_files.write_text(canvas, labels, 14)


def position_entropy(indices: Int[np.ndarray, "B h w"]) -> Float[np.ndarray, "h w"]:
    """Returns the entropy in bits of the codes at each position."""
    B, h, w = indices.shape
    shares = (np.unique(column, return_counts=True)[1] / B for column in indices.reshape(B, -1).T)
    return np.array([-np.sum(share * np.log2(share)) for share in shares]).reshape(h, w)


def _encode(tokenizer: Tokenizer, images: UInt8[np.ndarray, "B S S 3"]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields indices and squared errors [b, h, w], reconstructions, counts [1, *levels, K], relative errors [b]."""
    grid, encode = tokenizer.grid, jax.jit(functools.partial(tokenizer.module.apply, method=_forward))
    starts = range(0, len(images), BATCH)
    for start in progress(starts, len(starts), f"batches of {BATCH} images"):
        batch = images[start : start + BATCH].astype(np.float32) / 255
        result, latents = jax.device_get(encode(tokenizer.variables, batch))
        out, decoded = result.quantized, visualize.to_uint8(result.reconstruction)
        tokens = out.indices.reshape(len(batch), -1)
        depth = out.metrics["counts"].size // tokenizer.codebook_size
        first = tokens[:, ::depth][:, -(grid**2) :]  # levels are interleaved, scales one after the other
        distances = np.sum((latents.reshape(out.z.shape) - out.z) ** 2, axis=-1)
        error = np.full(len(batch), out.metrics["quantization_error"])
        maps = (x.reshape(-1, grid, grid) for x in (first, distances))
        yield *maps, decoded, out.metrics["counts"][None], error


def _forward(model: Any, images: Float[jax.Array, "B S S 3"]) -> tuple[Any, Float[jax.Array, "B h w C"]]:
    """Returns the results of a forward pass, and the latents that are quantized."""
    result = model.forward(images)
    return result, model.quantizer.fuse(result.encoded)


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
