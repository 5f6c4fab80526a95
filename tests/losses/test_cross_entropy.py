"""Cross-entropy in blocks equals the dense one, with little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.losses.cross_entropy import cross_entropy


def inputs(rows, size, width, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, table = jax.random.normal(keys[0], (2, rows // 2, width), dtype), jax.random.normal(keys[1], (size, width))
    return hidden, table, jax.random.normal(keys[2], (size,)), jax.random.randint(keys[3], (2, rows // 2), 0, size)


def dense(hidden, table, bias, targets, smoothing=0.0):
    logits = jnp.einsum("...d,kd->...k", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32) + bias
    labels = (1 - smoothing) * jax.nn.one_hot(targets, len(table)) + smoothing / len(table)
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)


def with_gradients(function, targets, **settings):
    """Returns a function of hidden, table and bias: the mean weighted by row, and its gradients."""

    def loss(hidden, table, bias):
        nats = function(hidden, table, bias, targets, **settings)
        nats = nats[0] if isinstance(nats, tuple) else nats
        return jnp.mean(nats * jnp.arange(nats.size).reshape(nats.shape))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize(("size", "block", "smoothing"), [(64, 16, 0.0), (37, 10, 0.1), (60, 60, 0.1)])
def test_blocks_equal_the_dense_loss(size, block, smoothing):
    *arrays, targets = inputs(12, size, 8)
    expected = with_gradients(dense, targets, smoothing=smoothing)(*arrays)
    results = with_gradients(cross_entropy, targets, smoothing=smoothing, block=block)(*arrays)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_correct_means_that_no_entry_is_more_probable():
    hidden, table, bias, targets = inputs(12, 64, 8)
    best = jnp.argmax(jnp.einsum("...d,kd->...k", hidden, table) + bias, axis=-1)
    assert np.all(cross_entropy(hidden, table, bias, best, block=16)[1])
    _, correct = cross_entropy(hidden, table, bias, targets, block=16)
    np.testing.assert_array_equal(correct, best == targets)


def test_half_precision_rounds_products_only():
    hidden, table, bias, targets = inputs(12, 64, 8, "bfloat16")
    (loss, gradients), (expected, others) = (
        with_gradients(f, targets, **s)(hidden, table, bias) for f, s in ((cross_entropy, {"block": 16}), (dense, {}))
    )
    assert [x.dtype for x in gradients] == ["bfloat16", "float32", "float32"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(gradients, others, strict=True):
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), atol=0.01 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("rows", "size", "width", "block"),
    [(64, 32_768, 16, 2048), pytest.param(1024, 131_072, 256, 8192, marks=pytest.mark.slow)],
)
def test_memory_is_at_most_a_quarter(rows, size, width, block):
    *arrays, targets = inputs(rows, size, width)
    functions = dense, functools.partial(cross_entropy, block=block)
    programs = [with_gradients(f, targets).lower(*arrays).compile() for f in functions]
    usual, blocked = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert usual >= 4 * rows * size
    assert blocked <= usual / 4
    if size == 131_072:
        for a, b in zip(*(jax.tree.leaves(program(*arrays)) for program in programs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
