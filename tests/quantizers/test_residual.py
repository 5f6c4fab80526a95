import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.gumbel import GumbelQuantizer
from vqrae_jax.quantizers.ibq import IBQ
from vqrae_jax.quantizers.multiscale import MultiScale, averaging_matrix
from vqrae_jax.quantizers.projected import Projected
from vqrae_jax.quantizers.residual import ABSENT, Residual
from vqrae_jax.quantizers.simvq import SimVQ


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


@pytest.mark.parametrize("inner", [SimVQ, IBQ])
def test_a_shared_codebook_begins_with_what_all_levels_code(z, inner):
    """Features have a mean, which what is left over has not."""
    z = z + 3
    level = inner(64, 6, distance="l2")

    def first_error(depth):
        module = Residual((level,) * depth, 6)
        variables = jax.jit(module.init)(jax.random.key(0), z)
        rngs = {"codes": jax.random.key(1)}
        _, state = jax.jit(lambda v: module.apply(v, z, True, mutable=["batch_stats"], rngs=rngs))(variables)
        return module.apply({**variables, **state}, z).metrics["quantization_error"]

    assert first_error(3) < 0.6 * first_error(1)


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


@pytest.mark.parametrize("inner", [EMAQuantizer, SimVQ, IBQ, GumbelQuantizer])
def test_scales_begin_with_as_many_codes_as_there_are(z, inner):
    """The coarsest scale alone has a cell per image, and codes that begin alike stay alike."""
    module = MultiScale(inner(16, z.shape[-1]), z.shape[-1], (1, 2, 4))
    z, rngs = jnp.asarray(z[:4]), {"codes": jax.random.key(1)}
    variables = jax.jit(module.init)(jax.random.key(0), z)
    _, state = jax.jit(lambda v: module.apply(v, z, True, mutable=["batch_stats"], rngs=rngs))(variables)
    codes = np.asarray(module.apply({**variables, **state}, method="embeddings"))
    assert len(np.unique(codes.round(4), axis=0)) == 16


def test_the_gradient_of_straight_through_scales_is_one_straight_through(z):
    module = MultiScale(EMAQuantizer(32, 6), 6, (1, 2, 3, 4))
    variables = jax.jit(module.init)(jax.random.key(0), z)
    given = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    pulled = jax.vjp(lambda z: module.apply(variables, z).z, z)[1](given)[0]
    np.testing.assert_array_equal(pulled, given)


def test_what_decodes_the_scales_learns_from_the_decoder(z):
    """A bias behind the codes moves every latent of every scale, and receives the mean of the scales' gradients."""
    module = MultiScale(Projected(EMAQuantizer(32, 3), 6, 3), 6, (1, 2, 4))
    variables = jax.jit(module.init)(jax.random.key(0), z)
    gradient = jax.grad(lambda params: module.apply({**variables, "params": params}, z).z.sum())(variables["params"])
    np.testing.assert_allclose(gradient["quantizer"]["project_out"]["bias"], np.full(6, 16 * 4 * 4), rtol=1e-5)
    assert np.any(gradient["quantizer"]["project_in"]["kernel"])


def test_a_broken_latent_costs_its_own_cell_alone(z):
    module = MultiScale(EMAQuantizer(32, 6), 6, (1, 2, 4))
    _, variables = trained(module, z)
    bad = z.copy()
    bad[0, 1, 2, 3], bad[5, :2, :2, 0] = np.nan, np.inf  # one latent; all four of a cell of the grid of two
    out = jax.jit(lambda z: module.apply(variables, z))(bad)
    assert out.metrics["nonfinite"] == 5
    assert out.metrics["counts"].sum() == 16 * (1 + 4 + 16) - 5 - 1
    assert np.isfinite(out.z).all()


def test_a_cell_is_the_mean_of_its_finite_latents(z):
    """Copies of one latent that break change nothing in the cell that holds them."""
    module = MultiScale(EMAQuantizer(32, 6), 6, (1, 3, 4))
    _, variables = trained(module, z)
    same = np.broadcast_to(z[:, :1, :1], z.shape).copy()
    bad = same.copy()
    bad[:, 0, 1:], bad[:, 3, 3] = np.nan, -np.inf
    whole, broken = (np.asarray(jax.jit(module.apply)(variables, x).indices) for x in (same, bad))
    np.testing.assert_array_equal(broken[:, 0], whole[:, 0])
    # In the grid of three the cells of the first row are the first and, in part, the second row of latents.
    np.testing.assert_array_equal(broken[:, 1:10], whole[:, 1:10])


def test_averaging_keeps_constants():
    for source, target in ((8, 3), (5, 4), (4, 4)):
        np.testing.assert_allclose(averaging_matrix(source, target).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(averaging_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
