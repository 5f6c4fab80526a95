"""Exact nearest codes at nearly the price of bfloat16 products, for matrix units that multiply float32 slowly.

Products of bfloat16 rule out all but a few codes, and those are compared in float32. How far such a product can be off
is bounded (Cauchy and Schwarz), so for nearly every row it is proven that no other code is nearer. Rows for which it is
not are searched in float32 alone, as many as there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.blocks import Screen, lanes_of, over_rows

CANDIDATES = 4  # codes of each row that are compared in float32
SETTLED_ROWS = 4096  # whose candidates exist at once, or a thirty-second of all: 13 MB of 768 channels
GROUPS = 256  # of rows; what is in doubt is gathered within its group, so without leaving its device
PARTS = 32  # of each group, searched again one at a time while any row is in doubt; of real features 2 % are

Found = tuple[Int[Array, " N"], Float[Array, " N"]]
Best = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

# No score at all, at indices that exist.
NOTHING = (np.float32(np.inf), np.int32(0), np.float32(np.inf), np.int32(0), np.float32(np.inf))


def search(
    z: Float[Array, "N C"],
    codes: Float[Array, "K C"],
    offsets: Float[Array, " K"],
    sizes: Screen,
    exact: Callable[..., Found],
) -> Found:
    """The lowest index of the smallest offsets[k] - z @ codes[k], and that value.

    Args:
      sizes: how many rows and codes are screened at once.
      exact: (rows of z, codes, offsets) -> the same, in float32.
    """
    lanes, lane_offsets, width = lanes_of(codes, offsets, sizes.codes or len(codes))
    low_lanes = _low(lanes)
    candidates, floor = over_rows(
        lambda x: _screen(x, low_lanes, lane_offsets, width, len(codes)), sizes.rows or len(z), z
    )
    settled = max(SETTLED_ROWS, len(z) // 32)
    index, score = over_rows(lambda *rows: _settle(*rows, codes, offsets), settled, z, candidates)
    # A row that is not finite has no nearest code, and need not be searched for one.
    doubtful = ~(score + _error(z, codes) < floor) & jnp.isfinite(jnp.sum(z, axis=1))
    return _again(z, doubtful, (index, score), lambda rows: exact(rows, codes, offsets))


def _merge(a: Best, b: Best) -> Best:
    """Of both: the smallest score and its index, the second and its index, and the third; of equals the lower index."""
    a1, i1, a2, i2, a3 = a
    b1, j1, b2, j2, b3 = b
    ahead = (a1 < b1) | ((a1 == b1) & (i1 < j1))
    first, at_first = jnp.where(ahead, a1, b1), jnp.where(ahead, i1, j1)
    # What is left: the loser and its second, the winner's second and third.
    loser, at_loser, losers = jnp.where(ahead, b1, a1), jnp.where(ahead, j1, i1), jnp.where(ahead, b2, a2)
    runner, at_runner, third = jnp.where(ahead, a2, b2), jnp.where(ahead, i2, j2), jnp.where(ahead, a3, b3)
    ahead = (runner < loser) | ((runner == loser) & (at_runner < at_loser))
    second, at_second = jnp.where(ahead, runner, loser), jnp.where(ahead, at_runner, at_loser)
    rest = jnp.where(ahead, jnp.minimum(loser, third), jnp.minimum(runner, losers))
    return first, at_first, second, at_second, rest


def _nothing(shape: tuple[int, ...]) -> Best:
    return tuple(jnp.full(shape, x) for x in NOTHING)


def _least(scores: Float[Array, "*b S"]) -> Best:
    """`_merge` of the last axis, in one reduction, which XLA for TPU fuses into the products."""
    positions = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    given = (scores, positions, *_nothing(scores.shape)[2:])
    return tuple(jax.lax.reduce(given, NOTHING, _merge, (scores.ndim - 1,)))


def _screen(
    x: Float[Array, "R C"], lanes: Float[Array, "L S C"], offsets: Float[Array, "L S"], width: int, size: int
) -> tuple[Int[Array, "R M"], Float[Array, " R"]]:
    """CANDIDATES codes of every row, and a score by bfloat16 products that no other code is below."""
    count, length = offsets.shape
    low = _low(x)

    def look(part: Float[Array, "L S C"], offset: Float[Array, "L S"]) -> Best:
        products = jnp.einsum("rc,lsc->rls", low, part, preferred_element_type=jnp.float32)
        return _least(offset - products)

    def visit(best: Best, i: jax.Array) -> tuple[Best, None]:
        part, offset = (jax.lax.dynamic_slice_in_dim(a, i * width, width, axis=1) for a in (lanes, offsets))
        first, at_first, second, at_second, third = look(part, offset)
        return _merge(best, (first, at_first + i * width, second, at_second + i * width, third)), None

    if length == width:
        first, at_first, second, at_second, third = look(lanes, offsets)
    else:
        blocks = jnp.arange(length // width, dtype=jnp.int32)
        (first, at_first, second, at_second, third), _ = jax.lax.scan(visit, _nothing((len(x), count)), blocks)
    scores = jnp.concatenate([first, second], axis=1)
    indices = jnp.concatenate([at_first, at_second], axis=1)
    indices += jnp.tile(jnp.arange(count, dtype=jnp.int32) * (size // count), 2)
    chosen = []
    for _ in range(CANDIDATES):
        least = jnp.min(scores, axis=1, keepdims=True)
        index = jnp.min(jnp.where(scores == least, indices, size - 1), axis=1, keepdims=True)
        scores = jnp.where((scores == least) & (indices == index), jnp.inf, scores)
        chosen.append(index)
    return jnp.concatenate(chosen, axis=1), jnp.minimum(jnp.min(scores, axis=1), jnp.min(third, axis=1))


def _settle(
    z: Float[Array, "R C"], candidates: Int[Array, "R M"], codes: Float[Array, "K C"], offsets: Float[Array, " K"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The best of the candidates in float32."""

    def visit(best: tuple[jax.Array, jax.Array], index: Int[Array, " R"]) -> tuple[tuple[jax.Array, jax.Array], None]:
        score = offsets[index] - jnp.sum(z * codes[index], axis=1)
        better = (score < best[1]) | ((score == best[1]) & (index < best[0]))
        return (jnp.where(better, index, best[0]), jnp.where(better, score, best[1])), None

    start = (jnp.zeros(len(z), jnp.int32), jnp.full(len(z), jnp.inf))
    return jax.lax.scan(visit, start, candidates.T)[0]


