"""Times the nearest-code search and the EMA training step, relative to matrix products.

python benchmarks/quantizer_speed.py

The training step is also compared with the textbook layer in PyTorch. All ratios are within one run.
"""

import argparse
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.benchmark.ceilings import time_call
from vqrae_jax.benchmark.machine import format_machine
from vqrae_jax.benchmark.pytorch_process import PyTorchProcess
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.errors import UserError
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.nearest import CPU_BLOCK, nearest

REPEATS = 5


def main(arguments: list[str]) -> None:
    """Prints both measurements; times are the best of REPEATS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="Python interpreter with torch")
    parser.add_argument("--codes", type=count, default=65_536, help="codes of the search")
    parser.add_argument("--latents", type=count, help="latents of the search; default: as many as codes")
    parser.add_argument("--channels", type=count, default=32, help="channels of the search")
    args = parser.parse_args(arguments)
    latents = args.latents or args.codes
    for name, value in (("codes", args.codes), ("latents", latents)):
        if value % max(CPU_BLOCK):
            parser.error(f"--{name}={value}: must be a multiple of {max(CPU_BLOCK)}, a block of the search")
    print(format_machine())
    measure_search(latents, args.codes, args.channels)
    measure_step(args.codes // 16, args.codes // 8, 768, args.torch_python)


def measure_search(n: int, k: int, c: int) -> None:
    """Prints time and memory of the search for `n` latents among `k` codes of `c` channels."""
    keys = jax.random.split(jax.random.key(0))
    z, codebook = (jax.random.normal(key, (size, c)) for key, size in zip(keys, (n, k), strict=True))
    search = jax.jit(nearest).lower(z, codebook).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(search(z, codebook))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    product = jax.jit(blocked_matmul)
    seconds, matmul = _best_seconds([lambda: time_call(lambda: search(z, codebook)),
                                     lambda: time_call(lambda: product(z, codebook))])  # fmt: skip
    temporaries = search.memory_analysis().temp_size_in_bytes / 2**20
    print(f"search N={n} K={k} C={c}: {seconds:.2f} s, blocked matmul {matmul:.2f} s, ratio {seconds / matmul:.2f}")
    print(f"  temporaries {temporaries:.0f} MiB, resident memory grew by {grown:.0f} MiB; N x K is {n * k >> 28} GiB")


def measure_step(n: int, k: int, c: int, torch_python: str) -> None:
    """Prints the time of the EMA quantizer's training step, next to a matrix product and the layer in PyTorch."""
    z = jax.random.normal(jax.random.key(0), (n, c))
    module = EMAQuantizer(k, c)
    variables = jax.jit(module.init)(jax.random.key(0), z)

    def train(variables: Any, z: Float[Array, "N C"], key: jax.Array) -> Any:
        return module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})

    step = jax.jit(train, donate_argnums=0)
    state = {"variables": step(variables, z, jax.random.key(0))[1]}

    def run() -> Any:
        quantized, state["variables"] = step(state["variables"], z, jax.random.key(1))
        return quantized

    codebook = jnp.copy(state["variables"]["batch_stats"]["codebook"])
    product = jax.jit(lambda z, c: jnp.dot(z, c.T, precision="highest"))
    calls = [lambda: time_call(run), lambda: time_call(lambda: product(z, codebook))]
    specification = {
        "stage": "quantizer", "platform": jax.default_backend(), "dtype": "float32",
        "quantizer": {"decay": 0.99, "epsilon": 1e-5, "commitment": 0.25},
    }  # fmt: skip
    tensors = {"latent": np.array(z), "codebook": np.array(codebook)}
    try:
        pytorch = PyTorchProcess(torch_python, tensors, specification, compiled=False)
    except UserError as error:
        print(f"  without PyTorch: {error}")
        pytorch = None
    else:
        calls.append(pytorch.time_call)
    ours, matmul, *textbook = _best_seconds(calls)
    print(f"train step N={n} K={k} C={c}: {ours:.3f} s, jax matmul {matmul:.3f} s, ratio {ours / matmul:.2f}")
    if pytorch:
        pytorch.close()
        ratio = f"{textbook[0]:.3f} s, {textbook[0] / ours:.1f} times ours"
        print(f"  textbook PyTorch layer {ratio} ({pytorch.versions['torch']})")


def blocked_matmul(z: Float[Array, "N C"], codebook: Float[Array, "K C"]) -> Float[Array, " N"]:
    """Multiplies all rows with all codes in the blocks of the search, keeping only sums."""
    rows, width = CPU_BLOCK
    parts = codebook.reshape(-1, width, codebook.shape[1])

    def over_rows(_, x):
        def add(total, part):
            return total + jnp.dot(x, part.T, precision="highest"), None

        return None, jnp.sum(jax.lax.scan(add, jnp.zeros((rows, width)), parts)[0], axis=1)

    return jax.lax.scan(over_rows, None, z.reshape(-1, rows, z.shape[1]))[1].reshape(-1)


def _best_seconds(calls: list[Callable[[], float]]) -> list[float]:
    """Returns the best of REPEATS for each call, timed in turns, so that other load affects all alike."""
    rounds = [[call() for call in calls] for _ in range(REPEATS + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]  # the first round compiles


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
