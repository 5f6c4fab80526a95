"""Images and charts of a tokenizer, as uint8 arrays."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from vqrae_jax.data import images as image_files
from vqrae_jax.errors import import_extra

GAP, EXAMPLE_GAP, MARGIN = 4, 20, 12  # pixels between images, between examples, and around all
TILE = 160  # smaller images are enlarged to at least this side
BACKGROUND = 255
GAIN = 4  # factor by which difference maps are amplified
KINDS = ("input", "reconstruction", "difference", "codes")  # images of one example, in this order
TITLES = {"difference": f"difference x {GAIN}"}  # of columns that are not called as in KINDS

Curve = tuple[Sequence[float | int], Sequence[float | int]]  # x and y
CHART, DPI = (4.2, 2.8), 110  # inches of one chart, and pixels of an inch
COLORS = ("#3c5aa0", "#d1603d", "#4b8f4b", "#8a5fa8", "#b08a2e", "#5b6770")
STYLES = ("-", "--", ":")  # of more runs than colors
FRAME = (209, 96, 61)
HIDDEN = 200  # gray of hidden codes


def to_uint8(images: Float[np.ndarray, "*b"]) -> UInt8[np.ndarray, "*b"]:
    """Converts floats in [0, 1] to bytes, rounded; values outside are clipped."""
    return (np.clip(np.asarray(images, np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def code_maps(
    indices: Int[np.ndarray, "B ..."], images: UInt8[np.ndarray, "B H W 3"], grid: int | None = None
) -> UInt8[np.ndarray, "B H W 3"]:
    """Renders the indices of images as mosaics, in which all positions with the same index have the same color.

    The color of an index is the mean of `images` over all positions that have it. Only indices that occur matter, so
    codebooks may be of any size, and with reconstructions it is the color that the code decodes to.

    Args:
      indices: of each image, see `code_grid`.
      images: reconstructions, or the images that were encoded; their sides are multiples of the grid's.
      grid: side of the grid, see `code_grid`.
    """
    grids = np.stack([code_grid(x, grid) for x in indices])
    colors = code_colors(grids, images)[np.unique(grids, return_inverse=True)[1]]
    side = images.shape[1] // grids.shape[1]
    tiles = colors.repeat(side, 1).repeat(side, 2)
    if side >= 4:  # lines distinguish maps from images
        tiles[:, side - 1 :: side] = tiles[:, :, side - 1 :: side] = BACKGROUND
    return tiles


def code_colors(grids: Int[np.ndarray, "B h w"], images: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "used 3"]:
    """Returns the mean color of the patches of each index that occurs, in rising order of the indices."""
    B, h, w = grids.shape
    patches = images.reshape(B, h, images.shape[1] // h, w, images.shape[2] // w, 3).mean((2, 4)).reshape(-1, 3)
    _, number, counts = np.unique(grids.ravel(), return_inverse=True, return_counts=True)
    sums = [np.bincount(number, channel) for channel in patches.T]
    return (np.stack(sums, axis=1) / counts[:, None] + 0.5).astype(np.uint8)


def code_grid(indices: Int[np.ndarray, "..."], side: int | None = None) -> Int[np.ndarray, "h w"]:
    """Returns indices [N], [N, levels], [h, w] or [h, w, levels] of one image as a grid.

    It is that of the first level and the last scale. `side` is that of the last scale; None: [N] is one square grid.
    """
    indices = indices[..., 0] if has_levels(indices.shape, side) else indices
    if indices.ndim == 1:
        side = side or round(len(indices) ** 0.5)
        return indices[-side * side :].reshape(side, side)
    return indices


def has_levels(shape: Sequence[int], side: int | None) -> bool:
    """Returns whether the last axis of an image's indices has levels: [h, w, levels], or [side * side, levels]."""
    rows = bool(side) and len(shape) == 2 and shape[0] == side**2 != side
    return rows or len(shape) == 3


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
    """Arranges `columns` examples per row, each with titled columns: those of KINDS in `show`.

    `grid` is the side of the code grid, see `code_grid`; without `indices`, or with grid=0, there are no code maps.
    """
    parts = dict(zip(KINDS, (images, reconstructions, difference_map(images, reconstructions)), strict=False))
    parts = {kind: enlarge(part, TILE) for kind, part in parts.items()}
    if indices is not None and grid != 0:
        parts["codes"] = code_maps(indices, parts["reconstruction"], grid)
    kinds, columns = [kind for kind in KINDS if kind in parts and kind in show], min(columns, len(images))
    examples = [_row(tiles) for tiles in zip(*(parts[kind] for kind in kinds), strict=True)]
    examples += [np.full_like(examples[0], BACKGROUND)] * (-len(examples) % columns)
    rows = [_row(examples[i : i + columns], EXAMPLE_GAP) for i in range(0, len(examples), columns)]
    side, size = parts["input"].shape[2], max(parts["input"].shape[2] // 16, 13)
    starts = np.arange(columns)[:, None] * (examples[0].shape[1] + EXAMPLE_GAP) + np.arange(len(kinds)) * (side + GAP)
    titles = np.full((round(1.5 * size), rows[0].shape[1], 3), BACKGROUND, np.uint8)
    labels = [(int(x), 0, TITLES.get(kind, kind)) for row in starts for x, kind in zip(row, kinds, strict=True)]
    canvas = _column([image_files.write_text(titles, labels, size), _column(rows)], 0)
    return np.pad(canvas, ((MARGIN // 2, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=BACKGROUND)


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


def cover_cells(
    images: UInt8[np.ndarray, "B H W 3"], shares: Shaped[np.ndarray, "B h w"]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Blends the cells of a grid with gray, each by its share from 0 to 1."""
    side = images.shape[1] // shares.shape[1]
    gray = shares.astype(np.float32).repeat(side, 1).repeat(side, 2)[..., None]
    return (images * (1 - gray) + HIDDEN * gray + 0.5).astype(np.uint8)


def sampling_steps(
    history: Int[np.ndarray, "S ..."],
    num_embeddings: int,
    decode: Callable[[np.ndarray], np.ndarray],
    grid: int,
    columns: int = 6,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Shows how codes of one image become visible; with `columns` of the steps, evenly spaced up to the last.

    Hidden codes are gray: a position with several levels by the share of them that is hidden, and of several scales the
    last. A decoder needs all codes, so that it gets those of the last step for hidden ones.

    Args:
      history: codes after each step, `num_embeddings` where hidden.
      decode: returns images [n, H, W, 3] in [0, 1] of codes.
      grid: side of the grid, see `code_grid`; 0: codes have no positions, and nothing is gray.
    """
    steps = np.unique(np.linspace(0, len(history) - 1, columns).round().astype(int))
    hidden = history[steps] == num_embeddings
    images = enlarge(to_uint8(decode(np.where(hidden, history[-1], history[steps]))), TILE)
    several = has_levels(hidden.shape[1:], grid)
    counts, levels = (hidden.sum(-1), hidden.shape[-1]) if several else (hidden.astype(np.int32), 1)
    covered = cover_cells(images, np.stack([code_grid(x, grid) for x in counts]) / levels) if grid else images
    return sample_grid(covered, [f"step {i + 1} of {len(history)}" for i in steps], len(steps))


def strip(tiles: Sequence[UInt8[np.ndarray, "h w 3"]], side: int) -> UInt8[np.ndarray, "S X 3"]:
    """Arranges small images of one size in a row, enlarged to at least `side` pixels."""
    return _row([enlarge(tile, side) for tile in tiles])


def sample_grid(
    images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str] | None = None, columns: int | None = None
) -> UInt8[np.ndarray, "Y X 3"]:
    """Arranges images in rows of `columns` (by default a wide rectangle), each above its caption."""
    tiles = enlarge(images, TILE)
    if captions is not None:
        size = max(tiles.shape[2] // 13, 13)
        labels = np.full((len(tiles), round(1.5 * size), tiles.shape[2], 3), BACKGROUND, np.uint8)
        below = [image_files.write_text(x, [(0, 1, text)], size) for x, text in zip(labels, captions, strict=True)]
        tiles = np.concatenate([tiles, np.stack(below)], axis=1)
    columns = columns or max(n for n in range(1, len(tiles) + 1) if n * n <= 2 * len(tiles))
    blank = [np.full_like(tiles[0], BACKGROUND)] * (-len(tiles) % columns)
    rows = [*tiles, *blank]
    canvas = _column([_row(rows[i : i + columns]) for i in range(0, len(rows), columns)])
    return np.pad(canvas, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=BACKGROUND)


def histogram(heights: Shaped[np.ndarray, " n"], title: str, x_label: str) -> UInt8[np.ndarray, "Y X 3"]:
    """Plots values as filled steps; the scale is logarithmic if the largest exceeds 100 times the median."""
    figure, (axes,) = _charts([title], x_label, "times")
    edges = np.arange(len(heights) + 1)
    axes.fill_between(edges, np.append(heights, heights[-1]), step="post", color=COLORS[0], linewidth=0)
    if heights.max() > 100 * max(float(np.median(heights)), 1e-12):
        axes.set_yscale("symlog")
    axes.set_xlim(0, len(heights))
    axes.set_ylim(0)
    return _pixels(figure)


def scatter(
    points: Float[np.ndarray, "n 2"],
    colors: UInt8[np.ndarray, "used 3"],
    areas: Float[np.ndarray, " used"],
    title: str,
    labels: tuple[str, str],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Plots the first points as discs with colors and areas (the largest first), and the remaining ones in gray."""
    figure, (axes,) = _charts([title], *labels, size=(5.6, 5.0))
    size = 3 if len(points) < 5000 else 1
    axes.plot(*points[len(areas) :].T, linestyle="", marker="x", markersize=size, color="#c3c8cf", zorder=0)
    order, scale = np.argsort(-areas, kind="stable"), min(1, 600 / max(len(areas), 1))  # room for all discs
    areas = scale * (8 + 200 * areas[order] / max(areas.max(), 1e-12))
    axes.scatter(*points[order].T, areas, colors[order] / 255, edgecolors="#223", linewidths=0.3 * scale)
    return _pixels(figure)


def heat_map(values: Float[np.ndarray, "h w"], title: str, label: str) -> UInt8[np.ndarray, "Y X 3"]:
    """Plots a grid of numbers as colors, with their scale."""
    figure, (axes,) = _charts([title], "column", "row", size=(5.0, 4.0))
    bar = figure.colorbar(axes.imshow(values, cmap="viridis")).ax
    bar.set_ylabel(label, fontsize=8)
    bar.tick_params(labelsize=7)
    return _pixels(figure)


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    format: str,
    units: Mapping[str, str] | None = None,
    rates: Mapping[str, Mapping[str, Curve]] | None = None,
    x_label: str = "step",
) -> bytes:
    """Returns a file (pdf, svg, png, jpg or webp) with one panel per metric over steps; NaN leaves a gap.

    Args:
      panels: {metric: {run: curve}}; a run has the same color in all panels, and the legend names it.
      format: suffix of the file.
      units: of metrics that have one, for the y axis; "%" shows shares. The scale of other metrics is logarithmic if
        they are positive and span a wide range.
      rates: points to mark, as `panels`; all x are then bits per image, on a logarithmic scale.
    """
    figure, all_axes = _charts(list(panels), x_label if rates is None else "bits per image")
    runs = list(dict.fromkeys(run for lines in panels.values() for run in lines))
    legend = {}
    for axes, (metric, lines) in zip(all_axes, panels.items(), strict=True):
        for run, (x, y) in lines.items():
            cycle, color = divmod(runs.index(run), len(COLORS))
            marker = {"marker": "o", "markersize": 3} if rates is None and len(x) < 12 else {}
            style = STYLES[cycle % len(STYLES)]
            (legend[run],) = axes.plot(x, y, linestyle=style, color=COLORS[color], linewidth=1.4, **marker)
            if rates is not None:
                axes.plot(*rates[metric][run], linestyle="", color=COLORS[color], marker="o", markersize=4)
        _scale(axes, np.concatenate([np.empty(0), *(y for _, y in lines.values())]), (units or {}).get(metric))
        if rates is not None:
            axes.set_xscale("log", base=2)
            axes.autoscale(axis="x")
            axes.xaxis.set_major_formatter("{x:,.0f}")
    columns = max(int(figure.get_figwidth() * 12 / (max(map(len, runs), default=0) + 6)), 1)
    figure.legend(legend.values(), legend, loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=DPI if rates is None else 2 * DPI)
    return content.getvalue()


def _scale(axes: Any, values: Float[np.ndarray, " n"], unit: str | None) -> None:
    """Sets the scales of a panel of curves."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    values = values[np.isfinite(values)]
    axes.grid(color="#e4e6ea", linewidth=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    if unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1.02)
    elif unit is None and len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    elif len(values) and 0 <= values.min() < values.max() / 2:
        axes.set_ylim(bottom=0)
    if axes.get_yscale() == "linear":
        axes.locator_params(axis="y", nbins=6)
    axes.set_ylabel("" if unit in (None, "%") else unit, fontsize=8)


def _charts(titles: Sequence[str], x_label: str, y_label: str = "", size: tuple[float, float] = CHART) -> Any:
    """Returns a figure outside pyplot's global state, and its axes in up to three columns."""
    with import_extra("train", "plotting"):
        from matplotlib.figure import Figure

    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = Figure((size[0] * columns, size[1] * rows), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for i, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(title, fontsize=9.5, fontweight="bold", loc="left")
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure, figure.axes


def _pixels(figure: Any) -> UInt8[np.ndarray, "Y X 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _row(tiles: Sequence[np.ndarray], gap: int = GAP) -> np.ndarray:
    space = np.full((len(tiles[0]), gap, 3), BACKGROUND, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, space)][:-1], axis=1)


def _column(tiles: Sequence[np.ndarray], gap: int = GAP) -> np.ndarray:
    return _row([tile.swapaxes(0, 1) for tile in tiles], gap).swapaxes(0, 1)