def _error(z: Float[Array, "N C"], codes: Float[Array, "K C"]) -> Float[Array, " N"]:
    """How far two such scores can be apart: |(z - z') c + z' (c - c')|, c' being rounded, and the rounding of sums."""

    def length(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x**2, axis=1))

    # As `_low`, by another operation: what is converted once for two uses would be stored.
    rounded, rounded_codes = (jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in (z, codes))
    longest, farthest = jnp.max(length(codes)), jnp.max(length(codes - rounded_codes))
    sums = 4 * (z.shape[1] + 2) * np.finfo(np.float32).eps * length(z) * longest
    return length(z - rounded) * longest + length(rounded) * farthest + sums


def _again(
    z: Float[Array, "N C"], doubtful: Bool[Array, " N"], found: Found, exact: Callable[[Float[Array, "M C"]], Found]
) -> Found:
    """What was found, but for rows in doubt, which are searched exactly, some of every group at a time."""
    groups = min(GROUPS, len(z) & -len(z))
    rows = z.reshape(groups, -1, z.shape[1])
    replace = jax.vmap(lambda old, at, new: old.at[at].set(new))

    def visit(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        doubtful, *found = state
        at = jnp.argsort(~doubtful, axis=1)[:, : -(-rows.shape[1] // PARTS)]
        chosen = jnp.take_along_axis(rows, at[..., None], axis=1)
        better = exact(chosen.reshape(-1, z.shape[1]))
        found = [replace(old, at, new.reshape(at.shape)) for old, new in zip(found, better, strict=True)]
        return replace(doubtful, at, jnp.zeros_like(at, bool)), *found

    start = tuple(x.reshape(groups, -1) for x in (doubtful, *found))
    _, index, score = jax.lax.while_loop(lambda state: jnp.any(state[0]), visit, start)
    return index.reshape(-1), score.reshape(-1)


def _low(x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    return x.astype(jnp.bfloat16)
