import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.nearest import nearest


def origin(arrays, **changes):
    """The origin's quantizer and state, as far as ours can hold it."""
    K, C = arrays["init_embedding"].shape
    settings = {"commitment_cost": 0.25, "start": "normal"} | changes
    names = {"codebook": "init_embedding", "counts": "init_ema_cluster_size", "sums": "init_ema_w"}
    state = {ours: arrays[theirs] for ours, theirs in names.items()} | {"started": np.asarray(True)}
    return EMAQuantizer(K, C, **settings), {"batch_stats": jax.tree.map(jnp.asarray, state)}


@functools.partial(jax.jit, static_argnums=0)
def step(module, variables, z, key):
    return module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})


def train(module, variables, z, seed=0):
    return step(module, variables, z, jax.random.key(seed))


@pytest.mark.parametrize("case", ["ema_vq", "ema_vq_warm"])
def test_training_equals_pytorch(golden, assert_close, case):
    arrays = np.load(golden / "quantizers" / f"{case}.npz")
    module, variables = origin(arrays)
    for step, z in enumerate(arrays["z"]):
        out, variables = train(module, variables, z)
        np.testing.assert_array_equal(out.indices, arrays["indices"][step])
        assert_close(out.z, arrays["quantized"][step], 1e-5, "z")
        assert_close(out.loss, arrays["vq_loss"][step], 1e-5, "loss")
        state = variables["batch_stats"]
        for ours, theirs in (("codebook", "embedding"), ("counts", "ema_cluster_size"), ("sums", "ema_w")):
            assert_close(state[ours], arrays[theirs][step], 1e-5, f"{ours} after step {step}")


def test_ties_go_to_the_lowest_index(golden, assert_close):
    arrays = np.load(golden / "quantizers" / "ema_vq_ties.npz")
    module, variables = origin(arrays)
    out, variables = train(module, variables, arrays["z"])
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.loss, arrays["vq_loss"], 1e-5)
    for ours, theirs in (("codebook", "embedding"), ("counts", "ema_cluster_size"), ("sums", "ema_w")):
        assert_close(variables["batch_stats"][ours], arrays[f"after_{theirs}"], 1e-5, ours)
    for block in (1, 3, 16, 100):
        flat = arrays["z"].reshape(-1, arrays["z"].shape[-1])
        found = nearest(jnp.asarray(flat), jnp.asarray(arrays["init_embedding"]), block)
        np.testing.assert_array_equal(found, arrays["indices"].reshape(-1))


def test_gradients_equal_pytorch(golden, assert_close):
    arrays = np.load(golden / "quantizers" / "ema_vq.npz")
    module, variables = origin(arrays, commitment_cost=0.4)
    z = jnp.moveaxis(arrays["grad_z"], 1, -1)
    probe = jnp.moveaxis(arrays["grad_fixed_random"], 1, -1)
    np.testing.assert_array_equal(module.apply(variables, z).indices, arrays["grad_indices"])
    assert_close(module.apply(variables, z).loss, arrays["grad_vq_loss"], 1e-5)
    loss = jax.grad(lambda z: module.apply(variables, z).loss)(z)
    through = jax.grad(lambda z: jnp.sum(module.apply(variables, z).z * probe))(z)
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
    return module, module.init(jax.random.key(0), z)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lookup_is_the_exact_inverse(clusters, dtype):
    z = jnp.asarray(clusters[0], dtype).reshape(2, 16, 16, 8)
    module, variables = fresh(z)
    out = module.apply(variables, z)
    assert out.indices.shape == (2, 16, 16)
    np.testing.assert_array_equal(module.apply(variables, out.indices, method="lookup"), out.z)


def test_evaluation_changes_no_state(clusters):
    module, variables = fresh(clusters[0])
    _, after = module.apply(variables, clusters[0], mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"])


def test_bfloat16_latents_get_the_codes_of_their_float32_values(clusters):
    z = jnp.asarray(clusters[0], jnp.bfloat16)
    module, variables = fresh(z)
    low, high = (module.apply(variables, x).indices for x in (z, z.astype(jnp.float32)))
    np.testing.assert_array_equal(low, high)


def test_first_codes_are_latents_of_the_first_batch(clusters):
    module, variables = fresh(clusters[0], start="data", decay=0.9)
    out, after = train(module, variables, clusters[0])
    rows = {row.tobytes() for row in clusters[0]}
    assert all(row.tobytes() in rows for row in np.asarray(out.z).reshape(-1, 8))
    assert len(np.unique(np.asarray(out.z), axis=0)) > 32
    # A second step must not start over.
    again, _ = train(module, after, clusters[1], seed=1)
    codes = np.asarray(after["batch_stats"]["codebook"])
    assert all((codes == row).all(1).any() for row in np.asarray(again.z)[:16])


def test_revival_moves_dead_codes_to_current_latents(clusters):
    def use(threshold):
        module, variables = fresh(clusters[0], start="normal", decay=0.5, revival_threshold=threshold)
        revived = 0
        for step in range(24):
            out, variables = train(module, variables, clusters[step % 4], seed=step)
            revived += int(out.metrics.get("revived", 0))
        return np.count_nonzero(out.metrics["counts"]), revived, np.asarray(variables["batch_stats"]["codebook"])

    dead_use, dead_revived, _ = use(0.0)
    live_use, live_revived, codebook = use(0.1)
    assert dead_revived == 0 < live_revived
    assert live_use > dead_use + 8
    assert np.isfinite(codebook).all()


def test_no_collapse_from_a_cold_start(clusters):
    """The origin ends with two codes here (its golden run has 28, 2, 2, 1, 1 in use)."""
    module, variables = fresh(clusters[0], start="normal")
    for step in range(8):
        out, variables = train(module, variables, clusters[step % 4], seed=step)
    assert np.count_nonzero(out.metrics["counts"]) > 16


@pytest.mark.parametrize("block", [7, 64, 500])
def test_blocked_search_equals_brute_force(block):
    rng = np.random.default_rng(1)
    z, codebook = rng.normal(size=(300, 5)).astype(np.float32), rng.normal(size=(500, 5)).astype(np.float32)
    distance = ((z[:, None].astype(np.float64) - codebook[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(nearest(jnp.asarray(z), jnp.asarray(codebook), block), distance.argmin(1))
