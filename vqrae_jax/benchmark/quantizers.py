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

from vqrae_jax.config import ModelConfig, QuantizerParams
from vqrae_jax.quantizers.base import Quantizer
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.factory import create
from vqrae_jax.quantizers.nearest import CPU_BLOCK, nearest

REPEATS = 5


def main(arguments: list[str]) -> None:
    """Prints the tables; timings are the best of some repetitions."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark quantizers", description=__doc__)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch, for the comparison")
    parser.add_argument("--features", help="folder with train.npy and val.npy, [images, tokens, channels], to cluster")
    parser.add_argument("--codes", type=int, default=2048, help="codebook size on features")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training features")
    parser.add_argument("--quantizers", default="ema", help="comma-separated names, on features")
    given = parser.parse_args(arguments)
    if given.features:
        _features(given)
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


def _features(given: argparse.Namespace) -> None:
    """Every quantizer at equal codes, trained online on precomputed latents (no decoder, so only the codes learn)."""
    train, val = (_grid(np.load(pathlib.Path(given.features) / f"{name}.npy")) for name in ("train", "val"))
    print("quantizer | error on val / variance | use | perplexity | ms per step")
    for name in given.quantizers.split(","):
        config = ModelConfig(quantizer=name, num_embeddings=given.codes, quantizer_params=QuantizerParams())
        module = create(config, train.shape[-1], train.shape[1])
        error, counts, seconds = cluster(module, train, val, given.epochs)
        share = counts / counts.sum(-1, keepdims=True)
        entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1)
        use, perplexity = (counts > 0).mean(), np.exp(entropy).mean()
        print(f"{name} | {error:.4f} | {use:.3f} | {perplexity:.0f} | {1e3 * seconds:.1f}", flush=True)


def _grid(tokens: Float[np.ndarray, "B T C"]) -> Float[np.ndarray, "B h w C"]:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1)


def cluster(
    module: Quantizer,
    train: Float[np.ndarray, "B h w C"],
    val: Float[np.ndarray, "V h w C"],
    epochs: int,
    batch: int = 32,
) -> tuple[float, np.ndarray, float]:
    """Trains on batches of images; error relative to the variance and counts on val, seconds per step."""
    variables = jax.jit(module.init)(jax.random.key(0), train[:1])

    def train_step(variables: Any, z: jax.Array, key: jax.Array) -> Any:
        out, state = module.apply(variables, z, True, mutable=["batch_stats"], rngs={"codes": key})
        return out.loss, {**variables, **state}

    step = jax.jit(train_step, donate_argnums=0)
    rng, times = np.random.default_rng(0), []
    for epoch in range(epochs):
        order = rng.permutation(len(train))
        for i in range(len(train) // batch):
            start = time.perf_counter()
            z = jnp.asarray(train[order[i * batch : (i + 1) * batch]])
            loss, variables = step(variables, z, jax.random.fold_in(jax.random.key(1), epoch * 10_000 + i))
            loss.block_until_ready()
            times.append(time.perf_counter() - start)
    out = jax.jit(lambda v, z: module.apply(v, z))(variables, val)
    error = float(jnp.mean((out.z - val) ** 2) / np.var(val))
    return error, np.asarray(out.metrics["counts"]), float(np.median(times))


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
