"""Samples of known distributions, for predictors that know them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.generation.sampling import guided, sample

K = 5
ROWS = 4096


def twins(codes):
    """Logits where both codes of a picture are the same, any of K alike."""
    other = codes[:, ::-1]
    return jnp.where((other < K)[..., None], 1e4 * jax.nn.one_hot(other, K), 0.0)


def hidden(rows, positions):
    return jnp.full((rows, positions), K)


@pytest.mark.parametrize(("order", "steps", "equal"), [("confidence", 8, 1.0), ("chance", 64, 0.97), ("chance", 1, 0)])
def test_a_joint_distribution(order, steps, equal):
    """Both codes in one step are drawn independently, which more steps make rare."""
    codes = np.asarray(sample(twins, jax.random.key(0), hidden(ROWS, 2), K, steps, order=order))
    counts = np.bincount(codes[:, 0], minlength=K)
    assert counts.sum() == ROWS
    assert np.abs(counts - ROWS / K).max() < 5 * np.sqrt(ROWS / K)
    same = np.mean(codes[:, 0] == codes[:, 1])
    assert same >= equal if equal else abs(same - 1 / K) < 0.05


@pytest.mark.parametrize("order", ["confidence", "chance"])
def test_what_is_given_stays_and_the_rest_is_drawn(order):
    given = jax.random.randint(jax.random.key(0), (64, 9), 0, K)
    holes = jax.random.uniform(jax.random.key(1), given.shape) < jnp.linspace(0, 1, 64)[:, None]
    found = sample(
        lambda codes: jnp.zeros((*codes.shape, K)), jax.random.key(2), jnp.where(holes, K, given), K, 4, order=order
    )
    assert np.array_equal(found[~holes], given[~holes])
    assert found.min() >= 0
    assert found.max() < K
    assert np.mean(found[holes] == given[holes]) < 0.5


def test_the_surest_come_first():
    """Two linear steps: the first draws 0 or 1, the second 2 or 3; half of the positions are sure of the even one."""
    sure = jnp.asarray([0.0, 1.0, 0.0, 1.0])

    def predict(codes):
        second = jnp.any(codes < K, axis=1)[:, None, None]
        first = jnp.stack([jnp.zeros(4), -1e4 * sure, *[jnp.full(4, -1e4)] * 3], axis=-1)
        return jnp.where(second, jnp.roll(first, 2, axis=-1), first)

    found = sample(predict, jax.random.key(0), hidden(64, 4), K, 2, schedule="linear", choice_temperature=0.0)
    assert np.array_equal(found[:, 1::2], np.zeros((64, 2)))
    assert set(np.asarray(found[:, ::2]).ravel()) == {2, 3}


def test_temperature_sharpens():
    logits = jnp.arange(K, dtype=jnp.float32)

    def predict(codes):
        return jnp.broadcast_to(logits, (*codes.shape, K))

    for temperature in (0.5, 1.0, 2.0):
        found = sample(predict, jax.random.key(0), hidden(ROWS, 1), K, 1, temperature=temperature)
        shares = np.bincount(np.asarray(found)[:, 0], minlength=K) / ROWS
        np.testing.assert_allclose(shares, jax.nn.softmax(logits / temperature), atol=0.03)


def test_guidance():
    one, other = (lambda codes, x=x: jnp.full((*codes.shape, K), x) for x in (3.0, 1.0))
    assert np.all(guided(one, other, 0.0)(hidden(1, 1)) == 3)
    assert np.all(guided(one, other, 2.0)(hidden(1, 1)) == 7)


def test_no_steps():
    with pytest.raises(ValueError, match="steps=0: at least one"):
        sample(twins, jax.random.key(0), hidden(1, 2), K, 0)
