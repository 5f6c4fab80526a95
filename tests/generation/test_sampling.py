"""Samples follow known distributions when the predictor is exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import sampler_error
from vqrae_jax.errors import ConfigError
from vqrae_jax.generation.sampler_config import SamplerConfig
from vqrae_jax.generation.sampling import pair_labels, sample
from vqrae_jax.sharding import make_mesh

METHODS = ["confidence", "chance", "halton", "remask"]
JOINTS = {**sampler_error.JOINTS, "Ising": lambda: sampler_error.ising((2, 2))}
K = 5


def hidden(rows, positions, num_embeddings=K):
    return jnp.full((rows, positions), num_embeddings)


def uniform(indices):
    return jnp.zeros((*indices.shape, K))


def error(joint, config, size):
    return joint.total_variation(sampler_error.draw_samples(joint, config, size))


@pytest.mark.parametrize(("method", "per_position"), [("chance", 1), ("halton", 1), ("remask", 2)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "Ising" else n for n in JOINTS])
def test_samples_follow_the_distribution_if_every_step_reveals_one(name, method, per_position):
    joint = JOINTS[name]()
    states, positions = joint.states.shape
    assert error(joint, SamplerConfig(method, steps=per_position * positions), 2**11 * states) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "arccos"])
@pytest.mark.parametrize("method", ["chance", "halton"])
def test_samples_follow_the_distribution_with_every_schedule(method, schedule):
    joint = sampler_error.checkerboard()
    assert error(joint, SamplerConfig(method, steps=9, schedule=schedule), 2**15) <= 0.02


def test_indices_of_one_step_are_independent():
    """Two codes that are always equal are so by chance, one time in four, if they are sampled in the same step."""
    joint = sampler_error.pairs()
    samples = sampler_error.draw_samples(joint, SamplerConfig("chance", steps=1), 2**12).reshape(-1, 2, 2)
    assert abs(np.mean(samples[..., 0] == samples[..., 1]) - 1 / 4) < 0.02


@pytest.mark.slow
def test_remasking_corrects_what_one_step_breaks():
    """The first of four steps reveals three positions of one of two checkerboards, which rarely belong to one."""
    joint = sampler_error.checkerboard()
    broken, corrected = (error(joint, SamplerConfig("remask", 4, "linear", remasking=r), 2**12) for r in (0.0, 1.0))
    assert broken > 0.5
    assert corrected < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_everything_is_revealed_with_any_number_of_steps(method):
    """Without jit, which takes longer to compile the 24 programs than to run them."""
    for steps in range(1, 7):
        config = SamplerConfig(method, steps=steps)
        with jax.disable_jit():
            states = sample(uniform, jax.random.key(0), hidden(8, 3), K, config, ((1, 3),), history=True)
        assert states.shape == (steps if method == "remask" else min(steps, 3), 8, 3)
        assert np.all((states[-1] >= 0) & (states[-1] < K))
        if method != "remask":  # every step reveals some
            assert np.all(np.diff(np.sum(states == K, axis=2), axis=0) < 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_repainted_region_fits_the_indices_around_it(method):
    """Rows have from no to all positions hidden; those left over keep their codes."""
    joint = sampler_error.pairs()
    start = jnp.asarray(joint.states[np.arange(320) % 16])
    holes = jax.random.uniform(jax.random.key(1), start.shape) < jnp.linspace(0, 1.3, 320)[:, None]
    holes = holes.at[:, 0].set(False)
    config = SamplerConfig(method, steps=40 if method == "remask" else 4)
    run = jax.jit(lambda x: sample(joint.predict, jax.random.key(2), x, 4, config, ((2, 2),)))
    samples = np.asarray(run(jnp.where(holes, 4, start)))
    assert np.array_equal(samples[~holes], start[~holes])
    assert np.mean(samples[:, 0] == samples[:, 1]) > 0.98
    free = np.asarray(holes[:, 2] & holes[:, 3])
    assert 0.1 < np.mean(samples[free, 2] == start[free, 2]) < 0.45


@pytest.mark.parametrize("method", ["confidence", pytest.param("remask", marks=pytest.mark.slow)])
def test_samples_are_the_same_on_any_mesh_and_in_any_batch(method):
    joint = sampler_error.pairs()
    config = SamplerConfig(method, steps=4, guidance=1.0, guidance_schedule="linear")

    @jax.jit
    def run(start, rows):
        return sample(joint.predict, jax.random.key(0), start, 4, config, rows=rows)

    start, rows = hidden(32, 4, 4), jnp.arange(32)
    whole = np.asarray(run(start, rows))
    assert len(np.unique(whole, axis=0)) > 5
    split = NamedSharding(make_mesh(data=8), P("data"))
    sharded = run(jax.device_put(start, split), jax.device_put(rows, split))
    assert sharded.sharding.is_equivalent_to(split, 2)
    assert np.array_equal(sharded, whole)
    shuffled = np.random.default_rng(0).permutation(32)
    assert np.array_equal(run(start, jnp.asarray(shuffled)), whole[shuffled])
    assert np.array_equal(run(start[:8], rows[8:16]), whole[8:16])


def test_confident_indices_come_first():
    """The first of two linear steps samples 0 or 1, the second 2 or 3; half of the positions are certain."""
    sure = jnp.asarray([0.0, 1.0, 0.0, 1.0])

    def predict(indices):
        second = jnp.any(indices < K, axis=1)[:, None, None]
        first = jnp.stack([jnp.zeros(4), -1e4 * sure, *[jnp.full(4, -1e4)] * 3], axis=-1)
        return jnp.where(second, jnp.roll(first, 2, axis=-1), first)

    config = SamplerConfig(steps=2, schedule="linear", choice_temperature=0.0)
    samples = sample(predict, jax.random.key(0), hidden(64, 4), K, config)
    assert np.array_equal(samples[:, 1::2], np.zeros((64, 2)))
    assert set(np.asarray(samples[:, ::2]).ravel()) == {2, 3}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"guidance_schedule": "constant"}, [2, 2, 2]),
        ({"guidance_schedule": "linear"}, [0, 1, 2]),
        ({"guidance_schedule": "power-cosine", "guidance_power": 2.0}, [0, 1 - np.cos(np.pi / 4), 2]),
        ({"guidance_schedule": "interval", "guidance_interval": (0.4, 0.6)}, [0, 2, 0]),
    ],
)
def test_guidance_and_temperature_follow_their_schedules(settings, scales):
    """One position per step, in known order; the log odds of index 1 are 0.5 (1 + scale) / temperature."""
    config = SamplerConfig("halton", 3, temperature=1.0, last_temperature=2.0, guidance=2.0, **settings)
    labels = pair_labels(jnp.ones(8192, int), 0)

    def predict(indices):
        assert len(indices) == len(labels)
        return jnp.broadcast_to(labels[:, None, None] * jnp.asarray([0, 0.5]), (*indices.shape, 2))

    run = jax.jit(lambda start: sample(predict, jax.random.key(0), start, 2, config, ((1, 3),), history=True))
    states = np.asarray(run(hidden(8192, 3, 2)))
    for step, (scale, temperature) in enumerate(zip(scales, (1.0, 1.5, 2.0), strict=True)):
        before = states[step - 1] if step else np.full_like(states[0], 2)
        (revealed,) = np.unique(np.argwhere((before == 2) & (states[step] < 2))[:, 1])
        expected = 1 / (1 + np.exp(-0.5 * (1 + scale) / temperature))
        assert abs(states[step][:, revealed].mean() - expected) < 0.02


def test_guidance_of_scale_0_is_the_conditional_distribution():
    """Bit for bit, with the doubled batch (a schedule without guided steps) and without."""
    table = jax.random.normal(jax.random.key(1), (2, K))
    off = SamplerConfig("chance", 2, guidance=3.0, guidance_schedule="interval", guidance_interval=(0.5, 0.5))
    samples = []
    for config in (off, dataclasses.replace(off, guidance=0.0)):
        labels = jnp.zeros(64, int)
        labels = pair_labels(labels, 1) if config.guidance else labels

        def predict(indices, labels=labels):
            return jnp.broadcast_to(table[labels][:, None], (*indices.shape, K))

        samples.append(sample(predict, jax.random.key(0), hidden(64, 4), K, config))
    assert np.array_equal(*samples)


@pytest.mark.slow
def test_digits_of_codes_are_sampled_independently():
    """The logits of three and of two digits are those of six codes; the most probable code is also revealed first."""
    parts = [jnp.asarray([0.0, 1.0, -1.0]), jnp.asarray([0.0, 0.5])]
    predict = lambda indices: jnp.broadcast_to(jnp.concatenate(parts), (*indices.shape, 5))  # noqa: E731
    joint = np.outer(*map(jax.nn.softmax, parts)).ravel()
    chance, confidence = (
        sample(predict, jax.random.key(0), hidden(4096, 2, 6), 6, config, factors=(3, 2), history=True)
        for config in (SamplerConfig("chance", steps=2), SamplerConfig(steps=2, choice_temperature=0.0))
    )
    shares = np.bincount(np.asarray(chance[-1]).ravel(), minlength=6) / 8192
    np.testing.assert_allclose(shares, joint, atol=0.02)
    revealed = np.where(confidence[0] < 6, confidence[0], -1).max(1)
    assert joint[revealed].mean() > joint @ joint + 0.02


@pytest.mark.parametrize("grids", [(), ((2, 2),), ((1, 1), (1, 1))])
def test_grids_must_have_the_positions_of_the_indices(grids):
    with pytest.raises(ConfigError) as caught:
        sample(uniform, jax.random.key(0), hidden(1, 3), K, SamplerConfig("halton"), grids)
    assert caught.value.field == "grids"
