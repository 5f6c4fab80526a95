"""Attention by ordinary operations equals the definition; the TPU's kernel, interpreted, equals it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.models import attention_tpu
from vqrae_jax.models.attention import attend
from vqrae_jax.models.vit import BlocksConfig, ViT, ViTConfig, run_blocks

EXACT = jax.lax.Precision.HIGHEST


def attend_flat(width):
    def found(*inputs):
        heads = (x.reshape(*x.shape[:2], -1, width) for x in inputs)
        return attend(*heads, EXACT).reshape(inputs[0].shape)

    return found


def test_attention_equals_jax_and_survives_large_scores():
    query, key, value = 30 * jax.random.normal(jax.random.key(0), (3, 2, 17, 4, 8))
    theirs = jax.nn.dot_product_attention
    np.testing.assert_allclose(jax.jit(attend)(query, key, value), theirs(query, key, value), rtol=1e-4, atol=1e-4)
    ours, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2)))(query, key, value) for f in (attend, theirs)
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
    assert np.isfinite(attend(100 * query, 100 * key, value)).all()


@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(37, 4, 64), pytest.param(257, 2, 64, id="cls and 16 x 16"), pytest.param(19, 16, 72, id="ViT-XL"), (20, 3, 20)],
)
def test_the_kernel_and_its_gradient_equal_attention(tokens, heads, width):
    *inputs, slope = jax.random.normal(jax.random.key(0), (4, 2, tokens, heads * width))
    expected, pull = jax.vjp(attend_flat(width), *inputs)
    (mixed,) = attention_tpu.run(attention_tpu.mix, inputs, 1, width, EXACT, interpret=True)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)
    found = attention_tpu.run(attention_tpu.pull_back, (*inputs, slope), 3, width, EXACT, interpret=True)
    for a, b in zip(found, pull(slope), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_the_kernel_survives_large_scores_in_bfloat16():
    inputs = (1000 * jax.random.normal(jax.random.key(0), (3, 1, 17, 2 * 64))).astype(jnp.bfloat16)
    (mixed,) = attention_tpu.run(attention_tpu.mix, inputs, 1, 64, interpret=True)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (mixed, attend_flat(64)(*inputs))), rtol=2e-2)


def test_what_does_not_fit_is_known():
    def room(tokens: int, heads: int, width: int) -> bool:
        return attention_tpu.fits(jax.ShapeDtypeStruct((1, tokens, heads * width), jnp.bfloat16), width, 7)

    assert room(257, 12, 64)
    assert room(257, 16, 72)
    assert room(1025, 12, 64)
    assert not room(1025, 16, 72)  # no fewer heads than all fill whole lanes
    assert not room(4097, 12, 64)


def test_elsewhere_than_on_a_tpu_it_is_attention_over_any_mesh():
    mesh = sharding.make_mesh(4, 2)
    per_device = functools.partial(sharding.per_device, mesh=mesh)
    for batch, heads in ((8, 4), (3, 4), (8, 3)):  # what the mesh does not divide is whole on every device
        *inputs, slope = jax.random.normal(jax.random.key(0), (4, batch, 9, heads * 8))

        @jax.jit
        def spread(query, key, value, slope):
            mixed, pull = jax.vjp(lambda *x: attention_tpu.attend(*x, 8, per_device, EXACT), query, key, value)
            return mixed, *pull(slope)

        expected, pull = jax.vjp(attend_flat(8), *inputs)
        for a, b in zip(spread(*inputs, slope), (expected, *pull(slope)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert "model" in str(spread.lower(*jnp.ones((4, 8, 9, 32))).as_text())


class Net(nn.Module):
    cfg: BlocksConfig

    @nn.compact
    def __call__(self, x):
        return run_blocks(self.cfg, x)[0]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("unbiased", [(), ("key",)])
def test_blocks_with_the_kernel_have_the_same_parameters_and_values(scan, unbiased):
    x = jax.random.normal(jax.random.key(1), (2, 9, 32))

    nets = [Net(BlocksConfig(32, 2, 4, 64, scan=scan, unbiased=unbiased, attention=way)) for way in ("xla", "pallas")]
    params, same = (net.init(jax.random.key(0), x) for net in nets)
    chex.assert_trees_all_equal(params, same)
    values = [jax.value_and_grad(lambda p, n=net: jnp.sum(n.apply(p, x) ** 2))(params) for net in nets]
    chex.assert_trees_all_close(*values, rtol=1e-4, atol=1e-3)


def test_rotary_positions_with_the_kernel_are_the_same():
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    features = []
    for way in ("xla", "pallas"):
        vit = ViT(ViTConfig(BlocksConfig(32, 2, 4, 64, attention=way), 8, pos="rope", registers=2))
        features.append(vit.apply(vit.init(jax.random.key(1), image, (1,)), image, (1,))[0])
    chex.assert_trees_all_close(*features, rtol=1e-5, atol=1e-5)
