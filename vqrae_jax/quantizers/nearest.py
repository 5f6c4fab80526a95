"""Exact nearest-code search that never holds the N x K matrix of distances.

The search walks over blocks of rows and of codes and keeps the best so far. It needs no knowledge of a mesh: rows and
codes are laid out so that rows sharded over one mesh axis and codes sharded over another stay where they are, every
device searches its own codes for its own rows, and only (distance, index) of the best crosses devices. Where float32 is
slow to multiply, products of bfloat16 come first (`screened`); candidates among sharded codes then cross devices too.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import screened
from vqrae_jax.quantizers.blocks import Block, Screen, lanes_of, over_rows, strided

Distance = Literal["l2", "cosine", "dot"]


class Tile(NamedTuple):
    """What one program of the GPU kernel (`nearest_gpu`) holds on its chip.

    precision "highest" multiplies in float32; "TF32_TF32_F32_X3" adds three products of tensor cores, whose error is
    about that of float32.
    """

    rows: int = 128
    codes: int = 128
    channels: int = 32
    warps: int = 8
    stages: int = 3
    precision: str = "highest"


Way = Block | Screen | Tile | Literal["float32"]

# On a CPU a block's scores (4 MiB) must stay in the cache between the matmul and the two passes that reduce them; on a
# GPU blocks need only bound the memory (256 MiB). XLA for TPU fuses what reduces scores into their products.
CPU_BLOCK = Block(1024, 1024)
DEFAULT_BLOCK = Block(16_384, 4096)
GPU_SCREEN = Screen(*DEFAULT_BLOCK)
TPU_SCREEN = Screen(None, None)


def nearest(
    z: Float[Array, "N C"], codebook: Float[Array, "K C"], distance: Distance = "l2", block: Way | None = None
) -> Int[Array, " N"]:
    """The index of the nearest code of each row; ties go to the lowest index.

    Distances are float32 whatever the input: in bfloat16 about one token in a hundred changes its code. No gradient
    passes.

    Args:
      z: latents. A row that is not finite gets some index in [0, K).
      codebook: codes, finite.
      distance: "l2", "cosine" (the largest cosine of the angle, whatever the lengths) or "dot" (the largest product).
      block: a way to search instead of the backend's own, which is "float32" on a CPU and a Screen elsewhere: there
        products of bfloat16 first rule out most codes, with the same result. A Block is float32 in blocks of other
        sizes, a Tile a kernel for GPUs.

    Returns:
      Int32 in [0, K). Memory beyond the arguments is O(N * block), in practice O(N + block).
    """
    return nearest_with_distance(z, codebook, distance, block)[0]


def nearest_with_distance(
    z: Float[Array, "N C"], codebook: Float[Array, "K C"], distance: Distance = "l2", block: Way | None = None
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """As `nearest`, and for "l2" the squared distance, at least zero and good to float32 relative to |z|^2.

    For "cosine" and "dot" the second is minus the largest product of z with a (unit) code.
    """
    z, codes = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (z, codebook))
    codes = unit(codes) if distance == "cosine" else codes
    offsets = 0.5 * jnp.sum(codes**2, axis=1) if distance == "l2" else jnp.zeros(len(codes))
    index, score = _way(block)(z, codes, offsets)
    return index, jnp.maximum(2 * score + jnp.sum(z**2, axis=1), 0.0) if distance == "l2" else score


def nearest_other(codes: Float[Array, "K C"], sample: int = 512) -> Float[Array, " sample"]:
    """Distances from codes to the nearest other one: how far a codebook has spread, and whether codes coincide.

    Args:
      codes: at least two.
      sample: of so many codes, evenly over the codebook; each is compared with all. At most K.

    Returns:
      Euclidean distances; their squares are good to float32 relative to the codebook's extent.
    """
    codes = jax.lax.stop_gradient(codes).astype(jnp.float32)
    codes -= jnp.mean(codes, axis=0)
    sample = min(sample, len(codes))
    chosen = np.arange(sample) * len(codes) // sample
    from_codes = codes[chosen]
    blocks, numbers = strided(codes, DEFAULT_BLOCK.codes), strided(jnp.arange(1, len(codes) + 1), DEFAULT_BLOCK.codes)

    def visit(best, i):
        part = jax.lax.dynamic_index_in_dim(blocks, i, axis=1, keepdims=False)
        number = jax.lax.dynamic_index_in_dim(numbers, i, axis=1, keepdims=False)  # from one: zero is padding
        scores = 2 * _scores(from_codes, part, 0.5 * jnp.sum(part**2, axis=1))
        other = (number > 0) & (number != chosen[:, None] + 1)
        return jnp.minimum(best, jnp.min(jnp.where(other, scores, jnp.inf), axis=1)), None

    best, _ = jax.lax.scan(visit, jnp.full(sample, jnp.inf), jnp.arange(blocks.shape[1]))
    return jnp.sqrt(jnp.maximum(best + jnp.sum(from_codes**2, axis=1), 0.0))


def unit(x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """x at length one; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def _way(block: Way | None) -> Callable[..., tuple[Int[Array, " N"], Float[Array, " N"]]]:
    """(z, codes, offsets) -> the lowest index of the smallest offsets[k] - z @ codes[k], and that value."""
    if isinstance(block, Tile):
        from vqrae_jax.quantizers import nearest_gpu

        return functools.partial(nearest_gpu.search, tile=block)
    if isinstance(block, Screen):
        return functools.partial(screened.search, sizes=block, exact=_float32)
    if isinstance(block, Block):
        return functools.partial(_blocked, block=block)
    if block == "float32":
        return _float32
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=_float32,
        tpu=functools.partial(screened.search, sizes=TPU_SCREEN, exact=_float32),
        default=functools.partial(screened.search, sizes=GPU_SCREEN, exact=_float32),
    )


