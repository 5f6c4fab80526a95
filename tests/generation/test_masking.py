"""Masking follows its schedule; the bound is tight for a predictor that knows the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.generation import masking

K = 7


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_masked_rows_follow_the_schedule(schedule):
    """Nothing is hidden at the start, and everything at the end."""
    share = masking.hidden_share(jnp.linspace(0, 1, 101), schedule)
    assert share[0] == 0
    np.testing.assert_allclose(share[-1], 1)
    assert np.all(np.diff(share) > 0)
    indices = jax.random.randint(jax.random.key(0), (256, 400), 0, K)
    masked = masking.mask(jax.random.key(1), indices, K, schedule)
    assert np.array_equal(masked.hidden, masked.indices == K)
    assert np.array_equal(np.where(masked.hidden, indices, masked.indices), indices)
    # Times are spread evenly: sorted shares follow the schedule.
    expected = masking.hidden_share((jnp.arange(256) + 0.5) / 256, schedule)
    assert np.abs(np.sort(masked.hidden.mean(1)) - expected).max() < 0.1
    slope = np.ones(256) if schedule == "linear" else np.pi / 2 * np.sqrt(np.maximum(1 - expected**2, 0))
    np.testing.assert_allclose(np.median(masked.weight), np.median(slope / expected), rtol=0.05)


def test_cross_entropy_is_in_nats_and_its_mean_is_over_hidden_indices():
    logits = jnp.asarray([[[0.0, jnp.log(3.0)], [5.0, 5.0]]], jnp.bfloat16)
    nats = masking.cross_entropy(logits, jnp.asarray([[1, 0]]))
    assert nats.dtype == jnp.float32
    np.testing.assert_allclose(nats, [[np.log(4 / 3), np.log(2)]], rtol=5e-3)
    nats = jnp.asarray([[1.0, jnp.inf], [3.0, 5.0]])
    masked = masking.Masked(None, jnp.asarray([[True, False], [True, True]]), None)
    assert masking.masked_mean(nats, masked) == 3
    assert masking.masked_mean(nats, masked._replace(hidden=jnp.zeros((2, 2), bool))) == 0


def twins(indices):
    """Logits of two equal indices, uniform over K."""
    other = indices[:, ::-1]
    return jnp.where((other < K)[..., None], 1e4 * jax.nn.one_hot(other, K), 0.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("predict", "share"), [(lambda x: jnp.zeros((*x.shape, K)), 1.0), (twins, 0.5)])
def test_the_bound_is_the_entropy_for_an_exact_predictor(predict, share, schedule):
    first = jax.random.randint(jax.random.key(0), (4096, 1), 0, K)
    indices = jnp.concatenate([first, first], axis=1)

    def once(key):
        masked = masking.mask(key, indices, K, schedule)
        return masking.bound(masking.cross_entropy(predict(masked.indices), indices), masked)

    nats = jax.lax.map(once, jax.random.split(jax.random.key(1), 50))
    np.testing.assert_allclose(nats.mean(), share * np.log(K), rtol=0.02)
