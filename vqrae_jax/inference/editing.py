"""Codes as material: regions exchanged, two pictures blended, patches that look alike to the tokenizer."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vqrae_jax.errors import DataError
from vqrae_jax.inference.tokenizer import Tokenizer

Region = tuple[int, int, int, int]  # top, left, bottom, right in codes, the last two not included


def as_grid(tokenizer: Tokenizer, codes: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "B h w *levels"]:
    """Codes of pictures by their place: [B, h, w], with a last axis for several levels or groups.

    Raises:
      DataError: codes of several scales have no one place.
    """
    side, one = tokenizer.grid, tokenizer.code_shape
    if math.prod(one) % side**2 or (len(one) == 1 and one[0] != side**2):
        raise DataError(f"codes of shape {list(one)} form no {side}x{side} grid: they cannot be edited by place")
    return codes.reshape(-1, side, side, *(one[2:] if len(one) > 2 else ()))


def paste(
    onto: Int[np.ndarray, "h w *levels"], source: Int[np.ndarray, "h w *levels"], region: Region, at: tuple[int, int]
) -> Int[np.ndarray, "h w *levels"]:
    """A copy of `onto` with the region of `source`, its top left corner at `at` (row, column); the overhang is cut."""
    top, left, bottom, right = region
    row, column = at
    height, width = min(bottom - top, onto.shape[0] - row), min(right - left, onto.shape[1] - column)
    pasted = onto.copy()
    pasted[row : row + height, column : column + width] = source[top : top + height, left : left + width]
    return pasted


def blend(
    tokenizer: Tokenizer, first: Int[np.ndarray, "*b"], second: Int[np.ndarray, "*b"], shares: Sequence[float]
) -> Int[np.ndarray, "..."]:
    """From the codes of one picture to those of another: what the quantizer chooses for their weighted mean, by place.

    Args:
      first, second: codes of one picture each, of shape `code_shape`.
      shares: weights of the second, 0 to 1; one picture's codes come back for each, those of 0 and 1 unchanged.

    Raises:
      DataError: the codes are of another shape than this tokenizer's.
    """
    for codes in (first, second):
        if codes.shape != tokenizer.code_shape:
            raise DataError(f"codes have shape {codes.shape}; expected those of one picture {tokenizer.code_shape}")
    weights = jnp.asarray(shares, jnp.float32)

    def choose(module: Any, pair: jax.Array) -> jax.Array:
        first, second = module.quantizer.lookup(pair).astype(jnp.float32)
        share = weights.reshape(-1, *[1] * first.ndim)
        return module.quantizer((1 - share) * first + share * second).indices

    pair = np.stack([first, second]).astype(np.int32)
    run = jax.jit(lambda variables, pair: tokenizer.module.apply(variables, pair, method=choose))
    path = np.array(run(tokenizer.variables, pair))
    for share, codes in ((0, first), (1, second)):  # a greedy choice of several levels need not return to its own
        path[np.asarray(shares) == share] = codes
    return path


def nearest_patches(
    latents: Float[np.ndarray, "B h w C"], place: tuple[int, int, int], count: int
) -> list[tuple[int, int, int]]:
    """Places (picture, row, column) whose latents are nearest to that of `place`, which is left out.

    Patches of the same code come first, in reading order.
    """
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    here = np.ravel_multi_index(place, latents.shape[:3])
    distance = ((flat - flat[here]) ** 2).sum(1)
    distance[here] = np.inf
    order = np.argsort(distance, kind="stable")[: min(count, len(flat) - 1)]
    return [tuple(map(int, np.unravel_index(i, latents.shape[:3]))) for i in order]


def paint_codes(tokenizer: Tokenizer, codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n P P 3"]:
    """What each code looks like among its own: the middle patch of a picture of this code alone.

    Raises:
      DataError: a place has several codes, so that one alone paints nothing.
    """
    side = tokenizer.grid
    if math.prod(tokenizer.code_shape) != side**2:
        raise DataError(f"codes of shape {list(tokenizer.code_shape)}: one alone paints nothing")
    patch, batch, painted = tokenizer.downsampling, 64, []
    start = side // 2 * patch
    for i in range(0, len(codes), batch):
        chosen = np.asarray(codes[i : i + batch], np.int32)
        whole = np.broadcast_to(
            chosen.reshape(-1, *[1] * len(tokenizer.code_shape)), (len(chosen), *tokenizer.code_shape)
        )
        pictures = np.asarray(tokenizer.decode_from_indices(whole))
        painted.append(pictures[:, start : start + patch, start : start + patch])
    return np.concatenate(painted)