def _float32(
    z: Float[Array, "N C"], codes: Float[Array, "K C"], offsets: Float[Array, " K"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    return jax.lax.platform_dependent(
        z,
        codes,
        offsets,
        cpu=functools.partial(_blocked, block=CPU_BLOCK),
        tpu=_whole,
        default=functools.partial(_blocked, block=DEFAULT_BLOCK),
    )


def _whole(
    z: Float[Array, "N C"], codes: Float[Array, "K C"], offsets: Float[Array, " K"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """One expression, for a compiler that fuses the arg-min into the matmul, as XLA for TPU does."""
    scores = _scores(z, codes, offsets)
    return jnp.argmin(scores, axis=1).astype(jnp.int32), jnp.min(scores, axis=1)


def _blocked(
    z: Float[Array, "N C"], codes: Float[Array, "K C"], offsets: Float[Array, " K"], block: Block
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    lanes, lane_offsets, width = lanes_of(codes, offsets, block.codes)
    return over_rows(lambda x: _search(x, lanes, lane_offsets, width, len(codes)), block.rows, z)


def _search(
    x: Float[Array, "R C"], lanes: Float[Array, "L S C"], offsets: Float[Array, "L S"], width: int, size: int
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The best code of every lane, block by block, then the best of the lanes."""
    count, length = offsets.shape

    def visit(best, i):
        codes = jax.lax.dynamic_slice_in_dim(lanes, i * width, width, axis=1)
        offset = jax.lax.dynamic_slice_in_dim(offsets, i * width, width, axis=1)
        scores = _scores(x, codes.reshape(count * width, -1), offset.reshape(-1)).reshape(len(x), count, width)
        score, index = _first_minimum(scores)
        better = score < best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, i * width + index, best[1])), None

    nothing = (jnp.full((len(x), count), jnp.inf), jnp.zeros((len(x), count), jnp.int32))
    (score, index), _ = jax.lax.scan(visit, nothing, jnp.arange(length // width, dtype=jnp.int32))
    index += jnp.arange(count, dtype=jnp.int32) * (size // count)
    best = jnp.min(score, axis=1, keepdims=True)
    return jnp.min(jnp.where(score == best, index, size - 1), axis=1), best[:, 0]


def _first_minimum(scores: Float[Array, "*b S"]) -> tuple[Float[Array, "*b"], Int[Array, "*b"]]:
    """Minimum and its lowest index. Two passes, because XLA for CPU does not vectorize the arg-min's comparator."""
    score = jnp.min(scores, axis=-1)
    positions = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    return score, jnp.min(jnp.where(scores == score[..., None], positions, len(positions) - 1), axis=-1)


def _scores(z: Float[Array, "N C"], codes: Float[Array, "K C"], offsets: Float[Array, " K"]) -> Float[Array, "N K"]:
    """Half the squared distance less |z|^2 / 2, which is the same for all codes."""
    return offsets - jnp.dot(z, codes.T, precision=jax.lax.Precision.HIGHEST)
