"""Exact search for the nearest embedding that never holds the N x K matrix of distances.

The search visits blocks of rows and of the codebook and keeps the best result so far. The layout of the blocks keeps
sharded rows and a sharded codebook on their devices: every device searches its own embeddings for its own rows, and
only the distance and index of the best cross devices. Where float32 products are slow, bfloat16 products come first
(`screened`); then candidates of a sharded codebook cross devices as well.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import screened
from vqrae_jax.quantizers.arrays import AnyArray, Codebook, Indices, Nearest, PerEmbedding, Rows
from vqrae_jax.quantizers.blocks import Block, Screen, map_rows, split_lanes

Distance = Literal["l2", "cosine", "angle", "dot"]
Method = Block | Screen | Literal["float32"]

# On a CPU the scores of a block (4 MiB) must stay in the cache between the product and the two passes that reduce them;
# on a GPU blocks only bound the memory (256 MiB). XLA for TPU fuses the reduction of scores into their products.
CPU_BLOCK = Block(512, 2048)
DEFAULT_BLOCK = Block(16_384, 4096)
GPU_SCREEN = Screen(*DEFAULT_BLOCK)
TPU_SCREEN = Screen(None, None)
FOLDS = 16  # with eight, XLA for CPU subtracts again in every comparison, and the search takes three times as long


def nearest(z: Rows, codebook: Codebook, distance: Distance = "l2", block: Method | None = None) -> Indices:
    """Returns the int32 index of the nearest embedding of each row; ties go to the lowest index.

    Distances are float32 for any input dtype: in bfloat16 about one token in a hundred changes its index. There is no
    gradient. Memory beyond the arguments is O(N * block), in practice O(N + block).

    Args:
      z: latents. A row that is not finite gets any index in [0, K).
      codebook: finite embeddings.
      distance: "l2", "cosine" or "angle" (the largest cosine, for any lengths), or "dot" (the largest product).
      block: the method, by default "float32" on a CPU and a Screen elsewhere. A Screen rules out most embeddings with
        bfloat16 products, with the same result; a Block is float32 in blocks of other sizes.
    """
    return nearest_with_distance(z, codebook, distance, block)[0]


def nearest_with_distance(
    z: Rows, codebook: Codebook, distance: Distance = "l2", block: Method | None = None
) -> Nearest:
    """Returns indices as `nearest`, and squared distances for "l2", at least zero and accurate relative to |z|^2.

    For the others the second result is minus the largest product of z with a (unit) embedding.
    """
    z, codebook = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (z, codebook))
    codebook = unit(codebook) if distance in ("cosine", "angle") else codebook
    offsets = 0.5 * jnp.sum(codebook**2, axis=1) if distance == "l2" else jnp.zeros(len(codebook))
    index, score = _search_method(block)(z, codebook, offsets)
    return index, jnp.maximum(2 * score + jnp.sum(z**2, axis=1), 0.0) if distance == "l2" else score


def nearest_other(codebook: Codebook, sample: int = 512) -> Float[Array, " sample"]:
    """Returns Euclidean distances from `sample` embeddings, evenly over the codebook, to the nearest other one."""
    codebook, sample = jax.lax.stop_gradient(jnp.asarray(codebook, jnp.float32)), min(sample, len(codebook))
    selected = np.arange(sample) * len(codebook) // sample
    neighbors = find_neighbors(codebook, selected, 1)[:, 0]
    return jnp.linalg.norm(codebook[selected] - codebook[neighbors], axis=1)


def find_neighbors(codebook: Codebook, indices: Indices, count: int) -> Int[Array, "N count"]:
    """Returns the indices of the `count` nearest other embeddings of embeddings `indices`, by increasing distance.

    Distances are Euclidean; those of 2^25 pairs exist at once (128 MiB).
    """
    codebook = jax.lax.stop_gradient(jnp.asarray(codebook, jnp.float32))
    codebook -= jnp.mean(codebook, axis=0)  # products of vectors far from zero would lose digits
    offsets, numbers = 0.5 * jnp.sum(codebook**2, axis=1), jnp.arange(len(codebook))

    def search(rows: Indices) -> Int[Array, "R count"]:
        scores = _scores(codebook[rows], codebook, offsets)
        return jax.lax.top_k(jnp.where(rows[:, None] == numbers, -jnp.inf, -scores), count)[1]

    return map_rows(search, max(1, 2**25 // len(codebook)), jnp.asarray(indices))


def unit(x: Float[AnyArray, "*b C"]) -> Float[Array, "*b C"]:
    """Scales x to length one; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def _search_method(block: Method | None) -> Callable[..., Nearest]:
    """Returns a function that finds the lowest index of the smallest offsets[k] - z @ codebook[k], and that score."""
    if isinstance(block, Screen):
        return functools.partial(screened.search, sizes=block, exact=_search_float32)
    if isinstance(block, Block):
        return functools.partial(_search_blocks, block=block)
    if block == "float32":
        return _search_float32
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=_search_float32,
        tpu=functools.partial(screened.search, sizes=TPU_SCREEN, exact=_search_float32),
        default=functools.partial(screened.search, sizes=GPU_SCREEN, exact=_search_float32),
    )


