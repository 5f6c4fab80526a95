"""Best speeds of this machine, measured with matrix products and a large copy."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 5

Shape = tuple[int, int, int]  # rows, columns, and the length of the sums of a matrix product


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best speeds of one device, per second."""

    flops: float  # FLOPs of a matrix product
    bandwidth: float  # bytes that a copy reads and writes
    product: str  # library and shape of that product

    def __or__(self, other: "Ceilings") -> "Ceilings":
        """Returns the better of both."""
        fastest = max(self, other, key=lambda ceilings: ceilings.flops)
        return dataclasses.replace(fastest, bandwidth=max(self.bandwidth, other.bandwidth))


def measure_ceilings(dtype: str, shapes: Iterable[Shape]) -> Ceilings:
    """Returns the best of all shapes in JAX and, in float32 on a CPU, numpy; float32 products are exact (no TF32).

    No single product will do: libraries differ in the shapes at which they are slow, such as powers of two.
    """
    precision = "highest" if dtype == "float32" else None
    in_jax = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    products: dict[str, Callable[..., Any]] = {"jax": in_jax}
    if jax.default_backend() == "cpu" and dtype == "float32":
        products["numpy"] = lambda a, b: np.matmul(np.asarray(a), np.asarray(b))
    best = (0.0, "")
    for m, n, k in shapes:
        a, b = (jax.random.normal(jax.random.key(0), shape).astype(dtype) for shape in ((m, k), (k, n)))
        for library, product in products.items():
            best = max(best, (2 * m * n * k / _best_seconds(product, a, b), f"{library}, {m} x {k} by {k} x {n}"))
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Ceilings(best[0], 2 * x.nbytes / _best_seconds(copy, x), best[1])


def time_call(call: Callable[[], Any]) -> float:
    """Returns the seconds of one call, including the wait for its result."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))  # compiles
    return min(time_call(lambda: function(*arguments)) for _ in range(REPEATS))
