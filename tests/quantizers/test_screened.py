import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.quantizers import screened
from vqrae_jax.quantizers.blocks import Screen
from vqrae_jax.quantizers.nearest import nearest, nearest_with_distance

WHOLE = Screen(None, None)
REPEATED = 10**6  # the index of rows that are searched again


def latents(N, K, C, spread=1.0, seed=0):
    """Returns rows around embeddings, and the embeddings."""
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(K, C)).astype(np.float32)
    return codebook[rng.integers(0, K, N)] + spread * rng.normal(size=(N, C)).astype(np.float32), codebook


search = jax.jit(nearest_with_distance, static_argnames="block")


@functools.partial(jax.jit, static_argnames="sizes")
def screen(z, codebook, sizes=WHOLE):
    """Returns indices, REPEATED for rows that the exact search receives."""

    def exact(z, *_):
        return jnp.full(len(z), REPEATED), jnp.zeros(len(z))

    return screened.search(z, codebook, 0.5 * jnp.sum(codebook**2, axis=1), sizes, exact)[0]


@pytest.mark.parametrize("sizes", [WHOLE, Screen(512, 256), Screen(100, 96)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_rows_that_are_not_searched_again_are_exact(spread, sizes):
    z, codebook = latents(2048, 1024, 48, spread)
    indices, expected = screen(z, codebook, sizes), search(z, codebook)[0]
    settled = indices != REPEATED
    np.testing.assert_array_equal(indices[settled], expected[settled])
    np.testing.assert_array_equal(search(z, codebook, block=sizes)[0], expected)
    if (spread, sizes) == (1.0, WHOLE):
        assert settled.mean() > 0.9


def test_embeddings_that_are_equal_in_bfloat16_are_searched_again():
    rng = np.random.default_rng(0)
    codebook = (5 + 0.003 * rng.normal(size=(64, 16))).astype(np.float32)
    z = codebook[rng.integers(0, 64, 256)] + 0.001 * rng.normal(size=(256, 16)).astype(np.float32)
    expected = ((z[:, None].astype(np.float64) - codebook[None]) ** 2).sum(-1).argmin(1)
    low = np.asarray(search(jnp.asarray(z, jnp.bfloat16), jnp.asarray(codebook, jnp.bfloat16))[0])
    assert np.mean(low == expected) < 0.5
    np.testing.assert_array_equal(search(z, codebook, block=WHOLE)[0], search(z, codebook)[0])
    assert np.mean(screen(z, codebook) == REPEATED) > 0.9


@pytest.mark.parametrize(
    ("N", "K", "C", "exponent"), [(1, 1, 1, 0), (1, 2, 3, 0), (200, 3, 2, -12), (129, 64, 9, 12), (192, 70, 1, 3)]
)
def test_equals_the_search_in_float32(N, K, C, exponent):
    """For any sizes and magnitudes, with equal embeddings."""
    z, codebook = latents(N, K, C, 0.3)
    codebook = np.concatenate([codebook, codebook[: K // 3]]) * np.float32(2.0**exponent)
    z = z * np.float32(2.0**exponent)
    for block in (WHOLE, Screen(64, 16)):
        index, distance = search(z, codebook, block=block)
        expected_index, expected = search(z, codebook)
        scale = float(np.max(np.sum(z**2, axis=1)) + np.max(np.sum(codebook**2, axis=1)))
        np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=1e-5 * scale)
        other = np.asarray(index) != np.asarray(expected_index)
        assert np.all(np.asarray(distance)[other] <= np.asarray(expected)[other] + 1e-5 * scale)


def test_nonfinite_rows_get_a_valid_index():
    z, codebook = latents(64, 32, 8)
    z[::2] = np.nan
    z[1] = np.inf
    indices = np.asarray(search(z, codebook, block=WHOLE)[0])
    assert np.all((indices >= 0) & (indices < 32))
    np.testing.assert_array_equal(indices[3::2], search(z[3::2], codebook)[0])


def test_smallest_returns_the_three_smallest_scores():
    scores = np.random.default_rng(0).integers(0, 6, (200, 12)).astype(np.float32)
    first, at_first, second, at_second, third = (np.asarray(x) for x in screened._smallest(jnp.asarray(scores)))
    np.testing.assert_array_equal(np.stack([at_first, at_second]).T, np.argsort(scores, axis=1, kind="stable")[:, :2])
    np.testing.assert_array_equal(np.stack([first, second, third]).T, np.sort(scores, axis=1)[:, :3])


@pytest.mark.parametrize(("platform", "screens"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_accelerators_screen_in_bfloat16(platform, screens):
    shapes = (jax.ShapeDtypeStruct((256, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32))
    text = jax.jit(nearest).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert any("dot_general" in line and "xbf16>" in line for line in text.splitlines()) == screens
