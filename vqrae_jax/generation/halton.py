"""The order of positions in Halton-MaskGIT (Besnier et al. 2025, arXiv:2503.17076): consecutive ones are far apart."""

import numpy as np
from jaxtyping import Int


def halton_ranks(*grids: tuple[int, ...]) -> Int[np.ndarray, " N"]:
    """Returns the rank of every position of flat indices: 0 is sampled first.

    The cells of a grid follow the Halton sequence of bases 2 (rows) and 3 (columns). Neighbors, which depend on each
    other most, are thus rarely sampled in the same step.

    Args:
      grids: (height, width) or, with several indices per cell, (height, width, depth), the depth varying fastest in the
        flat indices. All cells of a level precede the next level, and a grid precedes those after it.
    """
    ranks: list[Int[np.ndarray, " n"]] = []
    for height, width, *depth in grids:
        first = _first_visits(height, width)
        cells = np.argsort(np.argsort(first))
        levels = len(first) * np.arange(*depth or (1,))
        ranks.append(sum(map(len, ranks)) + (cells[:, None] + levels).ravel())
    return np.concatenate(ranks)


def _first_visits(height: int, width: int) -> Int[np.ndarray, " cells"]:
    """Returns the number of the first point of the Halton sequence in every cell."""
    points = cells = height * width
    while True:
        numbers = np.arange(1, points + 1)
        flat = _scaled_inverse(numbers, 2, height) * width + _scaled_inverse(numbers, 3, width)
        visited, first = np.unique(flat, return_index=True)
        if len(visited) == cells:
            return first
        points *= 2


def _scaled_inverse(numbers: Int[np.ndarray, " n"], base: int, size: int) -> Int[np.ndarray, " n"]:
    """Returns floor(size * radical inverse), exactly; the inverse mirrors the digits of a number behind the point."""
    mirrored, power = np.zeros_like(numbers), 1
    while numbers.any():
        mirrored, power, numbers = mirrored * base + numbers % base, power * base, numbers // base
    return mirrored * size // power
