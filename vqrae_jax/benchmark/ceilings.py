"""Best speeds of this machine, measured with a large matrix product and a large copy."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best speeds of one device, per second."""

    flops: float  # FLOPs of a square matrix product
    bandwidth: float  # bytes that a copy reads and writes


def measure_ceilings(dtype: str) -> Ceilings:
    """Returns the best of REPEATS measurements; float32 products are exact (no TF32)."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.dot(a, a, precision=precision))
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Ceilings(2 * size**3 / _best_seconds(product, a), 2 * x.nbytes / _best_seconds(copy, x))


def time_call(call: Callable[[], Any]) -> float:
    """Returns the seconds of one call, including the wait for its result."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _best_seconds(function: Callable[..., Any], argument: Any) -> float:
    jax.block_until_ready(function(argument))  # compiles
    return min(time_call(lambda: function(argument)) for _ in range(REPEATS))
