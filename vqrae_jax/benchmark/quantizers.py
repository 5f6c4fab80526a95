"""Search and training step of the quantizers, as ratios within one run; see `main` for the arguments."""

import argparse
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.benchmark import quantizer_table
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.nearest import CPU_BLOCK, nearest

REPEATS = 5


def main(arguments: list[str]) -> None:
    """Prints the tables; timings are the best of some repetitions."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark quantizers", description=__doc__)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch, for the comparison")
    table = parser.add_argument_group("the table of all quantizers at equal bits, instead of the timings")
    table.add_argument("--images", help="folder with the images in train/ and val/; makes the table")
    table.add_argument("--encoder", default="facebook/dinov2-small", help="as model.encoder_config_path")
    table.add_argument("--encoder-cls", default="Dinov2withNorm", help="as model.encoder_cls")
    table.add_argument("--size", type=int, default=224, help="pixels, as model.encoder_input_size")
    table.add_argument("--codes", type=int, default=2048, help="codebook size: 2048 or 8192")
    table.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    table.add_argument("--steps", type=int, help="so many steps instead")
    table.add_argument("--limit", type=int, help="use the first so many images of train/ and of val/")
    table.add_argument("--quantizers", help="rows, comma-separated; all by default")
    table.add_argument("--output", help="folder for table.md and table.json")
    given = parser.parse_args(arguments)
    if given.images:
        quantizer_table.run(given)
    else:
        _search(65_536, 65_536, 32)
        _step(4096, 8192, 768, given.torch_python)


def _search(n: int, k: int, c: int) -> None:
    z, codebook = (jax.random.normal(key, (size, c)) for key, size in zip(_keys(), (n, k), strict=True))
    search = jax.jit(nearest).lower(z, codebook).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(search(z, codebook))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    ours, bare = _best([lambda: search(z, codebook), _jitted(blocked_matmul, z, codebook)])
    temporaries = search.memory_analysis().temp_size_in_bytes / 2**20
    print(f"search N={n} K={k} C={c}: {ours:.2f} s, bare blocked matmul {bare:.2f} s, ratio {ours / bare:.2f}")
    print(f"  temporaries {temporaries:.0f} MiB, resident memory grew by {grown:.0f} MiB; N x K is {n * k >> 28} GiB")


def _step(n: int, k: int, c: int, torch_python: str) -> None:
    z = jax.random.normal(jax.random.key(0), (n, c))
    module = EMAQuantizer(k, c)
    variables = jax.jit(module.init)(jax.random.key(0), z)

    def train(variables: Any, z: Float[Array, "N C"], key: jax.Array) -> Any:
        return module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})

    step = jax.jit(train, donate_argnums=0)
    state = {"variables": step(variables, z, jax.random.key(0))[1]}

    def ours() -> Any:
        out, state["variables"] = step(state["variables"], z, jax.random.key(1))
        return out

    codebook = jnp.copy(state["variables"]["batch_stats"]["codebook"])
    product = _jitted(lambda z, c: jnp.dot(z, c.T, precision="highest"), z, codebook)
    torch_time = _torch(torch_python, n, k, c)
    mine, matmul = _best([ours, product])
    torch_time = min(torch_time, _torch(torch_python, n, k, c))
    print(f"train step N={n} K={k} C={c}: {mine:.3f} s, jax matmul {matmul:.3f} s, ratio {mine / matmul:.2f}")
    if np.isfinite(torch_time):
        print(f"  textbook PyTorch layer {torch_time:.3f} s, {torch_time / mine:.1f} times ours")
    else:
        print("  no torch: give --torch-python for the comparison")


def _torch(python: str, n: int, k: int, c: int) -> float:
    """Seconds per step of the textbook layer; infinite where that Python has no torch."""
    program = pathlib.Path(__file__).with_name("torch_vq.py")
    # -P: beside it are modules with the names of Python's own
    done = subprocess.run(
        [python, "-P", program, *map(str, (n, k, c, REPEATS))], capture_output=True, text=True, check=False
    )
    return float(done.stdout) if done.returncode == 0 else float("inf")


def blocked_matmul(z: Float[Array, "N C"], codebook: Float[Array, "K C"]) -> Float[Array, " N"]:
    """The products of all rows with all codes, in the blocks of the search, each kept only as its sum so far."""
    rows, codes = CPU_BLOCK
    parts = codebook.reshape(-1, codes, codebook.shape[1])

    def over_rows(_, x):
        def add(total, part):
            return total + jnp.dot(x, part.T, precision="highest"), None

        return None, jnp.sum(jax.lax.scan(add, jnp.zeros((rows, codes)), parts)[0], axis=1)

    return jax.lax.scan(over_rows, None, z.reshape(-1, rows, z.shape[1]))[1].reshape(-1)


def _jitted(function: Callable, *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(*arguments)


def _best(functions: list[Callable[[], Any]]) -> list[float]:
    """Seconds of each, the best of REPEATS; in turns, so that a busy moment of the machine meets all of them."""
    best = [float("inf")] * len(functions)
    for repeat in range(REPEATS + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if repeat:  # the first one compiles
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def _keys() -> list[jax.Array]:
    return list(jax.random.split(jax.random.key(0)))
