"""Editing of images by their indices: pasting regions, blending two images, searching similar patches."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vqrae_jax.errors import DataError
from vqrae_jax.inference.tokenizer import Tokenizer

Region = tuple[int, int, int, int]  # top, left, bottom, right in grid positions, the last two exclusive


def as_grid(tokenizer: Tokenizer, indices: Int[np.ndarray, "..."]) -> Int[np.ndarray, "B h w *levels"]:
    """Reshapes indices of images to [B, h, w], with a last axis for levels or groups; refuses several scales."""
    side, shape = tokenizer.grid, tokenizer.code_shape
    if not side or math.prod(shape) % side**2 or (len(shape) == 1 and shape[0] != side**2):
        raise DataError(f"indices of shape {list(shape)} have no positions on a grid of the image")
    levels = shape[1:] if len(shape) == 2 and shape != (side, side) else shape[2:]  # rows [N, levels] or a grid
    return indices.reshape(-1, side, side, *levels)


def grid_position(grid: int, x: float, y: float) -> tuple[int, int]:
    """Returns row and column of a point; x and y are fractions of width and height."""
    row, column = (min(max(int(fraction * grid), 0), grid - 1) for fraction in (y, x))
    return row, column


def cell(row: int, column: int) -> Region:
    """Returns the region of one position."""
    return row, column, row + 1, column + 1


def span(first: tuple[int, int], second: tuple[int, int]) -> Region:
    """Returns the region with two positions as opposite corners."""
    (top, bottom), (left, right) = map(sorted, zip(first, second, strict=True))
    return top, left, bottom + 1, right + 1


def region_mask(grid: int, region: Region) -> Bool[np.ndarray, "h w"]:
    """Returns a mask of the grid that is True in a region; DataError if the region is empty or not inside the grid."""
    top, left, bottom, right = region
    if not (0 <= top < bottom <= grid and 0 <= left < right <= grid):
        message = f"expected top < bottom and left < right, from 0 to {grid}, the side of the grid"
        raise DataError(message, field="region", value=region)
    mask = np.zeros((grid, grid), bool)
    mask[top:bottom, left:right] = True
    return mask


def paste(
    target: Int[np.ndarray, "h w *levels"], source: Int[np.ndarray, "h w *levels"], region: Region, at: tuple[int, int]
) -> Int[np.ndarray, "h w *levels"]:
    """Returns a copy of `target` with a region of `source`, cut at the edge, whose top left corner is `at`."""
    (top, left, bottom, right), (row, column) = region, at
    height, width = min(bottom - top, target.shape[0] - row), min(right - left, target.shape[1] - column)
    result = target.copy()
    result[row : row + height, column : column + width] = source[top : top + height, left : left + width]
    return result


def blend(
    tokenizer: Tokenizer, first: Int[np.ndarray, "..."], second: Int[np.ndarray, "..."], weights: Sequence[float]
) -> Int[np.ndarray, "steps ..."]:
    """Quantizes weighted means of the latents of two images, position by position.

    Args:
      tokenizer: has codes.
      first, second: indices of one image each, of shape `code_shape`.
      weights: weights of the second image, 0 to 1; 0 and 1 return the images' indices unchanged.
    """
    for indices in (first, second):
        if indices.shape != tokenizer.code_shape:
            raise DataError(f"indices have shape {indices.shape}; expected {tokenizer.code_shape}, one image")
    if not (np.asarray(weights).ndim == 1 and np.all((np.asarray(weights) >= 0) & (np.asarray(weights) <= 1))):
        raise DataError(f"weights are {weights!r}; expected a list of numbers from 0 to 1")
    pair, w = np.stack([first, second]).astype(np.int32), np.asarray(weights, np.float32)
    run = jax.jit(functools.partial(tokenizer.module.apply, method=lambda model, *args: model.quantizer.blend(*args)))
    result = np.array(run(tokenizer.variables, pair, w))
    for weight, indices in ((0, first), (1, second)):  # several levels are chosen greedily and may differ
        result[np.asarray(weights) == weight] = indices
    return result


def nearest_patches(
    latents: Float[np.ndarray, "B h w C"], position: tuple[int, int, int], count: int
) -> list[tuple[int, int, int]]:
    """Returns the `count` other positions (image, row, column) with the nearest latents; ties are in reading order."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    query = np.ravel_multi_index(position, latents.shape[:3])
    distances = ((flat - flat[query]) ** 2).sum(1)
    distances[query] = np.inf
    order = np.argsort(distances, kind="stable")[: min(count, len(flat) - 1)]
    return [tuple(map(int, np.unravel_index(i, latents.shape[:3]))) for i in order]


def decode_patches(tokenizer: Tokenizer, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n P P 3"]:
    """Returns the appearance of codes: the central patch of an image in which all positions have that code."""
    side, shape = tokenizer.grid, tokenizer.code_shape
    if math.prod(shape) != side**2:
        problem = "several codes per position" if side else "no positions on a grid"
        raise DataError(f"indices of shape {list(shape)} have {problem}; one code alone has no appearance")
    patch, batch, patches = tokenizer.downsampling, 64, []
    center = slice(side // 2 * patch, (side // 2 + 1) * patch)
    for i in range(0, len(indices), batch):
        codes = np.asarray(indices[i : i + batch], np.int32)
        uniform = np.broadcast_to(codes.reshape(-1, *[1] * len(shape)), (len(codes), *shape))
        patches.append(np.asarray(tokenizer.decode_from_indices(uniform))[:, center, center])
    return np.concatenate(patches)
