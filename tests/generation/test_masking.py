"""Masking follows its schedule; the bound is tight for a predictor that knows the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sampler_error
from vqrae_jax.generation import masking

K = 7
SCHEDULES = ["cosine", "linear", "arccos"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_rows_follow_the_schedule(schedule):
    """Nothing is hidden at the start, and everything at the end."""
    share = masking.hidden_share(jnp.linspace(0, 1, 101), schedule)
    assert share[0] == 0
    np.testing.assert_allclose(share[-1], 1, rtol=1e-6)
    assert np.all(np.diff(share) > 0)
    indices = jax.random.randint(jax.random.key(0), (256, 400), 0, K)
    masked = masking.mask(jax.random.key(1), indices, K, schedule)
    assert np.array_equal(masked.hidden, masked.indices == K)
    assert np.array_equal(np.where(masked.hidden, indices, masked.indices), indices)
    # Times are spread evenly: sorted shares follow the schedule.
    times = (np.arange(256, dtype=np.float32) + 0.5) / 256
    expected = np.asarray(masking.hidden_share(jnp.asarray(times), schedule))
    assert np.abs(np.sort(masked.hidden.mean(1)) - expected).max() < 0.1
    np.testing.assert_allclose(np.median(masked.weight), np.median(np.gradient(expected, times) / expected), rtol=0.05)


def test_schedules_are_maskgits():
    """Its functions of progress r, which is 1 - time; the two concave ones hide more than the linear one."""
    r = np.linspace(0, 1, 11, dtype=np.float32)
    share = {name: np.asarray(masking.hidden_share(jnp.asarray(1 - r), name)) for name in SCHEDULES}
    np.testing.assert_allclose(share["linear"], 1 - r)
    np.testing.assert_allclose(share["cosine"], np.cos(np.pi / 2 * r), atol=1e-6)
    np.testing.assert_allclose(share["arccos"], np.arccos(r) * 2 / np.pi, atol=1e-6)
    for name in ("cosine", "arccos"):
        assert np.all(share[name][1:-1] > share["linear"][1:-1])


def test_cross_entropy_is_in_nats_and_its_mean_is_over_hidden_indices():
    logits = jnp.asarray([[[0.0, jnp.log(3.0)], [5.0, 5.0]]], jnp.bfloat16)
    nats = masking.cross_entropy(logits, jnp.asarray([[1, 0]]))
    assert nats.dtype == jnp.float32
    np.testing.assert_allclose(nats, [[np.log(4 / 3), np.log(2)]], rtol=5e-3)
    nats = jnp.asarray([[1.0, jnp.inf], [3.0, 5.0]])
    masked = masking.Masked(None, jnp.asarray([[True, False], [True, True]]), None)
    assert masking.masked_mean(nats, masked) == 3
    assert masking.masked_mean(nats, masked._replace(hidden=jnp.zeros((2, 2), bool))) == 0


def test_label_smoothing_is_the_cross_entropy_to_a_smoothed_target():
    logits = jax.random.normal(jax.random.key(0), (2, 3, K))
    indices = jax.random.randint(jax.random.key(1), (2, 3), 0, K)
    target = 0.9 * jax.nn.one_hot(indices, K) + 0.1 / K
    expected = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    np.testing.assert_allclose(masking.cross_entropy(logits, indices, smoothing=0.1), expected, rtol=1e-5)


def test_min_snr_clips_the_weight_of_rows_with_few_hidden_indices():
    indices = jnp.zeros((256, 4), int)
    for schedule in SCHEDULES:
        full, clipped = (masking.mask(jax.random.key(0), indices, K, schedule, **snr) for snr in ({}, {"max_snr": 5.0}))
        assert np.array_equal(full.hidden, clipped.hidden)
        changed = np.asarray(full.weight != clipped.weight)
        assert 0 < changed.sum() < 128
        assert np.all(clipped.weight[changed] < full.weight[changed])
        if schedule == "linear":  # weight 1 / share, and 1 + 5 where share is below 1 / 6
            np.testing.assert_allclose(clipped.weight, np.minimum(full.weight, 6), rtol=1e-5)


@pytest.mark.parametrize(("name", "schedule"), [
    ("pairs", "cosine"),
    pytest.param("pairs", "linear", marks=pytest.mark.slow),
    pytest.param("pairs", "arccos", marks=pytest.mark.slow),
    pytest.param("ising", "cosine", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_bound_is_the_entropy_for_an_exact_predictor(name, schedule):
    joint = sampler_error.pairs() if name == "pairs" else sampler_error.ising((2, 2))
    states, logits = jnp.asarray(joint.states), jnp.log(joint.probabilities)

    def once(key):
        state_key, mask_key = jax.random.split(key)
        indices = states[jax.random.categorical(state_key, logits, shape=(2**16,))]
        masked = masking.mask(mask_key, indices, joint.num_embeddings, schedule)
        return masking.bound(masking.cross_entropy(joint.predict(masked.indices), indices), masked)

    nats = jax.lax.map(once, jax.random.split(jax.random.key(1), 8))
    np.testing.assert_allclose(nats.mean(), joint.entropy / 4, rtol=0.01)
