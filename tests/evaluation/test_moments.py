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


def of(rows, batch):
    moments = Moments()
    for i in range(0, len(rows), batch):
        moments.add(rows[i : i + batch])
    return moments


@pytest.mark.parametrize("batch", [1, 7, 256, 10_000])
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_any_split_equals_numpy(rows, batch, shards):
    total = Moments()
    for shard in range(shards):
        total.merge(Moments.of(of(rows[shard::shards], batch).arrays()))
    assert total.count == 10_000
    np.testing.assert_allclose(total.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(total.gaussian().covariance, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_rows_over_a_mesh_are_read_once_each(rows, mesh):
    """Also where devices along "model" hold the same ones."""
    data, model, slices = mesh
    where = sharding.over_data(sharding.make_mesh(data, model, slices=slices))
    moments = Moments()
    for batch in np.split(rows, 10):
        moments.add(sharding.own_rows(jax.device_put(batch, where)))
    assert moments.count == 10_000
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments.gaussian().covariance, expected, rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_empty_and_uneven_parts(sizes):
    parts = [np.random.default_rng(i).normal(size=(size, 3)) for i, size in enumerate(sizes)]
    moments = Moments()
    for part in parts:
        moments.add(part)
    np.testing.assert_allclose(moments.gaussian().covariance, np.cov(np.concatenate(parts), rowvar=False), atol=1e-12)
