"""The generator's inputs and outputs, and equal logits over any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.models.generator import Generator
from vqrae_jax.models.vit import BlocksConfig

K, N, CLASSES = 24, 9, 3
BLOCKS = BlocksConfig(32, 2, 4, 64)
MODEL = Generator(BLOCKS, K, N, CLASSES)
apply = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def indices():
    return jax.random.randint(jax.random.key(1), (8, N), 0, K + 1)


@pytest.fixture(scope="module")
def variables(indices):
    return jax.jit(MODEL.init)(jax.random.key(0), indices)


@pytest.fixture(scope="module")
def logits(variables, indices):
    return apply(variables, indices)


def test_no_label_is_the_unconditional_label_and_classes_are_optional(variables, indices, logits):
    assert logits.shape == (8, N, K)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, apply(variables, indices, jnp.full(8, CLASSES)))
    assert np.abs(logits - apply(variables, indices, jnp.zeros(8, int))).max() > 1e-3
    model = Generator(BLOCKS, K, N)
    variables = jax.jit(model.init)(jax.random.key(0), indices)
    assert "class_embed" not in variables["params"]
    assert jax.eval_shape(model.apply, variables, indices).shape == (8, N, K)


def test_a_hidden_index_differs_from_every_other(variables, indices):
    logits = [apply(variables, indices.at[:, 0].set(index))[:, 1:] for index in (0, K - 1, K)]
    assert min(np.abs(a - b).max() for a, b in zip(logits, logits[1:] + logits[:1], strict=True)) > 1e-3


def test_bfloat16_has_float32_logits_and_a_grid_is_refused(variables, indices, logits):
    half = jax.jit(Generator(BlocksConfig(32, 2, 4, 64, dtype="bfloat16"), K, N, CLASSES).apply)(variables, indices)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, atol=0.03 * float(jnp.abs(logits).max()))
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*\[B, 9\]"):
        MODEL.apply(variables, jnp.zeros((2, 3, 3), int))


@pytest.mark.parametrize("model_axis", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_over_a_mesh(variables, indices, logits, model_axis):
    mesh = sharding.make_mesh(model=model_axis)
    assert not sharding.unmatched(variables)
    placed = jax.device_put(variables, sharding.shardings(variables, mesh))
    if model_axis > 1:
        assert placed["params"]["code_embed"].sharding.spec[0] == "model"
    sharded = apply(placed, jax.device_put(indices, sharding.over_data(mesh)))
    np.testing.assert_allclose(sharded, logits, atol=1e-5)
