import numpy as np
import pytest

from vqrae_jax.data.images import read_image
from vqrae_jax.evaluation import visualize


def test_code_maps_have_the_mean_color_of_each_index():
    """Equal indices have equal colors, in all images; other indices of any size have their own."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    indices = np.arange(32).reshape(2, 4, 4) * 10**6
    indices[1, 2, 3] = indices[0, 0, 1]
    maps = visualize.code_maps(indices, images)
    assert maps.shape == images.shape
    np.testing.assert_array_equal(maps[1, 16, 24], maps[0, 0, 8])
    patches = np.stack([images[0, :8, 8:16], images[1, 16:24, 24:]])
    np.testing.assert_allclose(maps[0, 0, 8], patches.mean((0, 1, 2)), atol=0.5)
    np.testing.assert_allclose(maps[1, 0, 0], images[1, :8, :8].mean((0, 1)), atol=0.5)
    assert (maps[:, 7::8] == visualize.BACKGROUND).all()
    finest = np.concatenate([np.ones((2, 5), int), indices.reshape(2, 16)], axis=1)  # of several scales
    np.testing.assert_array_equal(visualize.code_maps(finest, images, 4), maps)
    rows = np.stack([indices.reshape(2, 16), np.zeros((2, 16), int)], axis=-1)  # with a second level
    np.testing.assert_array_equal(visualize.code_maps(rows, images, 4), maps)


def test_grids_have_code_maps_of_tokens_and_of_several_levels_and_keep_pixels():
    images = np.zeros((3, 16, 16, 3), np.uint8)
    flat = visualize.reconstruction_grid(images, images, np.zeros((3, 16), int))
    levels = visualize.reconstruction_grid(images, images, np.zeros((3, 4, 4, 2), int))
    np.testing.assert_array_equal(flat, levels)
    assert visualize.reconstruction_grid(images, images, None).shape[1] < flat.shape[1]
    one = visualize.reconstruction_grid(images[:1], images[:1], None, show=("input", "difference"))
    height, width = visualize.TILE, 2 * visualize.TILE + visualize.GAP + 2 * visualize.MARGIN
    assert one.shape[1] == width
    assert not one[-visualize.MARGIN - height : -visualize.MARGIN, visualize.MARGIN : -visualize.MARGIN].min()
    title = one[: -visualize.MARGIN - height]
    for start in (0, width // 2):
        assert title[:, start : start + width // 2].min() < 100, "every column has a title"
    tiles = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    line = visualize.strip(list(tiles), 5)
    assert line.shape[0] == 6
    np.testing.assert_array_equal(line[::3, :6:3], tiles[0])


def test_differences_are_amplified_and_bytes_are_rounded_and_clipped():
    np.testing.assert_array_equal(visualize.to_uint8(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])), [0, 0, 128, 255, 255])
    image, reconstruction = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 90, np.uint8)
    reconstruction[0, 0, 0] = 250
    difference = visualize.difference_map(image, reconstruction)
    assert difference[0, 1, 1].tolist() == [10 * visualize.GAIN] * 3
    assert difference[0, 0, 0].tolist() == [255] * 3
    np.testing.assert_array_equal(difference, visualize.difference_map(reconstruction, image))


# One code, two levels, rows of two levels, a 2 x 2 and a 4 x 4 grid.
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (16, 2), (20,)])
def test_steps_of_sampling_are_the_image_where_codes_are_visible_and_gray_elsewhere(shape):
    final = np.random.default_rng(0).integers(0, 9, shape)
    history, image = np.stack([final] * 10), np.arange(8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3) / 255
    count = 4 if shape == (16, 2) else 1  # positions of a row
    history[:9].reshape(9, *shape)[:, -2 * count :] = 9  # two rows, or the last two positions
    history[-2, -count:] = final[-count:]
    decoded = []

    def decode(codes):
        decoded.append(codes)
        return np.stack([image] * len(codes))

    picture = visualize.sampling_steps(history, 9, decode, 4, columns=3)
    np.testing.assert_array_equal(decoded[0], np.stack([final] * 3))  # never a hidden code
    side, margin = visualize.TILE, visualize.MARGIN
    first, last = (
        picture[margin : margin + side, margin : margin + side],
        picture[margin : margin + side, -margin - side : -margin],
    )
    np.testing.assert_array_equal(last[::20, ::20], np.round(image * 255))
    gray = (first == visualize.HIDDEN).all(-1)[::40, ::40]
    hidden = [[0] * 4] * 2 + [[1] * 4] * 2 if len(shape) > 1 else [[0] * 4] * 3 + [[0, 0, 1, 1]]
    np.testing.assert_array_equal(gray, np.array(hidden, bool))


def test_cells_are_covered_by_their_share():
    covered = visualize.cover_cells(np.zeros((1, 4, 4, 3), np.uint8), np.array([[[0.0, 0.5], [1.0, 0.0]]]))
    np.testing.assert_array_equal(covered[0, ::2, ::2, 0], [[0, visualize.HIDDEN // 2], [visualize.HIDDEN, 0]])


def test_marked_cells_have_a_frame_and_nothing_else_changes():
    image = np.zeros((32, 32, 3), np.uint8)
    marked = visualize.mark_cells(image, 4, [(1, 2, 2, 4)])
    assert not image.any()
    inside = np.zeros((32, 32), bool)
    inside[8:16, 16:32] = True
    assert not marked[~inside].any()
    assert (marked[8, 16:32] == visualize.FRAME).all()
    assert not marked[12, 24].any()


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "pdf", "svg"])
def test_curves_show_their_values(format):
    flat, steep = (visualize.curves({"a": {"x": ([0, 1], y)}}, format) for y in ([1.0, 1.0], [0.0, 1.0]))
    assert flat != steep


def test_curves_have_one_color_per_run_in_all_panels_and_a_legend_inside():
    """A value that is not finite is a gap, and a run without a metric keeps its color in the other panels."""
    x, y = [0, 1, 2], [1.0, float("nan"), 100.0]
    panels = {"a": {"first": (x, y), "x" * 70: (x, y)}, "b": {"x" * 70: (x, y)}}
    image = read_image(visualize.curves(panels, "png", {"a": "%"}))
    assert image.shape[1] == 2 * round(visualize.CHART[0] * visualize.DPI)
    blue, orange = ((np.abs(image - np.array(rgb, int)).sum(-1) < 40) for rgb in ((60, 90, 160), (209, 96, 61)))
    middle = image.shape[1] // 2
    assert blue[:, :middle].any()
    assert not blue[:, middle:].any()
    assert orange[:, middle:].any()
    edges = (image[0], image[-1], image[:, 0], image[:, -1])
    assert all((edge == 255).all() for edge in edges), "the legend is cut off"


def test_rates_are_marked_on_a_logarithmic_scale():
    """Curves without markers, and marks that need not lie on them; a run may have no marks."""
    line = {"a": {"first": ([256, 512, 1024], [1.0, 2.0, 3.0])}}
    marked, bare = (
        read_image(visualize.curves(line, "png", None, {"a": {"first": points}}))
        for points in (([512], [1.5]), ([], []))
    )
    blue = [(np.abs(image - np.array((60, 90, 160), int)).sum(-1) < 40).sum() for image in (marked, bare)]
    assert blue[0] > blue[1] + 20


def test_charts_show_their_values():
    rising, falling = (visualize.histogram(heights, "t", "x") for heights in (np.arange(4), np.arange(4)[::-1]))
    assert (rising != falling).any()
    colors = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    points = visualize.scatter(np.arange(6.0).reshape(3, 2), colors, np.array([5.0, 1.0]), "t", ("x", "y"))
    assert (points == (255, 0, 0)).all(-1).sum() > (points == (0, 0, 255)).all(-1).sum() > 0
    low, high = (visualize.heat_map(np.eye(2) * scale, "t", "bits") for scale in (1, 2))
    assert (low != high).any()
