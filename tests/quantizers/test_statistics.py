import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers.base import relative_error
from vqrae_jax.quantizers.statistics import code_counts, code_totals, gather_rows, one_hot_totals


@pytest.mark.parametrize("rows", [1, 8, 16, 96, 300, 4096])
def test_gather_rows_equals_indexing(rows):
    rng = np.random.default_rng(0)
    codebook, indices = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 40, rows)
    np.testing.assert_array_equal(jax.jit(gather_rows)(codebook, indices), codebook[indices])


def test_gathering_from_a_sharded_codebook_takes_little_memory(mesh):
    rows, split = (NamedSharding(mesh, P(axis)) for axis in ("data", "model"))
    rng = np.random.default_rng(0)
    codebook, indices = rng.normal(size=(64, 32)).astype(np.float32), rng.integers(0, 64, 16_384, np.int32)
    sharded = functools.partial(jax.jit, in_shardings=(split, rows), out_shardings=rows)
    program = sharded(gather_rows).lower(codebook, indices).compile()
    plain = sharded(lambda c, i: c[i]).lower(codebook, indices).compile()
    np.testing.assert_array_equal(program(*jax.device_put((codebook, indices), (split, rows))), codebook[indices])
    ours, theirs = (p.memory_analysis().temp_size_in_bytes for p in (program, plain))
    assert ours < theirs / 4


@pytest.mark.parametrize("block", [1, 7, 64, 256])
def test_statistics_equal_numpy(block, assert_close):
    rng = np.random.default_rng(0)
    z, indices, mask = rng.normal(size=(300, 5)).astype(np.float32), rng.integers(0, 50, 300), np.arange(300) % 3 > 0
    totals, counts = np.zeros((60, 5)), np.zeros(60, np.int32)
    np.add.at(totals, indices, z)
    np.add.at(counts, indices, mask)
    assert_close(jax.jit(code_totals, static_argnums=2)(z, indices, 60), totals, 1e-6)
    assert_close(one_hot_totals(z, indices, 60, block), totals, 1e-6)
    np.testing.assert_array_equal(code_counts(jnp.asarray(indices), 60, jnp.asarray(mask)), counts)


def test_the_quantization_error_is_relative_to_the_variance_of_the_latents():
    """One for an embedding at their mean, whatever their unit and origin; rows outside the mask do not count."""
    rng = np.random.default_rng(0)
    z, mask = rng.normal(size=(20, 3)).astype(np.float32), np.arange(20) < 15
    quantized = z + 0.1 * rng.normal(size=z.shape).astype(np.float32)
    expected = ((z - quantized)[:15] ** 2).mean() / z[:15].var(0).mean()
    assert relative_error(z, quantized, mask) == pytest.approx(expected, rel=1e-4)
    assert relative_error(50 * z + 7, 50 * quantized + 7, mask) == pytest.approx(expected, rel=1e-3)
    assert relative_error(z, np.broadcast_to(z[:15].mean(0), z.shape), mask) == pytest.approx(1, rel=1e-4)
