"""Measures the bits per code of simple predictors on held-out codes, as baselines for generators.

python benchmarks/code_baselines.py --train=codes/train --val=codes/val

All are distributions of complete images, as the bits_per_code of a generator are: codes are predicted row by row, each
from codes before it. Probabilities are smoothed counts of the training codes, of all their views:

uniform      1 / K
unigram      the code's frequency, one count added to each code
position     the code's frequency at its position
left         its frequency after the left neighbor; the one above in the first column
above        its frequency below the neighbor above; the left one in the first row
left, above  the mean of the last two distributions

The last four are (count + m * unigram) / (total + m), with the m in 1, 2, 4, ..., 4096 that is best on the held-out
codes, which favors the baselines. Levels of residual and product quantizers are counted and predicted independently of
each other. Labels are not used.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import numpy as np
from jaxtyping import Float, Int

from vqrae_jax import storage
from vqrae_jax.data.codes import Codes
from vqrae_jax.errors import DataError

MASSES = 2.0 ** np.arange(13)


def read_grids(folder: str) -> tuple[Int[np.ndarray, "L B h w"], int]:
    """Returns the codes of all views by level, and K.

    Raises:
      DataError: an image's codes are not a grid.
    """
    dataset = Codes(storage.resolve_path(folder))
    shape = dataset.plan.view_shape
    if len(shape) < 2 or dataset.plan.grids not in ((), (shape[:2],)):
        raise DataError(f"has codes of shape {shape}; expected grids", field="--train", value=folder)
    codes = dataset.load()[0].astype(np.int64)
    return np.moveaxis(codes.reshape(-1, *shape[:2], int(np.prod(shape[2:]))), -1, 0), dataset.plan.codebook_size


def neighbors(codes: Int[np.ndarray, "B h w"], first: str) -> Int[np.ndarray, "B h w"]:
    """Returns 2 * neighbor of every code, plus 1 if it is the one above; -1 without a neighbor."""
    left, above = (np.full_like(codes, -1) for _ in range(2))
    left[:, :, 1:], above[:, 1:] = 2 * codes[:, :, :-1], 2 * codes[:, :-1] + 1
    return np.where(left >= 0, left, above) if first == "left" else np.where(above >= 0, above, left)


def conditional(
    contexts: tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]], train: Int[np.ndarray, "..."],
    val: Int[np.ndarray, "..."], unigram: Float[np.ndarray, " K"], mass: float,
) -> Float[np.ndarray, "..."]:  # fmt: skip
    """Returns the probability of each code of `val` in its context; context -1 has the unigram.

    Args:
      contexts: of the codes of `train` and of `val`.
    """
    size = len(unigram)
    pairs, pair_counts = np.unique((contexts[0] * size + train)[contexts[0] >= 0], return_counts=True)
    totals = np.bincount(contexts[0][contexts[0] >= 0], minlength=1 + max(map(np.max, contexts)))
    wanted = contexts[1] * size + val
    rank = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[rank] == wanted, pair_counts[rank], 0)
    probability = (count + mass * unigram[val]) / (totals[contexts[1]] + mass)
    return np.where(contexts[1] >= 0, probability, unigram[val])


def measure(train: Int[np.ndarray, "B h w"], val: Int[np.ndarray, "b h w"], size: int) -> dict[str, float]:
    """Returns the bits per code of each predictor on `val`."""
    unigram = (np.bincount(train.ravel(), minlength=size) + 1) / (train.size + size)
    position = np.arange(train[0].size).reshape(train[0].shape)
    contexts = {
        "position": [np.broadcast_to(position, x.shape) for x in (train, val)],
        **{first: [neighbors(x, first) for x in (train, val)] for first in ("left", "above")},
    }
    probabilities = {
        name: np.stack([conditional(tuple(pair), train, val, unigram, mass) for mass in MASSES])
        for name, pair in contexts.items()
    }
    probabilities["left, above"] = (probabilities["left"] + probabilities["above"]) / 2
    best = {name: float((-np.log2(p)).mean((1, 2, 3)).min()) for name, p in probabilities.items()}
    return {"uniform": float(np.log2(size)), "unigram": float(-np.log2(unigram[val]).mean()), **best}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="folder of training codes, as tokenize writes them")
    parser.add_argument("--val", required=True, help="folder of held-out codes of the same tokenizer")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    (train, size), (val, _) = read_grids(args.train), read_grids(args.val)
    levels = [measure(own, held_out, size) for own, held_out in zip(train, val, strict=True)]
    print(json.dumps({name: round(float(np.mean([level[name] for level in levels])), 4) for name in levels[0]}))


if __name__ == "__main__":
    main()
