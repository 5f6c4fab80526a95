import jax
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.multiscale import MultiScale, averaging_matrix
from vqrae_jax.quantizers.residual import ABSENT, Residual
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.wrappers import Projected


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(16, 4, 4, 6)).astype(np.float32)


LEVELS = Residual(EMAQuantizer(32, 6), 3)
SCALES = MultiScale(EMAQuantizer(32, 6), (1, 2, 4))
RANDOM = EMAQuantizer(32, 6, codebook_init="normal")  # needs no training before it is used


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "prefixes"),
    [(LEVELS, (1, 2, 3)), pytest.param(SCALES, (1, 5, 21), marks=pytest.mark.slow)],
    ids=["levels", "scales"],
)
def test_longer_prefixes_decode_closer(z, train, module, prefixes):
    _, variables = train(module, z, 6)
    indices = jax.jit(module.apply)(variables, z).indices
    lookup = jax.jit(lambda i: module.apply(variables, i, method="lookup"))
    errors = [np.mean((lookup(indices[..., :length]) - z) ** 2) for length in prefixes]
    assert errors[0] > errors[1] > errors[2]
    assert indices.shape[-1] == prefixes[2]
    assert module.prefixes == prefixes
    if module is LEVELS:
        np.testing.assert_array_equal(lookup(indices.at[..., 2].set(ABSENT)), lookup(indices[..., :2]))
    with pytest.raises(ValueError, match="4" if module is LEVELS else "1, 5, 21"):
        lookup(np.zeros((2, 4), np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [SimVQ, IBQ])
def test_a_shared_codebook_starts_from_latents_and_residuals(z, inner, train):
    z = z + 3  # features have a mean, residuals have none
    level = inner(64, 6, distance="l2")

    def first_error(depth):
        return train(Residual(level, depth, shared=True), z, 2)[0].metrics["quantization_error"]

    assert first_error(3) < 0.6 * first_error(1)


def test_dropout_keeps_one_prefix_per_image(z, train):
    out, _ = train(Residual(RANDOM, 3, dropout=1.0), z)
    present = np.asarray(out.indices) != ABSENT
    depth = present.sum(-1)
    assert set(np.unique(depth)) == {1, 2}
    assert (depth == depth[:, :1, :1]).all()
    np.testing.assert_array_equal(present, np.arange(3) < depth[..., None])


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner", [EMAQuantizer, *(pytest.param(q, marks=pytest.mark.slow) for q in (SimVQ, IBQ, GumbelQuantizer))]
)
def test_initial_embeddings_of_scales_differ(z, inner, train):
    """The coarsest scale alone has fewer cells than embeddings."""
    module = MultiScale(inner(16, 6), (1, 2, 4))
    _, variables = train(module, z[:4])
    embeddings = np.asarray(jax.jit(lambda v: module.apply(v, method="embeddings"))(variables))
    assert len(np.unique(embeddings.round(4), axis=0)) == 16


@pytest.mark.slow
def test_the_gradient_of_levels_and_scales_is_one_straight_through(z):
    module = Residual(FSQ((5,) * 6, 6, adapter="none"), 3)
    gradient = jax.jit(jax.grad(lambda z: module.apply({}, z).z.sum()))(z)
    np.testing.assert_allclose(gradient, 2 * np.ones_like(z), rtol=1e-6)  # each level scales by (5 - 1) / 2
    module = MultiScale(RANDOM, (1, 2, 3, 4))
    variables = jax.jit(module.init)(jax.random.key(0), z)
    cotangent = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda z: (cotangent * module.apply(variables, z).z).sum()))(z)
    np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.slow
def test_projections_of_scales_receive_the_mean_of_their_gradients(z):
    module = MultiScale(Projected(EMAQuantizer(32, 3), 6), (1, 2, 4))
    variables = jax.jit(module.init)(jax.random.key(0), z)
    gradient = jax.jit(jax.grad(lambda p: module.apply({**variables, "params": p}, z).z.sum()))(variables["params"])
    np.testing.assert_allclose(gradient["quantizer"]["project_out"]["bias"], np.full(6, 16 * 4 * 4), rtol=1e-5)
    assert np.any(gradient["quantizer"]["project_in"]["kernel"])


def test_nonfinite_latents_are_ignored_by_their_cells_only(z):
    module = MultiScale(RANDOM, (1, 2, 4))
    variables = jax.jit(module.init)(jax.random.key(0), z)
    bad = z.copy()
    bad[0, 1, 2, 3], bad[5, :2, :2, 0] = np.nan, np.inf  # one latent; all four of a cell of the grid of two
    out = jax.jit(module.apply)(variables, bad)
    assert out.metrics["nonfinite"] == 5
    assert out.metrics["counts"].sum() == 16 * (1 + 4 + 16) - 5 - 1
    assert np.isfinite(out.z).all()


def test_a_cell_is_the_mean_of_its_finite_latents(z):
    """Cells of equal latents do not change if some of these are not finite."""
    module = MultiScale(RANDOM, (1, 3, 4))
    variables, apply = jax.jit(module.init)(jax.random.key(0), z), jax.jit(module.apply)
    same = np.broadcast_to(z[:, :1, :1], z.shape).copy()
    bad = same.copy()
    bad[:, 0, 1:], bad[:, 3, 3] = np.nan, -np.inf
    expected, indices = (np.asarray(apply(variables, x).indices) for x in (same, bad))
    np.testing.assert_array_equal(indices[:, 0], expected[:, 0])
    # In the grid of three the cells of the first row are the first and, in part, the second row of latents.
    np.testing.assert_array_equal(indices[:, 1:10], expected[:, 1:10])


def test_averaging_keeps_constants():
    for source, target in ((8, 3), (5, 4), (4, 4)):
        np.testing.assert_allclose(averaging_matrix(source, target).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(averaging_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
