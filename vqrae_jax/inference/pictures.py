"""Pictures of what a tokenizer does, as uint8 arrays: one look everywhere."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

GAP = 2  # pixels between tiles
TILE = 128  # smaller pictures are enlarged to about this, for people to see
BACKGROUND = 255
GAIN = 4  # by which differences are enlarged, to be seen


def to_uint8(image: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """[0, 1] floats -> bytes; what lies outside is clipped."""
    return (np.clip(np.asarray(image, np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def code_map(indices: Int[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Each code in a colour of its own, the same in every picture, as squares of an image of about `size` pixels."""
    colours = _colours(np.asarray(indices))
    side = max(size // colours.shape[0], 1)
    tiles = colours.repeat(side, 0).repeat(side, 1)
    return _fit(tiles, size)


def reconstruction_grid(
    images: UInt8[np.ndarray, "B H W 3"],
    reconstructions: UInt8[np.ndarray, "B H W 3"],
    indices: Int[np.ndarray, "B ..."] | None,
    grid: int | None = None,
    columns: int = 2,
    shown: Sequence[str] = ("input", "reconstruction", "codes"),
) -> UInt8[np.ndarray, "Y X 3"]:
    """Rows of what is `shown`, by default input | reconstruction | code map, `columns` pictures per row.

    Args:
      shown: of input, reconstruction, difference and codes, in this order; codes only where there are some.

    Codes of several levels show the first, of several scales the last, which is the one of side `grid`.
    """
    enlarge = max(TILE // images.shape[1], 1)
    drawn = {"input": images, "reconstruction": reconstructions, "difference": difference_map(images, reconstructions)}
    kinds = [kind.repeat(enlarge, 1).repeat(enlarge, 2) for name, kind in drawn.items() if name in shown]
    if indices is not None and "codes" in shown:
        side = images.shape[1] * enlarge
        kinds.append(np.stack([code_map(_grid(codes, grid), side) for codes in indices]))
    triples = [_beside(list(triple)) for triple in zip(*kinds, strict=True)]
    blank = np.full_like(triples[0], BACKGROUND)
    triples += [blank] * (-len(triples) % columns)
    rows = [_beside(triples[i : i + columns], gap=4 * GAP) for i in range(0, len(triples), columns)]
    return _frame(np.concatenate([_below(row) for row in rows]))


def difference_map(
    image: UInt8[np.ndarray, "*b H W 3"], reconstruction: UInt8[np.ndarray, "*b H W 3"]
) -> UInt8[np.ndarray, "*b H W 3"]:
    """The absolute difference per channel, times GAIN; black where the two are equal."""
    difference = np.abs(image.astype(np.int32) - reconstruction)
    return np.minimum(difference * GAIN, 255).astype(np.uint8)


def _grid(codes: Int[np.ndarray, "..."], side: int | None) -> Int[np.ndarray, "h w"]:
    """Codes of one picture as a square."""
    if codes.ndim == 1:
        side = side or round(len(codes) ** 0.5)
        return codes[-side * side :].reshape(side, side)
    return codes if codes.ndim == 2 else codes[..., 0]


def _colours(indices: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The golden-ratio walk around the hue circle keeps neighbouring codes apart; lightness varies with it."""
    hue = (indices * 0.618033988749895) % 1.0
    light = 0.45 + 0.35 * ((indices * 0.754877666246693) % 1.0)
    phase = (hue[..., None] + np.array([0.0, 1 / 3, 2 / 3])) % 1.0
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
    return to_uint8(light[..., None] * (0.35 + 0.65 * wave) / 0.8)


def _fit(tiles: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Centres tiles whose side does not divide `size`."""
    out = np.full((size, size, 3), BACKGROUND, np.uint8)
    height, width = (min(n, size) for n in tiles.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = tiles[:height, :width]
    return out


def _beside(tiles: list[np.ndarray], gap: int = GAP) -> np.ndarray:
    space = np.full((tiles[0].shape[0], gap, 3), BACKGROUND, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, space)][:-1], axis=1)


def _below(row: np.ndarray) -> np.ndarray:
    return np.concatenate([row, np.full((GAP, row.shape[1], 3), BACKGROUND, np.uint8)])


def _frame(image: np.ndarray) -> np.ndarray:
    return np.pad(image, ((2 * GAP, GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=BACKGROUND)
