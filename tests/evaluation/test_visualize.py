import numpy as np

from vqrae_jax.evaluation import visualize as pictures


def test_a_code_has_one_colour_and_another_code_another():
    codes = np.arange(16).reshape(4, 4)
    drawn = pictures.code_map(codes, 32)
    assert drawn.shape == (32, 32, 3)
    tiles = drawn[::8, ::8].reshape(16, 3)
    assert len(np.unique(tiles, axis=0)) == 16
    np.testing.assert_array_equal(pictures.code_map(np.full((1, 1), 5), 8)[0, 0], tiles[5])


def test_a_grid_that_does_not_divide_the_picture_is_centred():
    assert pictures.code_map(np.zeros((5, 5), int), 32).shape == (32, 32, 3)
    assert pictures.code_map(np.zeros((64, 64), int), 32).shape == (32, 32, 3)


def test_bytes_are_rounded_and_clipped():
    np.testing.assert_array_equal(pictures.to_uint8(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])), [0, 0, 128, 255, 255])


def test_grid_of_tokens_and_of_several_levels():
    images = np.zeros((3, 16, 16, 3), np.uint8)
    flat = pictures.reconstruction_grid(images, images, np.zeros((3, 16), int))
    deep = pictures.reconstruction_grid(images, images, np.zeros((3, 4, 4, 2), int))
    np.testing.assert_array_equal(flat, deep)
    assert pictures.reconstruction_grid(images, images, None).shape[1] < flat.shape[1]


def test_differences_are_enlarged_and_clipped():
    image, painted = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 90, np.uint8)
    painted[0, 0, 0] = 250
    difference = pictures.difference_map(image, painted)
    assert difference[0, 1, 1].tolist() == [10 * pictures.GAIN] * 3
    assert difference[0, 0, 0].tolist() == [255] * 3
    np.testing.assert_array_equal(difference, pictures.difference_map(painted, image))


def test_a_mark_frames_its_cells_and_nothing_else():
    image = np.zeros((32, 32, 3), np.uint8)
    marked = pictures.mark(image, 4, [(1, 2, 2, 4)])
    assert not image.any()
    inside = np.zeros((32, 32), bool)
    inside[8:16, 16:32] = True
    assert not marked[~inside].any()
    assert (marked[8, 16:32] == pictures.FRAME).all()
    assert not marked[12, 24].any()


def test_tiles_keep_their_pixels():
    tiles = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    assert pictures.tiled(tiles, 3).shape[0] == 2 * (2 + pictures.GAP) + 3 * pictures.GAP
    line = pictures.strip(list(tiles), 5)
    assert line.shape[0] == 6
    np.testing.assert_array_equal(line[::3, :6:3], tiles[0])


def test_charts_show_their_values():
    flat = pictures.curves({"a": {"x": ([0, 1], [1.0, 1.0])}})
    steep = pictures.curves({"a": {"x": ([0, 1], [0.0, 1.0])}})
    assert flat.shape == steep.shape
    assert (flat != steep).any()
    assert pictures.curves({"a": {"x": ([0, 1, 2], [0.0, float("nan"), 1.0])}, "b": {}}).shape[1] > flat.shape[1]
    assert (pictures.histogram(np.arange(4), "t", "x") != pictures.histogram(np.arange(4)[::-1], "t", "x")).any()
