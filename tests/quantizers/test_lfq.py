import jax
import numpy as np
import pytest

from vqrae_jax.quantizers import LFQ


@pytest.mark.parametrize(
    ("neighbors", "bits"), [(1, {1}), (6, {1}), (21, {1, 2}), (22, {1, 2, 3}), (1000, set(range(1, 7)))]
)
def test_near_codes_differ_in_few_bits(neighbors, bits):
    """Of six bits, 6 codes differ in one, 15 in two; the distance of corners is the number of different signs."""
    indices = np.arange(2000) % 64
    others = LFQ(64).apply({}, indices, jax.random.key(0), neighbors, method="change_indices")
    assert set(np.bitwise_count(indices ^ np.asarray(others)).tolist()) == bits
    assert len(set((indices ^ np.asarray(others)).tolist())) == min(neighbors, 63)
