import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers.blocks import Block
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.nearest import nearest

STATE = {"codebook": "embedding", "counts": "ema_cluster_size", "sums": "ema_w"}


def load_pytorch(arrays, **changes):
    """Returns the quantizer and state of the PyTorch VQRAE."""
    K, C = arrays["init_embedding"].shape
    settings = {
        "commitment_cost": 0.25,
        "codebook_init": "normal",
        "revival_threshold": 0.0,
        "decay_warmup": False,
    } | changes
    state = {ours: arrays[f"init_{theirs}"] for ours, theirs in STATE.items()} | {"step": np.asarray(1, np.int32)}
    return EMAQuantizer(K, C, **settings), {"batch_stats": jax.tree.map(jnp.asarray, state)}


# Compiling takes nearly all the time of these tests.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def evaluate(module, variables, z):
    return module.apply(variables, z, mutable=["batch_stats"])


@functools.partial(jit, static_argnums=0)
def initialize(module, z):
    return jax.jit(module.init)(jax.random.key(0), z)


@functools.partial(jit, static_argnums=0)
def train(module, variables, z, seed=0):
    return module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(seed)})


def close(tree, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), tree, other)


@pytest.mark.parametrize("case", ["ema_vq", "ema_vq_warm"])
def test_training_equals_pytorch(golden, assert_close, case):
    arrays = np.load(golden / "quantizers" / f"{case}.npz")
    module, variables = load_pytorch(arrays)
    for step, z in enumerate(arrays["z"]):
        out, variables = train(module, variables, z)
        np.testing.assert_array_equal(out.indices, arrays["indices"][step])
        assert_close(out.z, arrays["quantized"][step], 1e-5, "z")
        assert_close(out.loss, arrays["vq_loss"][step], 1e-5, "loss")
        state = variables["batch_stats"]
        for ours, theirs in STATE.items():
            assert_close(state[ours], arrays[theirs][step], 1e-5, f"{ours} after step {step}")


def test_ties_go_to_the_lowest_index(golden, assert_close):
    arrays = np.load(golden / "quantizers" / "ema_vq_ties.npz")
    module, variables = load_pytorch(arrays)
    out, variables = train(module, variables, arrays["z"])
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.loss, arrays["vq_loss"], 1e-5)
    for ours, theirs in STATE.items():
        assert_close(variables["batch_stats"][ours], arrays[f"after_{theirs}"], 1e-5, ours)
    for block in (Block(3, 1), Block(120, 8), Block(16, 16)):
        flat = arrays["z"].reshape(-1, arrays["z"].shape[-1])
        indices = jit(functools.partial(nearest, block=block))(flat, arrays["init_embedding"])
        np.testing.assert_array_equal(indices, arrays["indices"].reshape(-1))


def test_gradients_equal_pytorch(golden, assert_close):
    arrays = np.load(golden / "quantizers" / "ema_vq.npz")
    module, variables = load_pytorch(arrays, commitment_cost=0.4)
    z = jnp.moveaxis(arrays["grad_z"], 1, -1)
    probe = jnp.moveaxis(arrays["grad_fixed_random"], 1, -1)
    np.testing.assert_array_equal(evaluate(module, variables, z)[0].indices, arrays["grad_indices"])
    assert_close(evaluate(module, variables, z)[0].loss, arrays["grad_vq_loss"], 1e-5)

    @jit
    def gradients(z):
        functions = lambda out: out.loss, lambda out: jnp.sum(out.z * probe)
        return [jax.grad(lambda z, f=f: f(module.apply(variables, z)))(z) for f in functions]

    loss, through = gradients(z)
    assert_close(jnp.moveaxis(loss, -1, 1), arrays["grad_dz_vq_loss"], 1e-5)
    assert_close(jnp.moveaxis(through, -1, 1), arrays["grad_dz_straight_through"], 1e-5)


