"""The generator of codes: what it takes, what it gives, and that it runs over any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.models.generator import Generator
from vqrae_jax.models.vit import BlocksConfig

K, N, CLASSES = 24, 9, 3
BLOCKS = BlocksConfig(32, 2, 4, 64, scan=True)


@pytest.fixture(scope="module")
def model():
    return Generator(BLOCKS, K, N, CLASSES)


@pytest.fixture(scope="module")
def codes():
    return jax.random.randint(jax.random.key(1), (8, N), 0, K + 1)


@pytest.fixture(scope="module")
def variables(model, codes):
    return jax.jit(model.init)(jax.random.key(0), codes)


def test_logits_of_every_code(model, variables, codes):
    logits = model.apply(variables, codes, jnp.arange(8) % CLASSES)
    assert logits.shape == (8, N, K)
    assert logits.dtype == jnp.float32


def test_no_label_is_any_class(model, variables, codes):
    anything = model.apply(variables, codes)
    np.testing.assert_array_equal(anything, model.apply(variables, codes, jnp.full(8, CLASSES)))
    assert np.abs(anything - model.apply(variables, codes, jnp.zeros(8, int))).max() > 1e-3


def test_without_classes(codes):
    model = Generator(BLOCKS, K, N)
    variables = jax.jit(model.init)(jax.random.key(0), codes)
    assert "class_embed" not in variables["params"]
    assert model.apply(variables, codes).shape == (8, N, K)


def test_a_hidden_code_is_told_from_every_other(model, variables, codes):
    found = [model.apply(variables, codes.at[:, 0].set(code))[:, 1:] for code in (0, K - 1, K)]
    assert min(np.abs(a - b).max() for a, b in zip(found, found[1:] + found[:1], strict=True)) > 1e-3


def test_bfloat16_has_float32_logits(variables, codes):
    half = Generator(BlocksConfig(32, 2, 4, 64, scan=True, dtype="bfloat16"), K, N, CLASSES)
    exact = Generator(BLOCKS, K, N, CLASSES).apply(variables, codes)
    found = half.apply(variables, codes)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.03 * float(jnp.abs(exact).max()))


def test_a_grid_is_refused(model, variables):
    with pytest.raises(ValueError, match=r"codes \(2, 3, 3\): \[B, 9\] is expected"):
        model.apply(variables, jnp.zeros((2, 3, 3), int))


@pytest.mark.parametrize("model_axis", [1, 2, 8])
def test_over_a_mesh(model, variables, codes, model_axis):
    mesh = sharding.make_mesh(model=model_axis)
    assert not sharding.unmatched(variables)
    placed = jax.device_put(variables, sharding.shardings(variables, mesh))
    if model_axis > 1:
        assert placed["params"]["code_embed"].sharding.spec[0] == "model"
    found = jax.jit(model.apply)(placed, jax.device_put(codes, sharding.over_data(mesh)))
    np.testing.assert_allclose(found, model.apply(variables, codes), atol=1e-5)
