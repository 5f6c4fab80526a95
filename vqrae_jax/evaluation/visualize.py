"""Images and charts of a tokenizer, as uint8 arrays."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

GAP = 2  # pixels between tiles
TILE = 128  # smaller images are enlarged to about this side
BACKGROUND = 255
GAIN = 4  # factor by which difference maps are amplified
KINDS = ("input", "reconstruction", "difference", "codes")  # images of one example, in this order

Curves = Mapping[str, tuple[Sequence[float | int], Sequence[float | int]]]  # {label: (x, y)}
CHART, DPI = (4.2, 2.8), 110  # inches of one chart, and pixels of an inch
COLORS = ("#3c5aa0", "#d1603d", "#4b8f4b", "#8a5fa8", "#b08a2e", "#5b6770")
FRAME = (209, 96, 61)


def to_uint8(images: Float[np.ndarray, "*b"]) -> UInt8[np.ndarray, "*b"]:
    """Converts floats in [0, 1] to bytes, rounded; values outside are clipped."""
    return (np.clip(np.asarray(images, np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def code_map(indices: Int[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Renders a grid of indices as colored squares; an index has the same color in every image."""
    side = max(size // len(indices), 1)
    tiles = _colors(indices).repeat(side, 0).repeat(side, 1)
    image = np.full((size, size, 3), BACKGROUND, np.uint8)
    height, width = (min(n, size) for n in tiles.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2  # centered where the grid does not divide `size`
    image[top : top + height, left : left + width] = tiles[:height, :width]
    return image


def code_grid(indices: Int[np.ndarray, "..."], side: int | None = None) -> Int[np.ndarray, "h w"]:
    """Returns indices [N], [h, w] or [h, w, levels] of one image as a grid, of the first level and the last scale.

    `side` is that of the last scale; None: [N] is one square grid.
    """
    if indices.ndim == 1:
        side = side or round(len(indices) ** 0.5)
        return indices[-side * side :].reshape(side, side)
    return indices if indices.ndim == 2 else indices[..., 0]


def enlarge(images: UInt8[np.ndarray, "*b H W 3"], side: int) -> UInt8[np.ndarray, "*b Y X 3"]:
    """Repeats pixels by the smallest whole factor that makes images at least `side` pixels high."""
    factor = -(-side // images.shape[-3])
    return images.repeat(factor, -3).repeat(factor, -2)


def reconstruction_grid(
    images: UInt8[np.ndarray, "B H W 3"],
    reconstructions: UInt8[np.ndarray, "B H W 3"],
    indices: Int[np.ndarray, "B ..."] | None,
    grid: int | None = None,
    columns: int = 2,
    show: Sequence[str] = ("input", "reconstruction", "codes"),
) -> UInt8[np.ndarray, "Y X 3"]:
    """Arranges `columns` examples per row: input | reconstruction | difference | code map, those of KINDS in `show`.

    `grid` is the side of the code grid, see `code_grid`; without `indices` there are no code maps.
    """
    factor = max(TILE // images.shape[1], 1)
    parts = zip(KINDS, (images, reconstructions, difference_map(images, reconstructions)), strict=False)
    parts = [part.repeat(factor, 1).repeat(factor, 2) for kind, part in parts if kind in show]
    if indices is not None and "codes" in show:
        parts.append(np.stack([code_map(code_grid(x, grid), images.shape[1] * factor) for x in indices]))
    examples = [_row(tiles) for tiles in zip(*parts, strict=True)]
    examples += [np.full_like(examples[0], BACKGROUND)] * (-len(examples) % columns)
    rows = [_row(examples[i : i + columns], 4 * GAP) for i in range(0, len(examples), columns)]
    space = np.full((GAP, rows[0].shape[1], 3), BACKGROUND, np.uint8)
    canvas = np.concatenate([part for row in rows for part in (row, space)])
    return np.pad(canvas, ((2 * GAP, GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=BACKGROUND)


def difference_map(
    images: UInt8[np.ndarray, "*b H W 3"], reconstructions: UInt8[np.ndarray, "*b H W 3"]
) -> UInt8[np.ndarray, "*b H W 3"]:
    """Returns the absolute difference per channel times GAIN, clipped to 255."""
    return np.minimum(np.abs(images.astype(np.int32) - reconstructions) * GAIN, 255).astype(np.uint8)


def mark_cells(
    image: UInt8[np.ndarray, "H W 3"], grid: int, boxes: Sequence[tuple[int, int, int, int]]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a copy with frames around boxes (top, left, bottom, right), the last two exclusive, of a grid's cells."""
    marked, (H, W) = image.copy(), image.shape[:2]
    for top, left, bottom, right in boxes:
        y0, x0, y1, x1 = (round(n * side / grid) for n, side in ((top, H), (left, W), (bottom, H), (right, W)))
        box = marked[y0:y1, x0:x1]
        for depth, color in enumerate((FRAME, FRAME, (255, 255, 255))):  # a white line inside, for dark images
            edge = box[depth : len(box) - depth, depth : box.shape[1] - depth]
            edge[:1] = edge[-1:] = edge[:, :1] = edge[:, -1:] = color
    return marked


def strip(tiles: Sequence[UInt8[np.ndarray, "h w 3"]], side: int) -> UInt8[np.ndarray, "S X 3"]:
    """Arranges small images of one size in a row, enlarged to at least `side` pixels."""
    return _row([enlarge(tile, side) for tile in tiles], gap=2 * GAP)


def histogram(heights: Shaped[np.ndarray, " n"], title: str, x_label: str) -> UInt8[np.ndarray, "Y X 3"]:
    """Plots values as filled steps; the scale is logarithmic if the largest exceeds 100 times the median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, (axes,) = _charts([title], x_label)
    edges = np.arange(len(heights) + 1)
    axes.fill_between(edges, np.append(heights, heights[-1]), step="post", color=COLORS[0], linewidth=0)
    if heights.max() > 100 * max(float(np.median(heights)), 1e-12):
        axes.set_yscale("symlog")
    axes.set_xlim(0, len(heights))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curves(charts: Mapping[str, Curves], format: str) -> bytes:
    """Returns a file (pdf, svg, png, jpg or webp) with one chart per title over steps; NaN leaves a gap."""
    figure, all_axes = _charts(list(charts), "step")
    for axes, lines in zip(all_axes, charts.values(), strict=True):
        for i, (label, (x, y)) in enumerate(lines.items()):
            markers = {"marker": "o", "markersize": 3} if len(x) < 12 else {}
            axes.plot(x, y, color=COLORS[i % len(COLORS)], linewidth=1.4, label=label, **markers)
        axes.grid(color="#e4e6ea", linewidth=0.6)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=format)
    return content.getvalue()


def _charts(titles: Sequence[str], x_label: str):
    """Returns a figure outside pyplot's global state, and its axes in up to three columns."""
    from matplotlib.figure import Figure

    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = Figure((CHART[0] * columns, CHART[1] * rows), dpi=DPI, layout="constrained")
    for i, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure, figure.axes


def _colors(indices: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Steps of the golden ratio around the hue circle keep neighboring indices apart; lightness varies too."""
    hue = (indices * 0.618033988749895) % 1.0
    lightness = 0.45 + 0.35 * ((indices * 0.754877666246693) % 1.0)
    phase = (hue[..., None] + np.array([0.0, 1 / 3, 2 / 3])) % 1.0
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
    return to_uint8(lightness[..., None] * (0.35 + 0.65 * wave) / 0.8)


def _row(tiles: Sequence[np.ndarray], gap: int = GAP) -> np.ndarray:
    space = np.full((len(tiles[0]), gap, 3), BACKGROUND, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, space)][:-1], axis=1)