def _search_float32(z: Rows, codebook: Codebook, offsets: PerEmbedding) -> Nearest:
    return jax.lax.platform_dependent(
        *(z, codebook, offsets),
        cpu=functools.partial(_search_blocks, block=CPU_BLOCK),
        tpu=_search_at_once,
        default=functools.partial(_search_blocks, block=DEFAULT_BLOCK),
    )


def _search_at_once(z: Rows, codebook: Codebook, offsets: PerEmbedding) -> Nearest:
    """Searches in one expression, for compilers that fuse the arg-min into the product, as XLA for TPU does."""
    scores = _scores(z, codebook, offsets)
    return jnp.argmin(scores, axis=1).astype(jnp.int32), jnp.min(scores, axis=1)


def _search_blocks(z: Rows, codebook: Codebook, offsets: PerEmbedding, block: Block) -> Nearest:
    lanes, lane_offsets, width = split_lanes(codebook, offsets, block.codes)
    return map_rows(lambda x: _search_lanes(x, lanes, lane_offsets, width, len(codebook)), block.rows, z)


def _search_lanes(
    x: Float[AnyArray, "R C"], lanes: Float[AnyArray, "L S C"], offsets: Float[AnyArray, "L S"], width: int, size: int
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Keeps the best embedding of every lane and column, block by block, and compares columns and lanes at the end."""
    count, length = offsets.shape
    folds = FOLDS if width % FOLDS == 0 else 1
    columns = width // folds

    def visit(best, i):
        part = jax.lax.dynamic_slice_in_dim(lanes, i * width, width, axis=1)
        offset = jax.lax.dynamic_slice_in_dim(offsets, i * width, width, axis=1)
        scores = _scores(x, part.reshape(count * width, -1), offset.reshape(-1)).reshape(len(x), count, width)
        score, fold = _first_minimum(jnp.split(scores, folds, axis=-1))
        better = score < best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, i * folds + fold, best[1])), None

    shape = len(x), count, columns
    initial = (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32))
    (score, fold), _ = jax.lax.scan(visit, initial, jnp.arange(length // width, dtype=jnp.int32))
    lane, column = jnp.arange(count, dtype=jnp.int32)[:, None], jnp.arange(columns, dtype=jnp.int32)
    index = lane * (size // count) + fold * columns + column
    best = jnp.min(score, axis=(1, 2), keepdims=True)
    return jnp.min(jnp.where(score == best, index, size - 1), axis=(1, 2)), best[:, 0, 0]


def _first_minimum(parts: list[Float[Array, "*b S"]]) -> tuple[Float[Array, "*b S"], Int[Array, "*b S"]]:
    """Returns the smallest of some arrays, element by element, and the number of the first array that has it.

    XLA for CPU vectorizes comparisons of arrays, but neither an arg-min nor a minimum along the last axis.
    """
    score = functools.reduce(jnp.minimum, parts)
    number = jnp.full(score.shape, len(parts) - 1, jnp.int32)
    for i in reversed(range(len(parts) - 1)):
        number = jnp.where(parts[i] == score, i, number)
    return score, number


def _scores(z: Rows, codebook: Codebook, offsets: PerEmbedding) -> Float[Array, "N K"]:
    """Returns half the squared distance minus |z|^2 / 2, which is equal for all embeddings."""
    return offsets - jnp.dot(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
