"""Finds the nearest training image of every sample of a generator, which shows what it has memorized.

Distances are root mean squared differences of pixels in [0, 1] between decoded codes, so that a copy of all codes has
the distance 0. Held-out images give the distances of images that are new; samples that are nearer than these are copies
or nearly so. Training images have all their views. docs/generate.md has a command.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import numpy as np
from jaxtyping import Float, Int, UInt8

from vqrae_jax import Tokenizer, storage
from vqrae_jax.data import images
from vqrae_jax.data.codes import Codes
from vqrae_jax.evaluation import visualize

BATCH = 64


def decode(tokenizer: Tokenizer, folder: str) -> tuple[UInt8[np.ndarray, "N S S 3"], list[str]]:
    """Returns the decoded images of all views of a dataset of codes, and the names of their classes."""
    dataset = Codes(storage.resolve_path(folder))
    codes, labels = dataset.load()
    views, names = codes.reshape(len(codes), -1, *dataset.plan.view_shape), dataset.plan.classes
    codes, labels = np.concatenate(views), np.repeat(labels, views.shape[1])
    decoded = [tokenizer.decode_from_indices(codes[i : i + BATCH]) for i in range(0, len(codes), BATCH)]
    return visualize.to_uint8(np.concatenate(decoded)), [names[i] if names and i >= 0 else "" for i in labels]


def nearest(
    queries: UInt8[np.ndarray, "n S S 3"], references: UInt8[np.ndarray, "N S S 3"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the index of the nearest reference of each query, and its distance."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (queries, references))
    squares = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0) / a.shape[1]
    index = squares.argmin(1)
    return index, np.sqrt(((a - b[index]) ** 2).mean(1))


def pairs(samples: np.ndarray, names: list[str], found: np.ndarray, distances: np.ndarray, columns: int) -> np.ndarray:
    """Arranges samples, with their class, each next to its nearest image, with its distance."""
    tiles = np.stack([samples, found], axis=1).reshape(-1, *samples.shape[1:])
    captions = [text for name, d in zip(names, distances, strict=True) for text in (name, f"nearest: {d:.3f}")]
    return visualize.sample_grid(tiles, captions, 2 * columns)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="tokenizer of all codes")
    parser.add_argument("--train", required=True, help="folder of training codes")
    parser.add_argument("--val", required=True, help="folder of held-out codes")
    parser.add_argument("--samples", required=True, help="output folder of generate")
    parser.add_argument("--output", required=True, help="image file for the samples and their nearest images")
    parser.add_argument("--shown", type=int, default=36, help="number of samples in the picture, sorted by class")
    parser.add_argument("--columns", type=int, default=4, help="samples per row of the picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    tokenizer = Tokenizer.load(args.tokenizer)
    (train, _), (val, _), (samples, names) = (
        decode(tokenizer, x) for x in (args.train, args.val, f"{args.samples}/codes")
    )
    report = {}
    for name, queries in {"val": val, "samples": samples}.items():
        index, distances = nearest(queries, train)
        quartiles = np.quantile(distances, [0, 0.25, 0.5, 0.75, 1])
        report[name] = {"images": len(queries), "minimum, quartiles, maximum": [round(float(q), 4) for q in quartiles]}
        if name == "val":
            limit = np.quantile(distances, 0.05)
    report["samples"]["nearer than 95 % of the held-out images"] = round(float((distances < limit).mean()), 4)
    shown = np.argsort(names[: args.shown], kind="stable")  # by class
    names = [names[i] for i in shown]
    picture = pairs(samples[shown], names, train[index[shown]], distances[shown], args.columns)
    images.write_image(storage.resolve_path(args.output), picture)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
