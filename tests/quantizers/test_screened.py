"""The search by bfloat16 products first: what it rules out is ruled out for good, and it searches little again."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.quantizers import screened
from vqrae_jax.quantizers.blocks import Screen
from vqrae_jax.quantizers.nearest import nearest, nearest_with_distance

WHOLE = Screen(None, None)
LOST = 10**6  # an index that only rows which were searched again can have


def latents(N, K, C, spread=1.0, seed=0):
    """Codes, and rows around them."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(K, C)).astype(np.float32)
    return codes[rng.integers(0, K, N)] + spread * rng.normal(size=(N, C)).astype(np.float32), codes


search = jax.jit(nearest_with_distance, static_argnames="block")


@functools.partial(jax.jit, static_argnames="sizes")
def first_look(z, codes, sizes=WHOLE):
    """Indices before anything is searched again, LOST where it would be."""
    offsets = 0.5 * jnp.sum(codes**2, axis=1)
    return screened.search(z, codes, offsets, sizes, lambda x, *_: (jnp.full(len(x), LOST), jnp.zeros(len(x))))[0]


@pytest.mark.parametrize("sizes", [WHOLE, Screen(512, 256), Screen(100, 96)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_what_is_not_searched_again_is_right(spread, sizes):
    z, codes = latents(2048, 1024, 48, spread)
    looked, right = first_look(z, codes, sizes), search(z, codes)[0]
    again = looked == LOST
    np.testing.assert_array_equal(looked[~again], right[~again])
    np.testing.assert_array_equal(search(z, codes, block=sizes)[0], right)


def test_little_is_searched_again():
    """Of 128 rows in each group none to a few, four of which are searched at a time."""
    z, codes = latents(32_768, 512, 48)
    assert np.mean(first_look(z, codes) == LOST) < 0.1


def test_bfloat16_alone_would_be_wrong():
    """Codes in one place, closer than bfloat16 tells apart, and rows among them: all of it is searched again."""
    rng = np.random.default_rng(0)
    codes = (5 + 0.003 * rng.normal(size=(64, 16))).astype(np.float32)
    z = codes[rng.integers(0, 64, 256)] + 0.001 * rng.normal(size=(256, 16)).astype(np.float32)
    right = ((z[:, None].astype(np.float64) - codes[None]) ** 2).sum(-1).argmin(1)
    low = np.asarray(search(jnp.asarray(z, jnp.bfloat16), jnp.asarray(codes, jnp.bfloat16))[0])
    assert np.mean(low == right) < 0.5
    np.testing.assert_array_equal(search(z, codes, block=WHOLE)[0], search(z, codes)[0])
    assert np.mean(first_look(z, codes) == LOST) > 0.9


@pytest.mark.parametrize(
    ("N", "K", "C", "exponent"), [(1, 1, 1, 0), (1, 2, 3, 0), (200, 3, 2, -12), (129, 64, 9, 12), (192, 70, 1, 3)]
)
def test_equals_the_search_in_float32(N, K, C, exponent):
    """Of any sizes and magnitudes, with equal codes."""
    z, codes = latents(N, K, C, 0.3)
    codes = np.concatenate([codes, codes[: K // 3]]) * np.float32(2.0**exponent)
    z = z * np.float32(2.0**exponent)
    for block in (WHOLE, Screen(64, 16)):
        index, distance = search(z, codes, block=block)
        right, expected = search(z, codes)
        scale = float(np.max(np.sum(z**2, axis=1)) + np.max(np.sum(codes**2, axis=1)))
        np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=1e-5 * scale)
        other = np.asarray(index) != np.asarray(right)
        assert np.all(np.asarray(distance)[other] <= np.asarray(expected)[other] + 1e-5 * scale)


def test_broken_rows_get_some_code_and_hold_nothing_up():
    z, codes = latents(64, 32, 8)
    z[::2] = np.nan
    z[1] = np.inf
    found = np.asarray(search(z, codes, block=WHOLE)[0])
    assert np.all((found >= 0) & (found < 32))
    np.testing.assert_array_equal(found[3::2], search(z[3::2], codes)[0])


@pytest.mark.parametrize("seed", range(5))
def test_merging_keeps_the_three_smallest(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (40, 12)).astype(np.float32)
    first, at_first, second, at_second, third = (np.asarray(x) for x in screened._smallest(jnp.asarray(scores)))
    order = np.argsort(scores, axis=1, kind="stable")
    rows = np.arange(40)
    np.testing.assert_array_equal(at_first, order[:, 0])
    np.testing.assert_array_equal(at_second, order[:, 1])
    np.testing.assert_array_equal(np.stack([first, second, third]), [scores[rows, order[:, i]] for i in range(3)])


@pytest.mark.parametrize("codes", [P(), P("model")], ids=["replicated", "sharded"])
def test_rows_stay_on_their_devices(codes):
    """4x2 devices: whether any row is in doubt crosses them, and of sharded codes the candidates."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    z, codebook = latents(1024, 2048, 8)
    rows = NamedSharding(mesh, P("data"))
    program = jax.jit(
        lambda z, c: nearest(z, c, block=WHOLE), in_shardings=(rows, NamedSharding(mesh, codes)), out_shardings=rows
    )
    text = program.lower(z, codebook).compile().as_text()
    crossing = re.findall(r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text)
    largest = max(
        np.prod([int(n) for n in dims.split(",") if n])
        for shape, _ in crossing
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    )
    assert largest <= (1 if codes == P() else z.size // 4)
    np.testing.assert_array_equal(program(z, codebook), search(z, codebook)[0])


@pytest.mark.parametrize(("platform", "screens"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_accelerators_multiply_bfloat16_first(platform, screens):
    shapes = (jax.ShapeDtypeStruct((256, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32))
    text = jax.jit(nearest).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert bool(re.search(r"dot_general.*xbf16>", text)) == screens
