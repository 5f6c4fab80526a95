"""Exact nearest embeddings at nearly the cost of bfloat16 products, for matrix units that are slow in float32.

bfloat16 products rule out all but a few embeddings, which are compared in float32. A bound of their error proves for
nearly every row that no other embedding is nearer. The remaining rows, any number of them, are searched in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int

from vqrae_jax.quantizers.arrays import Codebook, Mask, Nearest, PerEmbedding, PerRow, Rows
from vqrae_jax.quantizers.blocks import Screen, map_rows, split_lanes

CANDIDATES = 4  # embeddings of each row that are compared in float32
SETTLED_ROWS = 4096  # rows whose candidates exist at once, or a thirty-second of all: 13 MB of 768 channels
GROUPS = 256  # of rows; doubtful rows are gathered within their group, so without leaving their device
PARTS = 32  # of each group, searched again one part at a time while any row is doubtful; of real features 2 % are

Best = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

# The neutral element of `_merge`: infinite scores at valid indices.
NO_SCORES = (np.float32(np.inf), np.int32(0), np.float32(np.inf), np.int32(0), np.float32(np.inf))


def search(z: Rows, codebook: Codebook, offsets: PerEmbedding, sizes: Screen, exact: Callable[..., Nearest]) -> Nearest:
    """Returns the lowest index of the smallest offsets[k] - z @ codebook[k], and that score, as `exact` in float32."""
    lanes, lane_offsets, width = split_lanes(codebook, offsets, sizes.codes or len(codebook))
    low_lanes = _to_bfloat16(lanes)
    rows, size = sizes.rows or len(z), len(codebook)
    candidates, floor = map_rows(lambda x: _screen(x, low_lanes, lane_offsets, width, size), rows, z)
    settled = max(SETTLED_ROWS, len(z) // 32)
    index, score = map_rows(lambda *parts: _settle(*parts, codebook, offsets), settled, z, candidates)
    # A row that is not finite has no nearest embedding and need not be searched again.
    doubtful = ~(score + _error_bound(z, codebook) < floor) & jnp.isfinite(jnp.sum(z, axis=1))
    return _search_doubtful(z, doubtful, (index, score), lambda rows: exact(rows, codebook, offsets))


def _merge(a: Best, b: Best) -> Best:
    """Merges two results: the smallest score and its index, the second and its index, the third; ties: lower index."""
    a1, i1, a2, i2, a3 = a
    b1, j1, b2, j2, b3 = b
    ahead = (a1 < b1) | ((a1 == b1) & (i1 < j1))
    first, first_at = jnp.where(ahead, a1, b1), jnp.where(ahead, i1, j1)
    # The remaining scores: the loser and its second, the winner's second and third.
    loser, loser_at, loser_second = jnp.where(ahead, b1, a1), jnp.where(ahead, j1, i1), jnp.where(ahead, b2, a2)
    runner, runner_at, third = jnp.where(ahead, a2, b2), jnp.where(ahead, i2, j2), jnp.where(ahead, a3, b3)
    ahead = (runner < loser) | ((runner == loser) & (runner_at < loser_at))
    second, second_at = jnp.where(ahead, runner, loser), jnp.where(ahead, runner_at, loser_at)
    rest = jnp.where(ahead, jnp.minimum(loser, third), jnp.minimum(runner, loser_second))
    return first, first_at, second, second_at, rest


def _smallest(scores: Float[Array, "*b S"]) -> Best:
    """Reduces the last axis by `_merge`, in one reduction, which XLA for TPU fuses into the products."""
    positions = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    operands = (scores, positions, *(jnp.full(scores.shape, x) for x in NO_SCORES[2:]))
    return tuple(jax.lax.reduce(operands, NO_SCORES, _merge, (scores.ndim - 1,)))


def _screen(
    x: Float[Array, "R C"], lanes: BFloat16[Array, "L S C"], offsets: Float[Array, "L S"], width: int, size: int
) -> tuple[Int[Array, "R M"], Float[Array, " R"]]:
    """Returns CANDIDATES embeddings of every row, and a bfloat16 score that no other embedding is below."""
    count, length = offsets.shape
    low = _to_bfloat16(x)

    def compare(part, offset):
        products = jnp.einsum("rc,lsc->rls", low, part, preferred_element_type=jnp.float32)
        return _smallest(offset - products)

    def visit(best, i):
        part, offset = (jax.lax.dynamic_slice_in_dim(a, i * width, width, axis=1) for a in (lanes, offsets))
        first, first_at, second, second_at, third = compare(part, offset)
        return _merge(best, (first, first_at + i * width, second, second_at + i * width, third)), None

    if length == width:
        first, first_at, second, second_at, third = compare(lanes, offsets)
    else:
        blocks = jnp.arange(length // width, dtype=jnp.int32)
        initial = tuple(jnp.full((len(x), count), value) for value in NO_SCORES)
        (first, first_at, second, second_at, third), _ = jax.lax.scan(visit, initial, blocks)
    scores = jnp.concatenate([first, second], axis=1)
    indices = jnp.concatenate([first_at, second_at], axis=1)
    indices += jnp.tile(jnp.arange(count, dtype=jnp.int32) * (size // count), 2)
    candidates = []
    for _ in range(CANDIDATES):
        least = jnp.min(scores, axis=1, keepdims=True)
        index = jnp.min(jnp.where(scores == least, indices, size - 1), axis=1, keepdims=True)
        scores = jnp.where((scores == least) & (indices == index), jnp.inf, scores)
        candidates.append(index)
    return jnp.concatenate(candidates, axis=1), jnp.minimum(jnp.min(scores, axis=1), jnp.min(third, axis=1))


def _settle(z: Rows, candidates: Int[Array, "N M"], codebook: Codebook, offsets: PerEmbedding) -> Nearest:
    """Returns the best of the candidates in float32."""

    def visit(best, index):
        score = offsets[index] - jnp.sum(z * codebook[index], axis=1)
        better = (score < best[1]) | ((score == best[1]) & (index < best[0]))
        return (jnp.where(better, index, best[0]), jnp.where(better, score, best[1])), None

    initial = (jnp.zeros(len(z), jnp.int32), jnp.full(len(z), jnp.inf))
    return jax.lax.scan(visit, initial, candidates.T)[0]


def _error_bound(z: Rows, codebook: Codebook) -> PerRow:
    """Bounds the difference of both scores: |(z - z') e + z' (e - e')| with rounded z', e', plus rounding of sums."""

    def length(x):
        return jnp.sqrt(jnp.sum(x**2, axis=1))

    # The same rounding as `_to_bfloat16` by another operation: one conversion with two uses would be stored.
    rounded, rounded_codebook = (jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in (z, codebook))
    longest, largest = jnp.max(length(codebook)), jnp.max(length(codebook - rounded_codebook))
    sums = 4 * (z.shape[1] + 2) * np.finfo(np.float32).eps * length(z) * longest
    return length(z - rounded) * longest + length(rounded) * largest + sums


def _search_doubtful(z: Rows, doubtful: Mask, result: Nearest, exact: Callable[[Rows], Nearest]) -> Nearest:
    """Replaces the results of doubtful rows by those of the exact search, some rows of every group at a time."""
    groups = min(GROUPS, len(z) & -len(z))
    rows = z.reshape(groups, -1, z.shape[1])
    replace = jax.vmap(lambda old, at, new: old.at[at].set(new))

    def visit(state):
        doubtful, *result = state
        at = jnp.argsort(~doubtful, axis=1)[:, : -(-rows.shape[1] // PARTS)]
        selected = jnp.take_along_axis(rows, at[..., None], axis=1)
        better = exact(selected.reshape(-1, z.shape[1]))
        result = [replace(old, at, new.reshape(at.shape)) for old, new in zip(result, better, strict=True)]
        return replace(doubtful, at, jnp.zeros_like(at, bool)), *result

    initial = tuple(x.reshape(groups, -1) for x in (doubtful, *result))
    _, index, score = jax.lax.while_loop(lambda state: jnp.any(state[0]), visit, initial)
    return index.reshape(-1), score.reshape(-1)


def _to_bfloat16(x: Float[Array, "*b C"]) -> BFloat16[Array, "*b C"]:
    return x.astype(jnp.bfloat16)
