import numpy as np

from vqrae_jax.losses.pixel import LOSSES


def test_l1_and_l2():
    a, b = np.zeros((1, 2, 2, 3), np.float32), np.full((1, 2, 2, 3), 0.5, np.float32)
    assert LOSSES["l1"](a, b) == 0.5
    assert LOSSES["l2"](a, b) == 0.25
