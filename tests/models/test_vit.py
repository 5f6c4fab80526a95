import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.models.vit import BlocksConfig, rope_table, run_blocks

B, N, D, HEADS, MLP = 4, 64, 32, 4, 128


class Blocks(nn.Module):
    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x):
        return run_blocks(self.cfg, x)[0]


def compile_gradient(depth, dtype, remat):
    module, x = Blocks(BlocksConfig(D, depth, HEADS, MLP, dtype=dtype, remat=remat)), jnp.ones((B, N, D), dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda v, x: module.apply(v, x).astype(jnp.float32).sum()))
    return gradient.lower(variables, x).compile()


@pytest.mark.parametrize(
    ("dtype", "remat", "products"),
    [
        pytest.param("float32", False, 6 * D + HEADS * N + MLP, marks=pytest.mark.slow),
        ("bfloat16", False, 5 * D + MLP),
        pytest.param("float32", True, 0, marks=pytest.mark.slow),
    ],
)
def test_gradient_keeps_the_products_of_matrices_alone(dtype, remat, products):
    sizes = [compile_gradient(depth, dtype, remat).memory_analysis().temp_size_in_bytes for depth in (8, 16)]
    tokens = 4 * B * N  # bytes: a CPU multiplies bfloat16 as float32
    parameters = 4 * (4 * D**2 + 2 * D * MLP + 9 * D + MLP)
    assert sizes[1] - sizes[0] <= 8 * (tokens * (products + D) + 1.2 * parameters)


@pytest.mark.slow
def test_gradients_with_and_without_recomputation_are_equal():
    module = Blocks(BlocksConfig(D, 3, HEADS, MLP))
    x = jax.random.normal(jax.random.key(0), (B, N, D))
    variables = module.init(jax.random.key(1), x)
    one, other = (
        jax.grad(lambda v, m=m: jnp.square(m.apply(v, x)).sum())(variables)
        for m in (module, Blocks(BlocksConfig(D, 3, HEADS, MLP, remat=True)))
    )
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [4, 64, 196, 1012])
def test_rotations_have_a_frequency_for_every_fourth_channel(width):
    cosine, sine = rope_table(2, 3, width, 100.0)
    assert cosine.shape == sine.shape == (6, width)
    frequency = 100.0 ** -(np.arange(width // 4) * 4 / width)
    np.testing.assert_allclose(cosine[0, : width // 4], np.cos(np.pi * frequency), atol=1e-5)  # y = -1/2