@pytest.fixture(scope="module")
def clusters():
    """4 steps of 512 latents around 64 centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(64, 8)) * 3
    return (centres[rng.integers(64, size=(4, 512))] + 0.1 * rng.normal(size=(4, 512, 8))).astype(np.float32)


def fresh(z, **settings):
    module = EMAQuantizer(64, 8, **settings)
    return module, initialize(module, z)


def test_kmeans_start_fits_the_batch_and_the_next_step_changes_nothing(clusters):
    """64 points, each 8 times, and 128 embeddings."""
    z = np.repeat(clusters[0][:64], 8, axis=0)
    module = EMAQuantizer(128, 8, revival_threshold=0.0)
    out, first = train(module, initialize(module, z), z)
    assert float(out.metrics["quantization_error"]) < 1e-10
    _, second = train(module, first, z, seed=1)
    first, second = first["batch_stats"], second["batch_stats"]
    used = np.asarray(out.metrics["counts"]) > 0
    np.testing.assert_allclose(second["codebook"][used], first["codebook"][used], rtol=1e-5, atol=1e-5)
    for state in (first, second):
        embeddings = state["sums"] / module._smooth(state["counts"])[:, None]
        np.testing.assert_allclose(state["codebook"], embeddings, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [pytest.param(0.99, marks=pytest.mark.slow), 0.6])
def test_the_decay_warms_up_from_a_mean_of_all_batches(clusters, decay):
    """The decay of step t is t / (t + 1), up to `decay`; the initial codebook counts as the first batch."""
    module, variables = fresh(clusters[0], codebook_init="normal", revival_threshold=0.0, vq_decay=decay)
    counts, sums = (np.asarray(variables["batch_stats"][name], np.float64) for name in ("counts", "sums"))
    for t, z in enumerate(clusters, 1):
        out, variables = train(module, variables, z)
        rate = min(t / (t + 1), decay)
        selected = np.eye(64)[np.asarray(out.indices)]
        counts = rate * counts + (1 - rate) * selected.sum(0)
        sums = rate * sums + (1 - rate) * selected.T @ z
        np.testing.assert_allclose(variables["batch_stats"]["counts"], counts, rtol=1e-5)
        np.testing.assert_allclose(variables["batch_stats"]["sums"], sums, rtol=1e-4, atol=1e-4)


def test_data_start_takes_latents_of_the_first_batch(clusters):
    module, variables = fresh(clusters[0], codebook_init="data")
    out, after = train(module, variables, clusters[0])
    rows = {row.tobytes() for row in clusters[0]}
    assert all(row.tobytes() in rows for row in np.asarray(out.z).reshape(-1, 8))
    np.testing.assert_array_equal(after["batch_stats"]["codebook"][out.indices], out.z)


@pytest.mark.slow
def test_fewer_latents_than_embeddings(clusters):
    """Surplus embeddings repeat latents at first; later batches revive them."""
    module, variables = fresh(clusters[0])
    for step in range(20):
        out, variables = train(module, variables, clusters[step % 4][16 * (step // 4) :][:16], seed=step)
        assert np.isfinite(out.loss)
    out = evaluate(module, variables, clusters[0])[0]
    assert np.count_nonzero(out.metrics["counts"]) > 32


def test_a_random_codebook_does_not_collapse_and_revival_increases_its_use(clusters):
    def use(threshold, steps, **settings):
        module, variables = fresh(clusters[0], codebook_init="normal", revival_threshold=threshold, **settings)
        revived = 0
        for step in range(steps):
            out, variables = train(module, variables, clusters[step % 4], seed=step)
            revived += int(out.metrics["revived"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
        return np.count_nonzero(out.metrics["counts"]), revived

    dead_use, dead_revived = use(0.0, 24, vq_decay=0.5)
    live_use, live_revived = use(0.2, 24, vq_decay=0.5)
    assert dead_revived == 0 < live_revived
    assert live_use > dead_use + 8
    assert use(0.0, 8)[0] > 16  # the PyTorch VQRAE ends with two embeddings (its golden run uses 28, 2, 2, 1, 1)


@pytest.mark.slow
def test_revival_keeps_total_count_and_positions(clusters):
    """Embeddings in use give half of their count to a revived one and do not move."""
    module, variables = fresh(clusters[0], codebook_init="normal", vq_decay=0.99, decay_warmup=False)
    state = variables["batch_stats"] | {"counts": jnp.ones(64).at[:2].set(1e-6)}
    state["codebook"] = jnp.asarray(clusters[0][:64]).at[:2].set(100.0)
    state["sums"] = state["codebook"] * module._smooth(state["counts"])[:, None]
    out, after = train(module, {"batch_stats": state}, clusters[0])
    _, plain = train(module.clone(revival_threshold=0.0), {"batch_stats": state}, clusters[0])
    after, plain = after["batch_stats"], plain["batch_stats"]
    assert out.metrics["revived"] == out.metrics["starved"] == 2
    np.testing.assert_allclose(after["counts"].sum(), plain["counts"][2:].sum(), rtol=1e-5)
    np.testing.assert_allclose(after["codebook"][2:], plain["codebook"][2:], rtol=1e-4, atol=1e-5)
    gap = np.linalg.norm(np.asarray(after["codebook"])[:2, None] - np.asarray(state["codebook"])[None, 2:], axis=-1)
    assert gap.min(1).max() < 3  # no longer at 100


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_each_latent_revives_at_most_one_embedding(clusters, bad):
    """Otherwise revived embeddings would be equal."""
    module, variables = fresh(clusters[0][:3], codebook_init="normal", decay_warmup=False)
    state = variables["batch_stats"] | {"counts": jnp.full(64, 1e-6).at[0].set(1.0)}  # 63 are dead
    state["codebook"] = jnp.full((64, 8), 100.0).at[0].set(0.0)
    state["sums"] = state["codebook"] * module._smooth(state["counts"])[:, None]
    z = clusters[0][:3].copy()
    z[:bad] = np.nan
    out, after = train(module, {"batch_stats": state}, z)
    moved = np.abs(after["batch_stats"]["codebook"]).max(1) < 50
    assert out.metrics["revived"] == 3 - bad == moved[1:].sum()
    assert len(np.unique(after["batch_stats"]["codebook"][moved], axis=0)) == 4 - bad
    shares = np.asarray(after["batch_stats"]["counts"])[moved]
    np.testing.assert_allclose(shares, shares.mean(), rtol=1e-5)


@pytest.mark.slow
def test_surplus_initial_embeddings_are_starved(clusters):
    """Initial embeddings without latents have a value and a count, but are dead."""
    points = np.repeat(clusters[0][:16], 8, axis=0)
    module, variables = fresh(points)
    out, after = train(module, variables, points)
    state = after["batch_stats"]
    assert out.metrics["starved"] >= 64 - 16
    np.testing.assert_allclose(state["counts"].min(), 0.2 * 128 / 64)
    embeddings = state["sums"] / module._smooth(state["counts"])[:, None]
    np.testing.assert_allclose(embeddings, state["codebook"], rtol=1e-5, atol=1e-6)
    out, _ = train(module, after, points, seed=1)
    assert out.metrics["revived"] == 4  # of 64, at once


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nonfinite_latents_are_reported_and_ignored(clusters, first):
    module, variables = fresh(clusters[0])
    if not first:
        _, variables = train(module, variables, clusters[1])
    z = clusters[0].copy()
    z[[3, 77, 401], [0, 1, 2]] = np.nan, np.inf, -np.inf
    out, after = train(module, variables, z)
    assert out.metrics["nonfinite"] == 3
    assert out.metrics["counts"].sum() == 509
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, after)))
    if first:
        gradient = jit(jax.grad(lambda z: module.apply(after, z).loss))(jnp.asarray(z))
        assert np.isfinite(gradient).all()
    else:
        good, plain = np.delete(z, [3, 77, 401], axis=0), module.clone(revival_threshold=0.0)
        (_, with_bad), (_, without) = train(plain, variables, z), train(plain, variables, good)
        close(with_bad, without)


def test_a_batch_without_a_finite_latent_changes_no_state(clusters, assert_same):
    module, variables = fresh(clusters[0])
    _, before = train(module, variables, clusters[0])
    out, after = train(module, before, np.full_like(clusters[0], np.nan), seed=1)
    assert out.metrics["revived"] == 0
    assert_same(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["kmeans", "data", "normal"])
def test_a_frozen_codebook_changes_in_the_first_batch_only(clusters, start, assert_same):
    module, variables = fresh(clusters[0], frozen=True, codebook_init=start)
    _, skipped = train(module, variables, np.full_like(clusters[0], np.nan))
    assert_same(skipped, variables)
    first, initialized = train(module, skipped, clusters[0])
    learning, _ = train(module.clone(frozen=False), skipped, clusters[0])
    np.testing.assert_array_equal(first.z, learning.z)
    assert (float(first.metrics["quantization_error"]) < 0.5) == (start != "normal")
    _, after = train(module, initialized, clusters[1], seed=1)
    assert_same(after, initialized)
    _, learned = train(module.clone(frozen=False), initialized, clusters[1], seed=1)
    assert_same(train(module, learned, clusters[2])[1], learned)


@pytest.mark.slow
def test_embeddings_have_unit_length_for_cosine(clusters):
    module, variables = fresh(clusters[0], distance="cosine")
    for step in range(4):
        _, variables = train(module, variables, clusters[step], seed=step)
    np.testing.assert_allclose(np.linalg.norm(variables["batch_stats"]["codebook"], axis=1), 1, rtol=1e-5)
    scaled = evaluate(module, variables, 7 * clusters[0])[0]
    np.testing.assert_array_equal(scaled.indices, evaluate(module, variables, clusters[0])[0].indices)
    assert float(scaled.metrics["quantization_error"]) < 0.05


@pytest.mark.slow
def test_eight_devices_update_the_codebook_as_one_device(clusters, mesh):
    """Initialization, updates and revival, with the codebook split over "model"."""
    module, alone = fresh(clusters[0], revival_threshold=0.5)
    axes = {"codebook": P("model"), "sums": P("model"), "counts": P("model"), "step": P()}
    shardings = {"batch_stats": {name: NamedSharding(mesh, axis) for name, axis in axes.items()}}
    sharded = jax.device_put(alone, shardings)
    train_sharded = jit(
        lambda v, z, k: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": k}),
        in_shardings=(shardings, NamedSharding(mesh, P("data")), NamedSharding(mesh, P())),
        out_shardings=(None, shardings),
    )
    revived = 0
    for i in range(4):
        one, alone = train(module, alone, clusters[i], i)
        many, sharded = train_sharded(sharded, clusters[i], jax.random.key(i))
        revived += int(one.metrics["revived"])
        np.testing.assert_array_equal(one.indices, many.indices)
        close((alone, one.loss), (sharded, many.loss))
    assert revived > 0
