"""Streaming moments against numpy, for any split into batches and processes."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqrae_jax import sharding
from vqrae_jax.evaluation.moments import Moments


@pytest.fixture(scope="module")
def rows():
    """10,000 correlated rows, far from zero."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(10_000, 12)) @ rng.normal(size=(12, 12)) + 100).astype(np.float32)


def moments_of(batches, diagonal=False):
    moments = Moments(diagonal)
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize(("batch", "shards"), [(1, 3), (7, 8), (256, 1), (256, 3), (10_000, 1)])
def test_any_split_equals_numpy(rows, batch, shards):
    total = Moments()
    for shard in (rows[i::shards] for i in range(shards)):
        total.merge_arrays(moments_of(shard[i : i + batch] for i in range(0, len(shard), batch)).arrays())
    assert total.count == 10_000
    np.testing.assert_allclose(total.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(total.gaussian().covariance, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_rows_on_a_mesh_are_read_once_each(rows, mesh):
    """Devices along "model" hold the same rows."""
    placement = sharding.over_data(sharding.make_mesh(*mesh[:2], slices=mesh[2]))
    moments = moments_of(sharding.own_rows(jax.device_put(batch, placement)) for batch in np.split(rows, 10))
    assert moments.count == 10_000
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments.gaussian().covariance, expected, rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_empty_and_uneven_parts(sizes):
    parts = [np.random.default_rng(i).normal(size=(size, 3)) for i, size in enumerate(sizes)]
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments_of(parts).gaussian().covariance, np.cov(rows, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(moments_of(parts, diagonal=True).products, rows.var(0) * len(rows), atol=1e-12)
