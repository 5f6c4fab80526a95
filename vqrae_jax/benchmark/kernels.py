"""Ways to search, to add up the latents of each code, and to attend, timed beside each other.

They are the figures by which a backend's own way is chosen: `nearest` and `code_totals` of the quantizers, and
`model.attention`. On a CPU the GPU's kernels are interpreted: a check that all agree, not a speed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.benchmark.ceilings import measure, seconds
from vqrae_jax.models import attention_tpu
from vqrae_jax.models.attention import attend
from vqrae_jax.models.vit import Spread
from vqrae_jax.quantizers.blocks import Screen
from vqrae_jax.quantizers.nearest import Tile, Way, nearest
from vqrae_jax.quantizers.nearest_gpu import sorted_totals
from vqrae_jax.quantizers.statistics import one_hot_totals

TENSOR_CORES = "TF32_TF32_F32_X3"
TILES = [Tile(rows, codes, 32, warps) for rows, codes, warps in ((128, 128, 8), (64, 128, 4), (128, 64, 4))]
TILES += [tile._replace(precision=TENSOR_CORES) for tile in TILES]
TOKENS = (257, 577, 1025)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of doing something.

    Attributes:
      seconds: median; None where it did not run, for the reason in `remark`.
      flops: per second.
      agrees: share of equal indices, or 1 - the largest difference relative to the largest value, to the first way.
      memory: MiB of temporaries.
    """

    task: str
    way: str
    seconds: float | None = None
    flops: float | None = None
    agrees: float | None = None
    memory: float | None = None
    remark: str = ""


def main(arguments: list[str]) -> None:
    """Prints a Markdown table; --output writes it as JSON."""
    given = parse(arguments)
    ceilings = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
    rows = [*_searches(given), *_totals(given), *_attentions(given)]
    told = ", ".join(f"{dtype} {c.flops / 1e12:.3g} TFLOP/s" for dtype, c in ceilings.items())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; matmul ceilings: {told}\n")
    print("| what | way | ms | TFLOP/s | agrees | temporaries MiB |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        numbers = ((1e3, row.seconds, ".4g"), (1e-12, row.flops, ".3g"), (1, row.agrees, ".6f"), (1, row.memory, ".0f"))
        cells = [format(scale * x, form) if x is not None else "" for scale, x, form in numbers]
        print(f"| {row.task} | {row.way}{row.remark and ': ' + row.remark} | {' | '.join(cells)} |")
    if given.output:
        folder = pathlib.Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "device": jax.devices()[0].device_kind, "jax": jax.__version__, "arguments": vars(given),
            "ceilings": {dtype: dataclasses.asdict(c) for dtype, c in ceilings.items()},
            "rows": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        (folder / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark kernels", description=__doc__)
    parser.add_argument("--latents", type=int, default=131_072, help="N")
    parser.add_argument("--codes", type=int, default=16_384, help="K")
    parser.add_argument("--channels", type=int, default=768, help="C")
    parser.add_argument("--images", type=int, default=32, help="of attention")
    parser.add_argument("--heads", type=int, default=16, help="of attention")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of attention")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--output", help="folder for kernels.json")
    return parser.parse_args(arguments)


def _searches(given: argparse.Namespace) -> Iterator[Row]:
    z, codebook = _latents(given)
    blocks: list[Way | None] = [None, "float32", Screen(4096, 4096), Screen(16_384, 16_384), *TILES]
    ways = {_name(b): functools.partial(nearest, block=b) for b in blocks}
    task = f"search, N = {given.latents}, K = {given.codes}, C = {given.channels}"
    yield from _rows(task, ways, (z, codebook), 2.0 * given.latents * given.codes * given.channels, given.rounds)


def _totals(given: argparse.Namespace) -> Iterator[Row]:
    z, _ = _latents(given)
    # Zipf's law: some codes have many rows, many have none.
    drawn = np.random.default_rng(0).zipf(1.3, given.latents) % given.codes
    indices = jnp.asarray(drawn, jnp.int32)

    def in_order(z: jax.Array, indices: jax.Array) -> jax.Array:
        order = jnp.argsort(indices)
        return jax.ops.segment_sum(z[order], indices[order], given.codes, indices_are_sorted=True)

    ways = {
        "blocked one-hot": lambda z, i: one_hot_totals(z, i, given.codes),
        "scatter-add": lambda z, i: jax.ops.segment_sum(z, i, given.codes),
        "scatter-add of sorted rows": in_order,
        "kernel over sorted rows": lambda z, i: sorted_totals(z, i, given.codes),
    }
    task = f"sums of each code, N = {given.latents}, K = {given.codes}, C = {given.channels}"
    yield from _rows(task, ways, (z, indices), None, given.rounds)


def _attentions(given: argparse.Namespace) -> Iterator[Row]:
    for tokens in given.tokens:
        shape = (given.images, tokens, given.heads, 64)
        arrays = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

        def gradient(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            return jax.grad(lambda *x: jnp.sum(attention(*x).astype(jnp.float32) ** 2))

        theirs = jax.nn.dot_product_attention
        ways = {f"jax.nn, {way}": gradient(functools.partial(theirs, implementation=way)) for way in ("xla", "cudnn")}
        ways["ours, XLA"] = gradient(jax.checkpoint(attend))
        if jax.default_backend() == "tpu":  # elsewhere it is the one before
            ways["ours, kernel"] = gradient(_kernel)
        task = f"attention and its gradient, {given.images} x {tokens} tokens, {given.heads} heads of 64, bfloat16"
        flops = 3.5 * 4 * given.images * given.heads * tokens**2 * 64  # two products forward, five back
        yield from _rows(task, ways, arrays, flops, given.rounds)


def _kernel(*heads: jax.Array) -> jax.Array:
    flat = (x.reshape(*x.shape[:2], -1) for x in heads)
    return attention_tpu.attend(*flat, heads[0].shape[-1], Spread().per_device)


def _latents(given: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    sizes = (given.latents, given.codes)
    z, codebook = (jax.random.normal(k, (n, given.channels)) for k, n in zip(keys, sizes, strict=True))
    return z, codebook


def _name(block: Way | None) -> str:
    if block is None or block == "float32":
        return f"the backend's own{(block and ' in float32') or ''}"
    if isinstance(block, Screen):
        return f"bfloat16 first, blocks of {block.rows} x {block.codes}"
    return f"kernel, tiles of {block.rows} x {block.codes}, {block.warps} warps, {block.precision}"


def _rows(
    task: str, ways: dict[str, Callable], arguments: tuple[Any, ...], flops: float | None, rounds: int
) -> Iterator[Row]:
    """Every way, compared with the first; one that this machine does not run is a row with its reason."""
    expected = None
    for way, function in ways.items():
        try:
            program = jax.jit(function).lower(*arguments).compile()
            out = np.asarray(program(*arguments), np.float64)
        except Exception as error:  # compilers of kernels raise whatever they like
            yield Row(task, way, remark=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}")
            continue
        expected = out if expected is None else expected
        agrees = np.mean(out == expected) if flops and out.ndim == 1 else 1 - _difference(out, expected)
        median = statistics.median(seconds(lambda p=program: p(*arguments)) for _ in range(rounds))
        memory = program.memory_analysis().temp_size_in_bytes / 2**20
        yield Row(task, way, median, flops and flops / median, float(agrees), memory)


def _difference(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(out - expected).max() / np.abs(expected).max())
