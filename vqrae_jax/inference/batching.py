"""A model's methods as compiled programs, for any number of rows in batches of few sizes."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from vqrae_jax import sharding
from vqrae_jax.inference.inputs import bucket, padded
from vqrae_jax.models.encoder import resample_to_input_size
from vqrae_jax.models.vqrae import VQRAE

LARGEST_BATCH = 64
MEMORY_UNKNOWN = 2 << 30  # bytes of a device that does not tell
AHEAD = 1  # batches that are computed while the one before is fetched


class Programs:
    """Compiles and runs `methods(variables, rows)` of a model, on one device or over the data axes of a mesh."""

    def __init__(
        self,
        module: VQRAE,
        variables: Any,
        mesh: jax.sharding.Mesh | None,
        batch_size: int | None,
        memory_limit: int | None,
    ):
        """As `Tokenizer`, the variables on their devices already."""
        self.module, self.variables = module, variables
        self._multiple = sharding.data_ways(mesh) if mesh else 1
        first = jax.tree.leaves(self.variables)[0]
        self._rows = sharding.over_data(mesh) if mesh else first.sharding
        self._fixed = batch_size
        self._memory = memory_limit or _memory(first) // 2
        self._largest = max(LARGEST_BATCH // self._multiple, 1) * self._multiple
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def run(
        self,
        method: str,
        count: int,
        shape: tuple[int, ...],
        dtype: Any,
        take: Callable[[slice], Shaped[np.ndarray, "b ..."]],
        output: Literal["numpy", "jax"],
    ) -> Shaped[Array, "count ..."]:
        """All `count` rows of `shape` that `take` gives, in padded batches of one size."""
        if not count:
            row = jax.ShapeDtypeStruct((1, *shape), dtype)
            one = jax.eval_shape(functools.partial(_compute, self.module, method), self.variables, row)
            return np.zeros((0, *one.shape[1:]), one.dtype)
        size = self.batch_size(method, count, shape, dtype)
        batches = (padded(take(slice(i, i + size)), size) for i in range(0, count, size))
        if output == "jax":
            return jnp.concatenate([self._start(method, batch) for batch in batches])[:count]
        return np.concatenate(list(self.stream(method, batches)))[:count]

    def stream(self, method: str, batches: Iterable[Shaped[np.ndarray, "b ..."]]) -> Iterator[np.ndarray]:
        """Results of `batches` in order, as numpy arrays."""
        waiting = collections.deque()
        for batch in batches:
            waiting.append(self._start(method, batch))
            if len(waiting) > AHEAD:
                yield np.asarray(waiting.popleft())
        yield from map(np.asarray, waiting)

    def batch_size(self, method: str, count: int, shape: tuple[int, ...], dtype: Any) -> int:
        """Rows of the batches that `count` rows are best run in; the program for them is compiled."""
        if self._fixed:
            return self._fixed
        size = bucket(count, self._largest, self._multiple)
        analysis = self._program(method, (size, *shape), dtype).memory_analysis()
        needed = getattr(analysis, "temp_size_in_bytes", 0)
        if needed <= self._memory or size == self._multiple:
            return size
        fit = max(int(size * self._memory / needed) // self._multiple, 1)
        self._largest = min(self._multiple << (fit.bit_length() - 1), size // 2)
        return self.batch_size(method, count, shape, dtype)

    def _start(self, method: str, batch: Shaped[np.ndarray, "b ..."]) -> jax.Array:
        program = self._program(method, batch.shape, batch.dtype)
        return program(self.variables, jax.device_put(batch, self._rows))

    def _program(self, method: str, shape: tuple[int, ...], dtype: Any) -> Any:
        key = (method, shape, np.dtype(dtype))
        if key not in self._compiled:
            run = jax.jit(functools.partial(_compute, self.module, method), out_shardings=self._rows)
            rows = jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)
            self._compiled[key] = run.lower(self.variables, rows).compile()
        return self._compiled[key]


def apply(module: VQRAE, method: str, variables: Any, x: Any) -> jax.Array:
    return module.apply(variables, x, method=method)


def placement(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Where each leaf lives: by the table of names on a mesh, else this process's first device."""
    if mesh is not None:
        return sharding.shardings(tree, mesh)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, tree)


def _compute(module: VQRAE, method: str, variables: Any, x: jax.Array) -> jax.Array:
    """`apply` on bytes too, pictures clipped."""
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.float32) / 255
    out = apply(module, method, variables, x)
    return jnp.clip(out, 0, 1) if method.startswith("decode") else out


def placed(variables: Any, mesh: jax.sharding.Mesh | None) -> tuple[Any, jax.sharding.Mesh | None]:
    """The variables on their devices, and the mesh if they are on one; shapes stay shapes."""
    leaves = jax.tree.leaves(variables)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return variables, mesh
    if mesh is None and all(isinstance(x, jax.Array) for x in leaves):
        meshes = {x.sharding.mesh for x in leaves if isinstance(x.sharding, jax.sharding.NamedSharding)}
        if meshes:
            return variables, meshes.pop()
    return jax.device_put(variables, placement(variables, mesh)), mesh


def running(module: VQRAE, trained: Any) -> tuple[VQRAE, Any]:
    """Module and variables as they run: the encoder's position grid is resampled once instead of in every call."""
    params = trained["params"]
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return module, trained
    encoder, resampled = resample_to_input_size(module.encoder, params["encoder"])
    if encoder is module.encoder:
        return module, trained
    resampled = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), resampled, params["encoder"])
    return module.clone(encoder=encoder), {**trained, "params": {**params, "encoder": resampled}}


def _memory(leaf: jax.Array) -> int:
    """Bytes of the device."""
    statistics = min(leaf.devices(), key=lambda device: device.id).memory_stats() or {}
    return statistics.get("bytes_limit", MEMORY_UNKNOWN)
