"""Pictures of what a tokenizer does, as uint8 arrays: one look everywhere."""

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

GAP = 2  # pixels between tiles
TILE = 128  # smaller pictures are enlarged to about this, for people to see
BACKGROUND = 255
GAIN = 4  # by which differences are enlarged, to be seen
Panels = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]  # title: {name of a line: (x, y)}

PANEL = (4.2, 2.8)  # inches of one chart, of DPI pixels each
DPI = 110
INK = "#3c5aa0"
FRAME = (209, 96, 61)
LINES = (INK, "#d1603d", "#4b8f4b", "#8a5fa8", "#b08a2e", "#5b6770")  # taken in turn


def to_uint8(image: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """[0, 1] floats -> bytes; what lies outside is clipped."""
    return (np.clip(np.asarray(image, np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def code_map(indices: Int[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Each code in a colour of its own, the same in every picture, as squares of an image of about `size` pixels."""
    colours = _colours(np.asarray(indices))
    side = max(size // colours.shape[0], 1)
    tiles = colours.repeat(side, 0).repeat(side, 1)
    return _fit(tiles, size)


def square(codes: Int[np.ndarray, "..."], side: int | None = None) -> Int[np.ndarray, "h w"]:
    """Codes of one picture as a square: of several levels the first, of several scales the last."""
    if codes.ndim == 1:
        side = side or round(len(codes) ** 0.5)
        return codes[-side * side :].reshape(side, side)
    return codes if codes.ndim == 2 else codes[..., 0]


def enlarged(image: UInt8[np.ndarray, "*b H W 3"], side: int) -> UInt8[np.ndarray, "*b y x 3"]:
    """At least `side` pixels high, every pixel a square of whole pixels."""
    times = -(-side // image.shape[-3])
    return image.repeat(times, -3).repeat(times, -2)


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
        kinds.append(np.stack([code_map(square(codes, grid), side) for codes in indices]))
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


def mark(
    image: UInt8[np.ndarray, "H W 3"], grid: int, boxes: Sequence[tuple[int, int, int, int]]
) -> UInt8[np.ndarray, "H W 3"]:
    """A copy with frames around some cells of a grid laid over it.

    Args:
      grid: cells along each side.
      boxes: (top, left, bottom, right) in cells, the last two not included.
    """
    marked, (H, W) = image.copy(), image.shape[:2]
    for top, left, bottom, right in boxes:
        y0, x0, y1, x1 = (round(n * side / grid) for n, side in ((top, H), (left, W), (bottom, H), (right, W)))
        inside = marked[y0:y1, x0:x1]
        for depth, colour in enumerate((FRAME, FRAME, (255, 255, 255))):  # light within, to be seen on any picture
            edge = inside[depth : len(inside) - depth, depth : inside.shape[1] - depth]
            edge[:1] = edge[-1:] = edge[:, :1] = edge[:, -1:] = colour
    return marked


def strip(tiles: Sequence[UInt8[np.ndarray, "h w 3"]], side: int) -> UInt8[np.ndarray, "S X 3"]:
    """Small pictures of one size beside each other, enlarged to at least `side` pixels."""
    return _beside([enlarged(tile, side) for tile in tiles], gap=2 * GAP)


def tiled(tiles: UInt8[np.ndarray, "N h w 3"], columns: int) -> UInt8[np.ndarray, "Y X 3"]:
    """Small pictures in rows of `columns`."""
    rows = [_beside(list(tiles[i : i + columns])) for i in range(0, len(tiles), columns)]
    rows[-1] = np.pad(rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)), constant_values=BACKGROUND)
    return _frame(np.concatenate([_below(row) for row in rows]))


def histogram(
    heights: Float[np.ndarray, " n"] | Int[np.ndarray, " n"], title: str, across: str
) -> UInt8[np.ndarray, "y x 3"]:
    """Values as filled steps from left to right; log scale where the largest is over 100 times the middle one."""
    heights = np.asarray(heights)
    figure, (axes,) = _charts([title], across)
    axes.fill_between(np.arange(len(heights) + 1), np.append(heights, heights[-1]), step="post", color=INK, linewidth=0)
    if heights.max() > 100 * max(float(np.median(heights)), 1e-12):
        axes.set_yscale("symlog")
    axes.set_xlim(0, len(heights))
    return _rendered(figure)


def curves(panels: Panels, across: str = "step") -> UInt8[np.ndarray, "y x 3"]:
    """One chart per panel. What is not finite is a gap."""
    return _rendered(_curves(panels, across))


def curves_file(panels: Panels, form: Literal["pdf", "svg"], across: str = "step") -> bytes:
    """The same as a file of lines and letters."""
    content = io.BytesIO()
    _curves(panels, across).savefig(content, format=form)
    return content.getvalue()


def _curves(panels: Panels, across: str):
    figure, charts = _charts(list(panels), across)
    for axes, lines in zip(charts, panels.values(), strict=True):
        for i, (name, (x, y)) in enumerate(lines.items()):
            few = {"marker": "o", "markersize": 3} if len(x) < 12 else {}
            axes.plot(x, y, color=LINES[i % len(LINES)], linewidth=1.4, label=name, **few)
        axes.grid(color="#e4e6ea", linewidth=0.6)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _charts(titles: Sequence[str], across: str):
    """A figure of its own, outside pyplot's global state, and its axes in up to three columns."""
    from matplotlib.figure import Figure

    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = Figure((PANEL[0] * columns, PANEL[1] * rows), dpi=DPI, layout="constrained")
    charts = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in charts[len(titles) :]:
        axes.remove()
    for axes, title in zip(charts, titles, strict=False):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(across, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure, charts[: len(titles)]


def _rendered(figure) -> UInt8[np.ndarray, "y x 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
