import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import FSQ

CASES = {"fsq_8555": (8, 5, 5, 5), "fsq_34": (3, 4)}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_pytorch(golden, assert_close, case):
    arrays = np.load(golden / "quantizers" / f"{case}.npz")
    module = FSQ(CASES[case], len(CASES[case]), adapter="none")
    apply = jax.jit(lambda z: module.apply({}, z))
    out = apply(arrays["z"])
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    np.testing.assert_array_equal(out.z, arrays["quantized"])
    assert_close(out.loss, arrays["loss"], 1e-5)
    grid = apply(jnp.moveaxis(arrays["z_2d"], 1, -1))
    np.testing.assert_array_equal(grid.indices, arrays["indices_2d"])
    np.testing.assert_array_equal(jnp.moveaxis(grid.z, -1, 1), arrays["quantized_2d"])
    z = jnp.asarray(arrays["z"])
    assert_close(jax.grad(lambda z: apply(z).loss)(z), arrays["grad_dz_loss"], 1e-5)
    through = jax.grad(lambda z: jnp.sum(apply(z).z * arrays["fixed_random"]))(z)
    assert_close(through, arrays["grad_dz_straight_through"], 1e-5)
    # Ties go to the even index.
    out = apply(arrays["tie_z"])
    np.testing.assert_array_equal(out.indices, arrays["tie_indices"])
    np.testing.assert_array_equal(out.z, arrays["tie_quantized"])
    points = module.apply({}, jnp.arange(module.num_embeddings), method="lookup")
    np.testing.assert_array_equal(points, arrays["codebook"])


@pytest.mark.parametrize("levels", [(7, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in ((2,), (4, 4, 3)))])
def test_every_grid_point_is_a_fixed_point(levels):
    module = FSQ(levels, len(levels), adapter="none")
    points = np.asarray(list(itertools.product(*[np.arange(n) - (n - 1) / 2 for n in levels])), np.float32)
    out = module.apply({}, points / ((np.asarray(levels) - 1) / 2))
    np.testing.assert_array_equal(out.indices, np.arange(module.num_embeddings))
    np.testing.assert_array_equal(out.z, points)


def test_the_linear_adapter_reaches_every_level():
    module = FSQ((5, 4), 2, adapter="linear")
    z = np.random.default_rng(0).normal(size=(512, 2)).astype(np.float32) * 3
    variables = jax.jit(module.init)(jax.random.key(0), z)
    eye = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    out = module.apply({"params": {"reduce": eye, "expand": eye}}, z)
    assert np.count_nonzero(out.metrics["counts"]) == 20
    assert jax.tree.structure(variables["params"]) == jax.tree.structure({"reduce": eye, "expand": eye})


def test_near_codes_differ_by_one_level():
    module, indices = FSQ((5, 4), 2, adapter="none"), jnp.arange(20)
    points = module.apply({}, indices, method="lookup")
    for seed in range(5):
        others = module.apply({}, indices, jax.random.key(seed), 2, method="change_indices")  # a corner has two
        gaps = np.abs(module.apply({}, others, method="lookup") - points).sum(1)
        np.testing.assert_array_equal(gaps, 1)


@pytest.mark.parametrize("levels", [(), (1, 4)])
def test_invalid_levels_are_errors(levels):
    with pytest.raises(ConfigError) as error:
        FSQ(levels, len(levels), adapter="none")
    assert error.value.field == "levels"
