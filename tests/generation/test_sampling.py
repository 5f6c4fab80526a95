"""Samples follow known distributions when the predictor is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.generation.sampling import guided, sample

K = 5
ROWS = 4096


def twins(indices):
    """Logits of two equal indices, uniform over K."""
    other = indices[:, ::-1]
    return jnp.where((other < K)[..., None], 1e4 * jax.nn.one_hot(other, K), 0.0)


def hidden(rows, positions):
    return jnp.full((rows, positions), K)


@pytest.mark.parametrize(("order", "steps", "equal"), [("confidence", 8, 1.0), ("chance", 64, 0.97), ("chance", 1, 0)])
def test_a_joint_distribution(order, steps, equal):
    """Two indices sampled in one step are independent, which becomes rare with more steps."""
    indices = np.asarray(sample(twins, jax.random.key(0), hidden(ROWS, 2), K, steps, order=order))
    counts = np.bincount(indices[:, 0], minlength=K)
    assert counts.sum() == ROWS
    assert np.abs(counts - ROWS / K).max() < 5 * np.sqrt(ROWS / K)
    same = np.mean(indices[:, 0] == indices[:, 1])
    assert same >= equal if equal else abs(same - 1 / K) < 0.05


@pytest.mark.parametrize("order", ["confidence", "chance"])
def test_hidden_indices_are_sampled_and_the_others_stay(order):
    start = jax.random.randint(jax.random.key(0), (64, 9), 0, K)
    holes = jax.random.uniform(jax.random.key(1), start.shape) < jnp.linspace(0, 1, 64)[:, None]
    samples = sample(
        lambda indices: jnp.zeros((*indices.shape, K)), jax.random.key(2), jnp.where(holes, K, start), K, 4, order=order
    )
    assert np.array_equal(samples[~holes], start[~holes])
    assert samples.min() >= 0
    assert samples.max() < K
    assert np.mean(samples[holes] == start[holes]) < 0.5


def test_confident_indices_come_first():
    """The first of two linear steps samples 0 or 1, the second 2 or 3; half of the positions are certain."""
    sure = jnp.asarray([0.0, 1.0, 0.0, 1.0])

    def predict(indices):
        second = jnp.any(indices < K, axis=1)[:, None, None]
        first = jnp.stack([jnp.zeros(4), -1e4 * sure, *[jnp.full(4, -1e4)] * 3], axis=-1)
        return jnp.where(second, jnp.roll(first, 2, axis=-1), first)

    samples = sample(predict, jax.random.key(0), hidden(64, 4), K, 2, schedule="linear", choice_temperature=0.0)
    assert np.array_equal(samples[:, 1::2], np.zeros((64, 2)))
    assert set(np.asarray(samples[:, ::2]).ravel()) == {2, 3}


def test_temperature_scales_logits():
    logits = jnp.arange(K, dtype=jnp.float32)

    def predict(indices):
        return jnp.broadcast_to(logits, (*indices.shape, K))

    for temperature in (0.5, 1.0, 2.0):
        samples = sample(predict, jax.random.key(0), hidden(ROWS, 1), K, 1, temperature=temperature)
        shares = np.bincount(np.asarray(samples)[:, 0], minlength=K) / ROWS
        np.testing.assert_allclose(shares, jax.nn.softmax(logits / temperature), atol=0.03)


def test_guidance_extrapolates_and_zero_steps_are_refused():
    one, other = (lambda indices, x=x: jnp.full((*indices.shape, K), x) for x in (3.0, 1.0))
    assert np.all(guided(one, other, 0.0)(hidden(1, 1)) == 3)
    assert np.all(guided(one, other, 2.0)(hidden(1, 1)) == 7)
    with pytest.raises(ValueError, match="steps=0"):
        sample(twins, jax.random.key(0), hidden(1, 2), K, 0)
