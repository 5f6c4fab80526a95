import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers.lookup import look_up


@pytest.mark.parametrize("rows", [1, 8, 16, 96, 300, 4096])
def test_gives_the_codes_of_the_indices(rows):
    rng = np.random.default_rng(0)
    codebook, indices = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 40, rows)
    np.testing.assert_array_equal(jax.jit(look_up)(codebook, indices), codebook[indices])


def test_a_codebook_over_devices_needs_no_second_copy_of_the_result():
    """4x2 devices: exact, and with a fraction of the temporaries of plain indexing."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, codes = (NamedSharding(mesh, P(axis)) for axis in ("data", "model"))
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(64, 32)).astype(np.float32)
    indices = rng.integers(0, 64, 16_384).astype(np.int32)
    sharded = functools.partial(jax.jit, in_shardings=(codes, rows), out_shardings=rows)
    program = sharded(look_up).lower(codebook, indices).compile()
    plain = sharded(lambda c, i: c[i]).lower(codebook, indices).compile()
    np.testing.assert_array_equal(program(*jax.device_put((codebook, indices), (codes, rows))), codebook[indices])
    ours, theirs = (p.memory_analysis().temp_size_in_bytes for p in (program, plain))
    assert ours < theirs / 4
