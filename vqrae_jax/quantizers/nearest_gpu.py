"""Search and sums as two Pallas kernels (Triton) for GPUs; how they compare with XLA's is not measured yet.

Nothing uses them but `nearest(..., block=Tile())`, and their benchmark: they become the way of a GPU when a GPU says
that they are faster. Arrays must be on one device; over a mesh they belong into a `shard_map`. On a CPU they are
interpreted, slowly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.nearest import Tile

ROWS, CHANNELS = 32, 256  # of the latents that are added up at once


def search(
    z: Float[Array, "N C"], codes: Float[Array, "K C"], offsets: Float[Array, " K"], tile: Tile
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The lowest index of the smallest offsets[k] - z @ codes[k], and that value.

    Every program keeps the best code so far of its rows while it walks over the codes; scores never leave the chip.
    """
    n = len(z)
    z, codes = _padded(z, tile.rows, tile.channels), _padded(codes, tile.codes, tile.channels)
    offsets = jnp.pad(offsets, (0, len(codes) - len(offsets)), constant_values=jnp.inf)
    run = functools.partial(
        pl.pallas_call,
        functools.partial(_search, tile=tile),
        grid=(len(z) // tile.rows,),
        out_shape=(jax.ShapeDtypeStruct(z.shape[:1], jnp.int32), jax.ShapeDtypeStruct(z.shape[:1], jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="nearest",
    )
    index, score = jax.lax.platform_dependent(z, codes, offsets, cpu=run(interpret=True), default=run())
    return index[:n], score[:n]


def _search(z: Any, codes: Any, offsets: Any, index: Any, score: Any, *, tile: Tile) -> None:
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)
    positions = jax.lax.broadcasted_iota(jnp.int32, (tile.rows, tile.codes), 1)

    def visit(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        here = pl.ds(i * tile.codes, tile.codes)

        def add(j: jax.Array, total: jax.Array) -> jax.Array:
            part = pl.ds(j * tile.channels, tile.channels)
            return total + jnp.dot(z[rows, part], codes[here, part].T, precision=tile.precision)

        products = jax.lax.fori_loop(0, z.shape[1] // tile.channels, add, jnp.zeros((tile.rows, tile.codes)))
        scores = offsets[here][None] - products
        least = jnp.min(scores, axis=1)
        first = jnp.min(jnp.where(scores == least[:, None], positions, tile.codes - 1), axis=1)
        better = least < best[0]  # never of a row that is not finite, which keeps code 0
        return jnp.where(better, least, best[0]), jnp.where(better, i * tile.codes + first, best[1])

    start = (jnp.full(tile.rows, jnp.inf), jnp.zeros(tile.rows, jnp.int32))
    score[rows], index[rows] = jax.lax.fori_loop(0, codes.shape[0] // tile.codes, visit, start)


def sorted_totals(z: Float[Array, "N C"], indices: Int[Array, " N"], num_embeddings: int) -> Float[Array, "K C"]:
    """As `statistics.one_hot_totals`: rows in the order of their codes, each code's added up by one program.

    Every row is read once, nothing is added atomically, and the order of adding is that of the rows.
    """
    order = jnp.argsort(indices, stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(indices[order], jnp.arange(num_embeddings + 1)).astype(jnp.int32)
    width = min(z.shape[1] & -z.shape[1], CHANNELS)  # blocks are powers of two
    run = functools.partial(
        pl.pallas_call,
        functools.partial(_add_rows, width=width),
        grid=(num_embeddings, z.shape[1] // width),
        out_shape=jax.ShapeDtypeStruct((num_embeddings, z.shape[1]), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="sorted_totals",
    )
    return jax.lax.platform_dependent(z, jnp.pad(order, (0, ROWS)), starts, cpu=run(interpret=True), default=run())


def _add_rows(z: Any, order: Any, starts: Any, totals: Any, *, width: int) -> None:
    code, channels = pl.program_id(0), pl.ds(pl.program_id(1) * width, width)
    start, end = starts[code], starts[code + 1]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        places = start + i * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        mine = jnp.broadcast_to((places < end)[:, None], (ROWS, width))
        rows = order[pl.ds(start + i * ROWS, ROWS)]
        return total + jnp.sum(jnp.where(mine, z[rows, channels], 0.0), axis=0)

    totals[code, channels] = jax.lax.fori_loop(0, pl.cdiv(end - start, ROWS), add, jnp.zeros(width))


def _padded(x: Float[Array, "N C"], rows: int, channels: int) -> Float[Array, "M D"]:
    return jnp.pad(x, ((0, -len(x) % rows), (0, -x.shape[1] % channels)))
