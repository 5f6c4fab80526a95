"""Placement of arrays: a ("data", "model") mesh, a table of parameter names, and one rule for fsdp.

Several slices of TPUs, connected by a network slower than the one within a slice, are a third axis "slice" in front:
batches are split over it as well, parameters are not.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers.registry import codebook_axes

# (pattern on the parameter's path, axes of its last dimensions); the first match wins. Optimizer moments and EMA have
# paths that end like their parameter's, so one table serves all. Stacked blocks have one more axis in front, which is
# not split.
RULES: list[tuple[str, P]] = [
    (r"attn/(query|key|value)/kernel$", P(None, "model", None)),
    (r"attn/(query|key|value)/bias$", P("model", None)),
    (r"attn/out/kernel$", P("model", None, None)),
    (r"mlp/(up|gate)/kernel$", P(None, "model")),
    (r"mlp/(up|gate)/bias$", P("model")),
    (r"mlp/down/kernel$", P("model", None)),
    *(
        (rf"quantizer/(.*/)?{name}$", P(*("model" if axis == "K" else None for axis in axes.split())))
        for name, axes in codebook_axes().items()
    ),
    (r"quantizer/(.*/)?logits/kernel$", P(None, "model")),
    (r"quantizer/(.*/)?logits/bias$", P("model")),
    (r"quantizer/", P()),
    (r"((code|head)_embed|code_vectors)$", P("model", None)),
    (r"code_bias$", P("model")),
    (r"(patch_embed|embed|pred|features|head|modulation)/kernel$|code_proj$", P()),
    (r"conv\w*/kernel$", P()),  # discriminators, LPIPS
    (r"((pos|class|hidden|level|target)_embed|cls|registers)$", P()),
    (r"(scale|bias|step|count|started|mean|var)$", P()),
]

# The search compares every latent with every code, so codebooks are never split over "data".
NOT_FSDP = rf"quantizer/(.*/)?({'|'.join(codebook_axes())})$"


def make_mesh(data: int = -1, model: int = 1, devices: list[jax.Device] | None = None, slices: int = 1) -> Mesh:
    """Builds a mesh of slices x data x model devices; data=-1 uses all devices. One slice adds no axis.

    Raises:
      ConfigError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    field, value = (
        ("mesh.data", data) if data != -1 else ("mesh.slices", slices) if slices > 1 else ("mesh.model", model)
    )
    data = len(devices) // (slices * model) if data == -1 else data
    if slices * data * model != len(devices):
        message = f"{slices} slices x {data} x {model} must be the number of devices, {len(devices)}; data=-1 uses all"
        raise ConfigError(message, field=field, value=value)
    # Axes of type Auto leave shardings to the partitioner; code needs no annotations.
    if slices == 1:
        # "model" may be part of one of the torus's axes, for example 2 of 4 x 4 x 4 chips.
        grid = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
        return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    grid = arrange_slices(devices, slices, data, model)
    return Mesh(grid, ("slice", "data", "model"), axis_types=(AxisType.Auto,) * 3)


def arrange_slices(devices: list[Any], slices: int, data: int, model: int) -> np.ndarray:
    """Arranges devices as [slices, data, model]; devices of one physical slice (one pod, GPUs, CPU) in their order."""
    physical = len({getattr(device, "slice_index", None) for device in devices})
    if physical == 1:
        return np.asarray(devices).reshape(slices, data, model)
    if physical != slices:
        raise ConfigError(f"the devices are {physical} slices; use {physical} or 1", field="mesh.slices", value=slices)
    shapes = (1, data, model), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(*shapes, devices, allow_split_physical_axes=True)


