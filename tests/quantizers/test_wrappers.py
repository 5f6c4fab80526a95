import jax
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.wrappers import Whitened, fitted_state


def test_latents_are_quantized_in_their_leading_axes_at_variance_one(train):
    """Latents of rank 2 in 5 channels, variances 100 and 0.01."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(5, 5)))[0][:, :2]
    z = (7 + rng.normal(size=(1024, 2)) * [10, 0.1] @ axes.T).astype(np.float32)
    module = Whitened(EMAQuantizer(64, 2), 5)
    out, variables = train(module, z, 10)
    state = variables["batch_stats"]
    np.testing.assert_allclose(state["mean"], z.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state["deviation"], [10, 0.1], rtol=0.1)
    np.testing.assert_allclose(np.abs(state["basis"].T @ axes), np.eye(2), atol=1e-2)
    np.testing.assert_allclose(np.std(state["quantizer"]["codebook"], axis=0), 1, atol=0.3)
    # The error of each axis is a fraction of its own variance.
    errors = ((np.asarray(out.z) - z) @ axes) ** 2
    assert np.all(errors.mean(0) < 0.2 * np.asarray([100, 0.01]))


@pytest.mark.slow
def test_training_does_not_change_two_of_four_axes_that_were_set():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 4)))[0].astype(np.float32)
    state = fitted_state(np.full(5, 3.0, np.float32), basis, np.float32([16, 4, 1, 0.25]), 2)
    module = Whitened(EMAQuantizer(8, 2), 5)
    z = rng.normal(size=(64, 5)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), z)
    variables["batch_stats"] |= state
    train = jax.jit(lambda v: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": jax.random.key(0)}))
    _, after = train(variables)
    for name, value in state.items():
        np.testing.assert_array_equal(after["batch_stats"][name], value)
    np.testing.assert_array_equal(state["basis"], basis[:, :2])
    np.testing.assert_allclose(state["deviation"], [4, 2])
