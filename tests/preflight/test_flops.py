"""Counted FLOPs equal closed forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vqrae_jax.models.vit import BlocksConfig, run_blocks
from vqrae_jax.preflight.chips import TPU_PASSES, Chip
from vqrae_jax.preflight.flops import count_products
from vqrae_jax.preflight.roofline import compute_seconds
from vqrae_jax.quantizers.ema import EMAQuantizer

B, N, D, HEADS, MLP, L = 2, 10, 16, 2, 48, 3
# Per block: four projections, the two products of attention, the mlp.
BLOCK = 2 * B * N * (4 * D * D + 2 * N * D + 2 * D * MLP)


class Decoder(nn.Module):
    """Transformer blocks whose name counts as the decoder's."""

    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x):
        return run_blocks(self.cfg, x)[0]


def traced(function, *arguments, platform="cpu"):
    return count_products(jax.jit(function).trace(*arguments).jaxpr, platform)


def total(products, backward=None):
    return sum(p.flops for p in products if backward is None or p.backward == backward)


@pytest.mark.parametrize("remat", [False, True])
def test_transformer_blocks(remat):
    cfg = BlocksConfig(D, L, HEADS, MLP, remat=remat)
    module, x = Decoder(cfg, name="decoder"), jnp.zeros((B, N, D))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    forward = traced(module.apply, params, x)
    assert total(forward) == L * BLOCK
    assert {(p.part, p.kind) for p in forward} == {("decoder", "highest")}
    step = traced(jax.value_and_grad(lambda *args: module.apply(*args).sum(), argnums=(0, 1)), params, x)
    assert total(step, backward=False) == L * BLOCK
    # Twice the forward pass; recomputation skips the last product of the mlp, which no gradient needs.
    recomputed = BLOCK - 2 * B * N * D * MLP if remat else 0
    assert total(step, backward=True) == L * (2 * BLOCK + recomputed)


def test_time_depends_on_precision():
    x, half = jnp.zeros((8, 8)), jnp.zeros((8, 8), jnp.bfloat16)
    products = traced(
        lambda x, half: (half @ half, *(jnp.dot(x, x, precision=p) for p in (None, "high", "highest"))), x, half
    )
    assert {p.kind: p.flops for p in products} == dict.fromkeys(("bfloat16", "default", "high", "highest"), 1024)
    chip = Chip(0.0, 512.0, TPU_PASSES, 0.0, 0.0, 0.0)
    assert compute_seconds(products, 2, chip) == (1 + 1 + 3 + 6) * 1024 / (2 * 512)


def test_convolutions_and_their_gradients():
    x, kernel = jnp.zeros((2, 12, 12, 8)), jnp.zeros((3, 3, 8, 16))
    flops = 2 * 2 * 12 * 12 * 16 * 3 * 3 * 8

    def convolve(x, kernel=kernel, **options):
        return nn.Conv(16, (3, 3), use_bias=False, **options).apply({"params": {"kernel": kernel}}, x)

    strided = functools.partial(convolve, strides=2)
    assert total(traced(convolve, x)) == flops
    assert total(traced(strided, x)) == flops / 4
    assert total(traced(functools.partial(convolve, kernel=kernel[:, :, :2], feature_group_count=4), x)) == flops / 4
    assert total(traced(jax.value_and_grad(lambda x: strided(x).sum()), x)) == 2 * flops / 4


def test_only_loops_of_known_length_count_and_the_longest_branch():
    x = jnp.zeros((4, 4))

    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    assert total(traced(lambda x, n: loop(loop(x, 5), n), x, 3)) == 5 * 128
    branches = traced(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), x)
    assert total(branches) == 2 * 128


def test_unused_operations_do_not_count():
    """The gradient of the last layer alone is one product, although autodiff goes through both layers."""
    first, last, x = jnp.zeros((16, 8)), jnp.zeros((8, 4)), jnp.zeros((10, 16))
    pull = traced(lambda a, b: jax.vjp(lambda a, b: jnp.tanh(x @ a) @ b, a, b)[1](jnp.ones((10, 4)))[1], first, last)
    assert total(pull) == 2 * 10 * 16 * 8 + 2 * 10 * 8 * 4


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("gpu", 3), ("tpu", 2)])
def test_one_branch_of_a_platform_switch_counts(platform, products):
    branches = {"cpu": lambda x: x @ x, "tpu": lambda x: x @ x @ x, "default": lambda x: x @ x @ x @ x}
    program = functools.partial(jax.lax.platform_dependent, **branches)
    assert total(traced(program, jnp.zeros((4, 4)), platform=platform)) == products * 128


def test_quantizer_step_on_a_cpu_is_one_product():
    layer, z = EMAQuantizer(num_embeddings=2048, channels=16, codebook_init="normal"), jnp.zeros((1024, 16))
    variables = jax.eval_shape(layer.init, jax.random.key(0), z)
    train = functools.partial(layer.apply, train=True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)})
    assert total(traced(train, variables, z)) == 2 * 1024 * 2048 * 16
