import jax
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.multiscale import MultiScale, averaging, bicubic
from vqrae_jax.quantizers.residual import ABSENT, Residual


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(16, 4, 4, 6)).astype(np.float32)


def trained(module, z, steps=6):
    variables = jax.jit(module.init)(jax.random.key(0), z)
    step = jax.jit(lambda v, k: module.apply(v, z, True, mutable=["batch_stats"], rngs={"codes": k}))
    for i in range(steps):
        out, state = step(variables, jax.random.key(i))
        variables = {**variables, **state}
    return out, variables


def test_longer_prefixes_decode_closer(z):
    module = Residual(tuple(EMAQuantizer(32, 6) for _ in range(3)), 6)
    _, variables = trained(module, z)
    out = jax.jit(module.apply)(variables, z)
    lookup = jax.jit(lambda i: module.apply(variables, i, method="lookup"))
    errors = [np.mean((lookup(out.indices[..., :depth]) - z) ** 2) for depth in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    cut = out.indices.at[..., 2].set(ABSENT)
    np.testing.assert_array_equal(lookup(cut), lookup(out.indices[..., :2]))
    with pytest.raises(ValueError, match="4 levels"):
        module.apply(variables, np.zeros((2, 4), np.int32), method="lookup")


def test_dropout_keeps_one_prefix_per_image(z):
    module = Residual(tuple(EMAQuantizer(32, 6) for _ in range(3)), 6, dropout=1.0)
    out, _ = trained(module, z)
    there = np.asarray(out.indices) != ABSENT
    depth = there.sum(-1)
    assert set(np.unique(depth)) == {1, 2}
    assert (depth == depth[:, :1, :1]).all()
    np.testing.assert_array_equal(there, np.arange(3) < depth[..., None])


def test_the_gradient_is_one_straight_through_however_deep(z):
    module = Residual(tuple(FSQ((5,) * 6, 6, adapter="none") for _ in range(3)), 6)
    pulled = jax.vjp(lambda z: module.apply({}, z).z, z)[1](np.ones_like(z))[0]
    np.testing.assert_allclose(pulled, 2 * np.ones_like(z), rtol=1e-6)  # each level scales by (5 - 1) / 2


def test_multiscale_prefixes_decode_closer_and_bad_lengths_are_named(z):
    module = MultiScale(EMAQuantizer(32, 6), 6, (1, 2, 4))
    _, variables = trained(module, z)
    out = jax.jit(module.apply)(variables, z)
    assert out.indices.shape == (16, 21)
    lookup = jax.jit(lambda i: module.apply(variables, i, method="lookup"))
    errors = [np.mean((lookup(out.indices[:, :n]) - z) ** 2) for n in (1, 5, 21)]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match=r"\[1, 5, 21\]"):
        module.apply(variables, out.indices[:, :7], method="lookup")


def test_resampling_keeps_constants_and_equals_pytorch(golden):
    for source, target in ((8, 3), (5, 4), (4, 4)):
        np.testing.assert_allclose(averaging(source, target).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(averaging(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(bicubic(3, 7).sum(1), 1, rtol=1e-6)
    arrays = np.load(golden / "resize.npz")
    name = next(n for n in arrays.files if n.startswith("bicubic_") and "antialias" not in n and n.endswith("_in"))
    image, expected = arrays[name], arrays[name.removesuffix("_in") + "_out"]
    rows, columns = (bicubic(image.shape[i], expected.shape[i]) for i in (1, 2))
    found = np.einsum("is,jt,bstc->bijc", rows, columns, image)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
