"""A model's methods as compiled programs, run on any number of rows in batches of few sizes."""

import collections
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Shaped

from vqrae_jax import sharding
from vqrae_jax.models.encoder import resample_to_input_size
from vqrae_jax.models.vqrae import VQRAE

MAX_BATCH = 64
DEFAULT_MEMORY = 2 << 30  # bytes, of a device that does not report its memory
# Images per device of a program that encodes. XLA rounds products of other sizes differently, which changes codes, so
# this is not a setting. A CPU computes single images as fast as batches.
ENCODED, CPU_ENCODED = 8, 1
ENCODERS = ("encode", "encode_to_indices")

Rows = Any  # numpy array or inputs.FittedImages: has `shape`, `dtype`, a length, and slices that are numpy arrays
Result = np.ndarray | jax.Array


class Programs:
    """Compiles and runs `method(variables, rows)` of a model, on one device or over the data axes of a mesh.

    Methods that encode always run one program, whatever the number of rows, on the same number of images per device,
    with a copy of the encoder on every device: the result for an image depends on neither batch nor mesh. Methods that
    decode return images clipped to [0, 1]; uint8 images are divided by 255.

    Attributes:
      encoded: images per device of programs that encode.
    """

    def __init__(
        self, module: VQRAE, variables: Any, mesh: Mesh | None, batch_size: int | None, memory_limit: int | None
    ):
        """See `Tokenizer`; `variables` are on their devices."""
        self.module, self.variables, self._mesh = module, variables, mesh
        self._parts = sharding.data_ways(mesh) if mesh else 1
        leaf = jax.tree.leaves(variables)[0]
        self._sharding = sharding.over_data(mesh) if mesh else leaf.sharding
        self._batch_size = batch_size
        device = min(leaf.devices(), key=lambda device: device.id)
        self._memory = memory_limit or (device.memory_stats() or {}).get("bytes_limit", DEFAULT_MEMORY) // 2
        self._max_batch = max(MAX_BATCH // self._parts, 1) * self._parts
        self.encoded = CPU_ENCODED if device.platform == "cpu" else ENCODED
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._encoders: dict[bool, tuple[VQRAE, Any, jax.sharding.Sharding]] = {}

    def run(self, method: str, rows: Rows, output: Literal["numpy", "jax"]) -> Shaped[Result, "rows ..."]:
        """Runs a method on all rows, in padded batches of one size."""
        if not len(rows):
            row = jax.ShapeDtypeStruct((1, *rows.shape[1:]), np.float32 if method in ENCODERS else rows.dtype)
            result = jax.eval_shape(functools.partial(_call, self.module, method), self.variables, row)
            return np.zeros((0, *result.shape[1:]), result.dtype)
        size = self.batch_size(method, rows)
        batches = (_pad_rows(rows[i : i + size], size) for i in range(0, len(rows), size))
        if output == "jax":
            return jnp.concatenate([x for batch in batches for x in self._start(method, batch)])[: len(rows)]
        return np.concatenate(list(self.stream(method, batches)))[: len(rows)]

    def stream(self, method: str, batches: Iterable[Shaped[np.ndarray, "b ..."]]) -> Iterator[np.ndarray]:
        """Yields results in order; one batch is computed while the previous result is copied and used."""
        pending = collections.deque()
        for batch in batches:
            pending.append((self._start(method, batch), len(batch)))
            if len(pending) > 1:
                yield _fetch(*pending.popleft())
        yield from (_fetch(*item) for item in pending)

    def batch_size(self, method: str, rows: Rows) -> int:
        """Returns the size of batches for `rows`: the fixed one, or a power of two per device that fits into memory."""
        if method in ENCODERS:
            return self.encoded * (self._mesh.size if self._mesh else 1)
        if self._batch_size:
            return self._batch_size
        parts = math.ceil(len(rows) / self._parts)
        size = min(self._parts << max(parts - 1, 0).bit_length(), self._max_batch)
        analysis = self._compile(method, (size, *rows.shape[1:]), rows.dtype).memory_analysis()
        needed = getattr(analysis, "temp_size_in_bytes", 0)
        if needed <= self._memory or size == self._parts:
            return size
        parts = max(int(size * self._memory / needed) // self._parts, 1)
        self._max_batch = min(self._parts << (parts.bit_length() - 1), size // 2)
        return self.batch_size(method, rows)

    def _start(self, method: str, batch: Shaped[np.ndarray, "b ..."]) -> list[jax.Array]:
        """Starts a method on a batch; returns the results of its padded parts."""
        if method not in ENCODERS:
            program = self._compile(method, batch.shape, batch.dtype)
            return [program(self.variables, jax.device_put(batch, self._sharding))]
        size, (_, variables, split) = self.batch_size(method, batch), self._encoder(batch.shape)
        program = self._compile(method, (size, *batch.shape[1:]), np.float32)
        parts = (_pad_rows(batch[i : i + size], size) for i in range(0, len(batch), size))
        return [program(variables, to_float(jax.device_put(part, split))) for part in parts]

    def _encoder(self, shape: tuple[int, ...]) -> tuple[VQRAE, Any, jax.sharding.Sharding]:
        """Returns the model for images of a shape, its variables without the decoder, and the sharding of the images.

        The variables are whole on every device. Squares have a position grid that is resampled once; for images of
        other shapes their program resamples it, from the trained one.
        """
        square = shape[1] == shape[2]
        if square not in self._encoders:
            module, variables = self.module, self.variables
            if square:
                module, variables = resample_encoder(module, variables)
            params = {name: tree for name, tree in variables["params"].items() if name != "decoder"}
            variables, split = {**variables, "params": params}, self._sharding
            if self._mesh:
                variables = jax.device_put(variables, sharding.replicated(self._mesh))
                split = NamedSharding(self._mesh, P(self._mesh.axis_names))
            self._encoders[square] = module.replace_blocks(shard_activations=None), variables, split
        return self._encoders[square]

    def _compile(self, method: str, shape: tuple[int, ...], dtype: Any) -> Any:
        key = (method, shape, np.dtype(dtype))
        if key not in self._compiled:
            function, variables, split = functools.partial(_call, self.module, method), self.variables, self._sharding
            if method in ENCODERS:
                module, variables, split = self._encoder(shape)
                function = functools.partial(_call, module, method)
                if self._mesh:
                    rows = P(self._mesh.axis_names)
                    function = jax.shard_map(
                        function, mesh=self._mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False
                    )
            batch = jax.ShapeDtypeStruct(shape, dtype, sharding=split)
            self._compiled[key] = jax.jit(function, out_shardings=split).lower(variables, batch).compile()
        return self._compiled[key]


def _fetch(parts: list[jax.Array], count: int) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])[:count]


def _pad_rows(batch: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`."""
    return batch if len(batch) == size else np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def leaf_shardings(tree: Any, mesh: Mesh | None) -> Any:
    """Returns the sharding of each leaf: by the table of names on a mesh, otherwise this process's first device."""
    if mesh is not None:
        return sharding.shardings(tree, mesh)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, tree)


def place_variables(variables: Any, mesh: Mesh | None) -> tuple[Any, Mesh | None]:
    """Returns the variables on their devices (shapes unchanged), and their mesh if they are on one."""
    leaves = jax.tree.leaves(variables)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return variables, mesh
    if mesh is None and all(isinstance(x, jax.Array) for x in leaves):
        meshes = {x.sharding.mesh for x in leaves if isinstance(x.sharding, jax.sharding.NamedSharding)}
        if meshes:
            return variables, meshes.pop()
    return jax.device_put(variables, leaf_shardings(variables, mesh)), mesh


def resample_encoder(module: VQRAE, variables: Any) -> tuple[VQRAE, Any]:
    """Resamples the encoder's position grid to its input size once, instead of in every call."""
    params = variables["params"]
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return module, variables
    encoder, resampled = resample_to_input_size(module.encoder, params["encoder"])
    if encoder is module.encoder:
        return module, variables
    resampled = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), resampled, params["encoder"])
    return module.clone(encoder=encoder), {**variables, "params": {**params, "encoder": resampled}}


def keep_shapes(module: VQRAE) -> VQRAE:
    """Returns the model with an encoder and a decoder that keep the proportions of images and grids."""
    return module.clone(
        encoder=module.encoder.clone(keep_proportions=True), decoder=module.decoder.clone(keep_grid=True)
    )


def set_encoder_dtype(module: VQRAE, dtype: str) -> VQRAE:
    """Returns the model with an encoder, and queries that read it, whose activations have `dtype`."""
    attention = module.encoder.vit.blocks.attention if dtype == "bfloat16" else "xla"
    return module.replace_blocks(dtype=dtype, attention=attention)


@jax.jit
def to_float(images: Shaped[Result, "b H W 3"]) -> Float[jax.Array, "b H W 3"]:
    """Converts uint8 images to floats in [0, 1]; floats are returned as they are."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _call(module: VQRAE, method: str, variables: Any, x: jax.Array) -> jax.Array:
    result = module.apply(variables, x, method=method)
    return jnp.clip(result, 0, 1) if method.startswith("decode") else result
