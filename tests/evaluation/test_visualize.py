import numpy as np
import pytest

from vqrae_jax.data.images import read_image
from vqrae_jax.evaluation import visualize


def test_each_index_has_its_own_color():
    colored = visualize.code_map(np.arange(16).reshape(4, 4), 32)
    assert colored.shape == (32, 32, 3)
    tiles = colored[::8, ::8].reshape(16, 3)
    assert len(np.unique(tiles, axis=0)) == 16
    np.testing.assert_array_equal(visualize.code_map(np.full((1, 1), 5), 8)[0, 0], tiles[5])
    for side in (5, 64):  # grids that do not divide the image
        assert visualize.code_map(np.zeros((side, side), int), 32).shape == (32, 32, 3)


def test_grids_have_code_maps_of_tokens_and_of_several_levels_and_keep_pixels():
    images = np.zeros((3, 16, 16, 3), np.uint8)
    flat = visualize.reconstruction_grid(images, images, np.zeros((3, 16), int))
    levels = visualize.reconstruction_grid(images, images, np.zeros((3, 4, 4, 2), int))
    np.testing.assert_array_equal(flat, levels)
    assert visualize.reconstruction_grid(images, images, None).shape[1] < flat.shape[1]
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


def test_charts_leave_gaps_and_histograms_show_their_values():
    """A value that is not finite is a gap; a chart without values keeps its place."""
    one, two = ({"a": {"x": ([0, 1, 2], [0.0, float("nan"), 1.0])}, **more} for more in ({}, {"b": {}}))
    widths = [read_image(visualize.curves(charts, "png")).shape[1] for charts in (one, two)]
    assert widths[1] == 2 * widths[0]
    rising, falling = (visualize.histogram(heights, "t", "x") for heights in (np.arange(4), np.arange(4)[::-1]))
    assert (rising != falling).any()
