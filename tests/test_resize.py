"""Resampling equals PyTorch's."""

import numpy as np
import pytest

from vqrae_jax.resize import matrix, resize

CASES = ["bicubic_64_to_56", "bicubic_20x28_to_32x24", "bicubic_antialias_37_to_16", "bicubic_antialias_9_to_14",
         "bilinear_24_to_80", "bilinear_40_to_28"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(golden, assert_close, case):
    arrays = np.load(golden / "resize.npz")
    expected = arrays[f"{case}_out"]
    method = "bicubic_antialias" if "antialias" in case else case.split("_")[0]
    assert_close(resize(arrays[f"{case}_in"], *expected.shape[1:3], method), expected, 1e-4)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "bicubic_antialias"])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 3), (3, 7), (5, 5), (1, 4), (64, 63)])
def test_rows_sum_to_one_and_the_same_size_is_the_same_array(method, n_in, n_out):
    np.testing.assert_allclose(matrix(n_in, n_out, method).sum(1), 1, atol=1e-6)
    x = np.ones((1, n_in, n_out, 2), np.float32)
    assert resize(x, n_in, n_out, method) is x