def data_ways(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return mesh.size // mesh.shape["model"]


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): the devices of this process hold part i of n of every batch.

    Processes whose devices differ only along "model" hold the same part and must read the same images.

    Raises:
      ConfigError: the mesh cuts across processes.
    """
    rows = mesh.devices.reshape(data_ways(mesh), -1)
    owners = [frozenset(device.process_index for device in row) for row in rows]
    own = {i for i, owner in enumerate(owners) if jax.process_index() in owner}
    shares: dict[frozenset[int], list[int]] = {}
    for i, owner in enumerate(owners):
        shares.setdefault(owner, []).append(i)
    mine = [n for n, parts in enumerate(shares.values()) if own.intersection(parts)]
    if len(mine) != 1 or len({len(parts) for parts in shares.values()}) != 1:
        message = f"cuts {mesh.size} devices across processes: use a divisor or a multiple of the devices of a process"
        raise ConfigError(message, field="mesh.model", value=mesh.shape["model"])
    return mine[0], len(shares)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = "data.batch_size") -> None:
    """Raises ConfigError unless every data-parallel device gets an equal share of every micro-batch."""
    parts = data_ways(mesh) * accumulate
    if batch_size % parts:
        low = batch_size // parts * parts
        factors = f"{data_ways(mesh)} devices along the data axes x {accumulate} micro-batches"
        message = f"must be a multiple of {parts} ({factors}); the nearest sizes are {low} and {low + parts}"
        raise ConfigError(message, field=field, value=batch_size)


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False, fsdp_min_size: int = 65_536) -> Any:
    """Returns a NamedSharding for every leaf of a tree of arrays or shapes.

    A dimension that its mesh axis does not divide is not split. With fsdp, leaves of at least fsdp_min_size elements
    are also split over "data", along the largest free dimension that it divides.
    """

    def build(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = _name(path)
        spec = _spec(name, leaf.shape, mesh)
        if fsdp and leaf.size >= fsdp_min_size and not re.search(NOT_FSDP, name):
            free = [i for i, axis in enumerate(spec) if axis is None and leaf.shape[i] % mesh.shape["data"] == 0]
            if free:
                spec[max(free, key=lambda i: leaf.shape[i])] = "data"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(build, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> list[str | None]:
    rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    spec = [None] * (len(shape) - len(rule)) + list(rule)
    if len(spec) != len(shape):  # a scalar placeholder of the optimizer under a parameter's name
        return [None] * len(shape)
    # A mesh axis of one device splits nothing, and would keep fsdp from splitting that dimension.
    return [
        axis if axis and mesh.shape[axis] > 1 and shape[i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(spec)
    ]


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or sharded shapes; the largest share."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def left_whole(tree: Any, mesh: Mesh, min_size: int) -> dict[str, int]:
    """Returns path -> bytes per device of leaves that fsdp cannot split: "data" divides no free dimension."""
    if mesh.shape["data"] == 1:
        return {}
    leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree) if x.size >= min_size}
    whole = [n for n, x in leaves.items() if "data" not in x.sharding.spec and not re.search(NOT_FSDP, n)]
    return {name: device_bytes(leaves[name]) for name in whole}


def unmatched(tree: Any, min_size: int = 0) -> list[str]:
    """Returns the paths of leaves of at least min_size elements that no rule matches."""
    names = [_name(path) for path, x in jax.tree_util.tree_leaves_with_path(tree) if x.size >= min_size]
    return [name for name in names if not any(re.search(pattern, name) for pattern, _ in RULES)]


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: the leading axis split over all data-parallel devices."""
    axes = tuple(name for name in mesh.axis_names if name != "model")
    return NamedSharding(mesh, P(axes if len(axes) > 1 else axes[0]))


def pin_batch(x: jax.Array, mesh: Mesh, free: bool = False) -> jax.Array:
    """Splits, inside `jit`, the leading axis like batches if the data axes divide it; not the others, unless `free`."""
    if x.shape[0] % data_ways(mesh):
        return x
    axes = [P.UNCONSTRAINED if free else None] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*over_data(mesh).spec, *axes)))


def own_rows(x: jax.Array) -> np.ndarray:
    """Returns the rows of a batch that this process reports; each row is reported by exactly one process."""
    shards = sorted((s for s in x.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(s.data) for s in shards)])


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's share of a batch as its part of the global arrays."""
    return {k: jax.make_array_from_process_local_data(over_data(mesh), v) for k, v in batch.items()}


def place_array(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places an array that every process holds; `jax.device_put` would first compare it between processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.asarray(value[index]))
