"""What this machine can do at most, measured: a large matrix product and a large copy."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
      flops: per second, of a square matrix product in the type asked for.
      bandwidth: bytes per second, read and written, of a copy.
    """

    flops: float
    bandwidth: float


def measure(dtype: str) -> Ceilings:
    """The best of some repetitions; float32 means float32 (no TF32)."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.dot(a, a, precision=precision))
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Ceilings(2 * size**3 / _best(product, a), 2 * x.nbytes / _best(copy, x))


def _best(function: Callable[..., Any], argument: Any) -> float:
    jax.block_until_ready(function(argument))
    return min(seconds(lambda: function(argument)) for _ in range(REPEATS))


def seconds(call: Callable[[], Any]) -> float:
    """One call, waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
