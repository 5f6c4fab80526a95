"""Search and training step of the quantizers, as ratios within one run; see `main` for the arguments."""

import argparse
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.benchmark import quantizer_table
from vqrae_jax.benchmark.ceilings import seconds
from vqrae_jax.benchmark.opponent import Opponent
from vqrae_jax.errors import UserError
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
    bare_product = _jitted(blocked_matmul, z, codebook)
    ours, bare = _best([lambda: seconds(lambda: search(z, codebook)), lambda: seconds(bare_product)])
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
    calls = [lambda: seconds(ours), lambda: seconds(product)]
    try:
        textbook = _textbook(torch_python, z, codebook)
    except UserError as error:
        print(f"  the comparison is left out: {error}")
    else:
        calls.append(textbook.seconds)
    mine, matmul, *torch = _best(calls)
    print(f"train step N={n} K={k} C={c}: {mine:.3f} s, jax matmul {matmul:.3f} s, ratio {mine / matmul:.2f}")
    if torch:
        textbook.close()
        print(f"  textbook PyTorch layer {torch[0]:.3f} s, {torch[0] / mine:.1f} times ours")


def _textbook(python: str, z: Float[Array, "N C"], codebook: Float[Array, "K C"]) -> Opponent:
    told = {
        "stage": "quantizer", "platform": jax.default_backend(), "dtype": "float32",
        "quantizer": {"decay": 0.99, "epsilon": 1e-5, "commitment": 0.25},
    }  # fmt: skip
    return Opponent(python, {"latent": np.array(z), "codebook": np.array(codebook)}, told, compiled=False)


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


def _best(calls: list[Callable[[], float]]) -> list[float]:
    """Seconds of each, the best of REPEATS; in turns, so that a busy moment of the machine meets all of them."""
    rounds = [[call() for call in calls] for _ in range(REPEATS + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]  # the first one compiles


def _keys() -> list[jax.Array]:
    return list(jax.random.split(jax.random.key(0)))
