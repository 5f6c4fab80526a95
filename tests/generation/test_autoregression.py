"""Samples follow known distributions when the predictor is exact; samples of a network do not depend on the batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.generation import autoregression
from vqrae_jax.generation.autoregression import sample, truncate_logits
from vqrae_jax.generation.sampling import pair_labels
from vqrae_jax.models.generator import Architecture, CodeTransformer
from vqrae_jax.models.vit import BlocksConfig

ROWS = 1 << 18


def checkerboards(grid):
    """Twice as probable for each pair of neighbors that differ, of two codes."""
    pairs = (grid[:, 1:] != grid[:, :-1]).sum() + (grid[1:] != grid[:-1]).sum()
    return 2.0**pairs


def ising(grid):
    return 1 / checkerboards(grid) ** 2


def arbitrary(grid):
    return np.random.default_rng(int(grid.ravel() @ 4 ** np.arange(grid.size))).exponential()


def distribution(weight, side, codes):
    """Returns the probabilities [codes] * side^2 of all grids."""
    grids = itertools.product(range(codes), repeat=side**2)
    weights = np.asarray([weight(np.asarray(grid).reshape(side, side)) for grid in grids])
    return (weights / weights.sum()).reshape((codes,) * side**2)


def exact_step(joint):
    """Returns a step whose state is the number of the prefix, and its first state for B rows."""
    codes, length = joint.shape[0], joint.ndim
    tables = np.full((length, codes ** (length - 1), codes), 1.0)
    for t in range(length):
        marginal = joint.sum(axis=tuple(range(t + 1, length)))
        tables[t, : codes**t] = marginal.reshape(-1, codes)
    logs = jnp.log(jnp.asarray(tables, jnp.float32))

    def step(prefix, previous, t):
        prefix = jnp.where(t == 0, 0, prefix * codes + previous)
        return logs[t, prefix], prefix

    return step


def histogram(samples, codes):
    shape = (codes,) * samples.shape[1]
    return np.bincount(np.ravel_multi_index(np.asarray(samples).T, shape), minlength=np.prod(shape)) / len(samples)


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "side", "codes"), [(checkerboards, 3, 2), (ising, 3, 2), (arbitrary, 2, 4)])
def test_samples_of_an_exact_predictor_follow_the_joint_distribution(weight, side, codes):
    joint = distribution(weight, side, codes)
    key, hidden = jax.random.key(0), jnp.full((ROWS, side**2), codes)
    run = jax.jit(lambda start: sample(exact_step(joint), jnp.zeros(ROWS, int), key, start, codes))
    assert np.abs(histogram(run(hidden), codes) - joint.ravel()).sum() / 2 <= 0.02
    # Given the first codes, the others follow the conditional distribution.
    prefix = (0, 1) if codes == 4 else (0, 1, 1, 0)
    samples = run(hidden.at[:, : len(prefix)].set(jnp.asarray(prefix)))
    np.testing.assert_array_equal(samples[:, : len(prefix)], np.broadcast_to(prefix, (ROWS, len(prefix))))
    conditional = joint[prefix] / joint[prefix].sum()
    assert np.abs(histogram(samples[:, len(prefix) :], codes) - conditional.ravel()).sum() / 2 <= 0.02


def constant_step(logits):
    """Returns a step that predicts the same logits for every code; [2, F]: for even and odd rows."""
    logits = jnp.atleast_2d(jnp.asarray(logits, jnp.float32))
    return lambda state, previous, t: (jnp.tile(logits, (len(previous) // len(logits), 1)), state)


def shares(logits, length=1, codes=4, rows=4096, **settings):
    hidden = jnp.full((rows, length), codes)
    samples = sample(constant_step(logits), None, jax.random.key(0), hidden, codes, **settings)
    return np.stack([np.bincount(column, minlength=codes) / rows for column in np.asarray(samples).T])


def test_temperature_and_truncation():
    logits = jnp.log(jnp.asarray([0.4, 0.1, 0.3, 0.2]))
    temperature = jnp.asarray([1.0, 0.5, 0.0])
    expected = np.stack([jax.nn.softmax(logits), jax.nn.softmax(2 * logits), [1, 0, 0, 0]])
    np.testing.assert_allclose(shares(logits, 3, temperature=temperature), expected, atol=0.03)
    for settings, expected in (
        ({"top_k": 1}, [1, 0, 0, 0]), ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]), ({"top_k": 9}, jnp.exp(logits)),
        ({"top_p": 0.39}, [1, 0, 0, 0]), ({"top_p": 0.41}, [4 / 7, 0, 3 / 7, 0]), ({"top_p": 1.0}, jnp.exp(logits)),
    ):  # fmt: skip
        settings = {"top_k": None, "top_p": None} | settings
        np.testing.assert_allclose(jax.nn.softmax(truncate_logits(logits, **settings)), expected, atol=1e-6)


def test_guidance_has_a_scale_for_every_code():
    conditional, unconditional = np.asarray([0.0, 0.5, 1.0, 0.2]), np.asarray([1.0, 0.0, 0.3, 0.2])
    scale = jnp.asarray([0.0, 1.5])
    expected = [jax.nn.softmax((1 + s) * conditional - s * unconditional) for s in scale]
    np.testing.assert_allclose(shares([conditional, unconditional], 2, guidance=scale), np.stack(expected), atol=0.03)


def test_digits_are_independent():
    logits = np.log([0.7, 0.3, 0.2, 0.5, 0.3])
    expected = np.outer([0.7, 0.3], [0.2, 0.5, 0.3]).ravel()
    np.testing.assert_allclose(shares(logits, codes=6, factors=(2, 3))[0], expected, atol=0.03)


@pytest.fixture(scope="module")
def network():
    """Returns a function that samples from a small network, and its likelihoods of codes."""
    blocks = BlocksConfig(16, 2, 2, 32, causal=True)
    config = Architecture(blocks, 4, ((2, 2),), levels=2, classes=2, adaln=True, pos="rope")
    model = CodeTransformer(config)
    rng, variables = np.random.default_rng(1), jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), int))
    variables = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(variables))

    @jax.jit
    def run(variables, rows, label, indices):
        state = model.apply(variables, pair_labels(label, 2), method="start")
        step = functools.partial(model.apply, variables, method="step")
        return sample(step, state, jax.random.key(0), indices, 4, rows, guidance=1.0, top_p=0.95)

    return variables, run


@pytest.mark.slow
def test_samples_do_not_depend_on_batch_and_mesh(network):
    variables, run = network
    inputs = jnp.arange(8), jnp.arange(8) % 2, jnp.full((8, 8), 4)
    samples = run(variables, *inputs)
    assert len(np.unique(samples, axis=0)) > 4
    mesh, half = sharding.make_mesh(model=2), [x[4:] for x in inputs]
    placed = jax.device_put(variables, sharding.shardings(variables, mesh, True, 64))
    np.testing.assert_array_equal(run(placed, *jax.device_put(half, sharding.over_data(mesh))), samples[4:])


def test_the_likelihood_is_that_of_the_samples():
    """The entropy of samples is the mean of -log p, for an untrained network without guidance."""
    config = Architecture(BlocksConfig(16, 1, 2, 32, causal=True), 3, ((1, 3),))
    model, rows = CodeTransformer(config), 4096
    images = jnp.asarray(list(itertools.product(range(3), repeat=3)))

    @jax.jit
    def run():
        variables = jax.tree.map(lambda x: 20 * x, model.init(jax.random.key(0), jnp.zeros((1, 3), int)))
        state = model.apply(variables, jnp.zeros(rows, int), method="start")
        step = functools.partial(model.apply, variables, method="step")
        samples = sample(step, state, jax.random.key(0), jnp.full((rows, 3), 3), 3)
        return samples, -model.apply(variables, images, method="cross_entropy")[0].sum(1)

    samples, log_p = run()
    assert np.ptp(log_p) > 1
    assert np.abs(histogram(samples, 3) - jnp.exp(log_p)).sum() / 2 < 0.05


def test_orders_are_permutations_that_become_raster_order():
    orders = np.asarray(autoregression.permuted_orders(jax.random.key(0), (1000, 9), 0.25))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(9), (1000, 9)))
    assert abs(np.mean((orders != np.arange(9)).any(axis=1)) - 0.25) < 0.05
    share = [float(autoregression.anneal_randomness(step, 100, jnp.asarray(200))) for step in (0, 100, 150, 200, 300)]
    assert share == [1, 1, 0.5, 0, 0]
