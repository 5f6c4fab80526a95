"""Where arrays live: a ("data", "model") mesh, a table of names, and one rule for fsdp; the model knows none of it.

Several slices of TPUs, joined by a network slower than that within them, are a third axis "slice" in front: batches are
split over it as well, parameters are not.
"""

import logging
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vqrae_jax.errors import ConfigError

log = logging.getLogger(__name__)

# (pattern on the parameter's path, axes of its last dimensions); the first match wins. Optimizer moments and EMA have
# paths that end like their parameter's, so one table serves them all; blocks stacked for scan have one more axis in
# front, which stays whole.
RULES: list[tuple[str, P]] = [
    (r"attn/(query|key|value)/kernel$", P(None, "model", None)),
    (r"attn/(query|key|value)/bias$", P("model", None)),
    (r"attn/out/kernel$", P("model", None, None)),
    (r"mlp/(up|gate)/kernel$", P(None, "model")),
    (r"mlp/(up|gate)/bias$", P("model")),
    (r"mlp/down/kernel$", P("model", None)),
    (r"quantizer/(.*/)?(codebook|sums|first|offset)$", P("model", None)),
    (r"quantizer/(.*/)?counts$", P("model")),
    (r"quantizer/(.*/)?logits/kernel$", P(None, "model")),
    (r"quantizer/(.*/)?logits/bias$", P("model")),
    (r"quantizer/(.*/)?(kernel|gain|fourier|basis|deviation|fitted|begun)$", P()),
    (r"code_embed$", P("model", None)),
    (r"(patch_embed|embed|pred|features|head)/kernel$", P()),
    (r"conv\w*/kernel$", P()),  # discriminators, LPIPS
    (r"quantizer/.+/kernel$", P()),  # projections and adapters
    (r"((pos|class|hidden)_embed|cls|registers)$", P()),
    (r"(scale|bias|step|count|started|mean|var)$", P()),
]


# Search compares every latent with every code, so codes are never split over "data".
NOT_FSDP = r"quantizer/(.*/)?(codebook|sums|counts|first|offset)$"


def make_mesh(data: int = -1, model: int = 1, devices: list[jax.Device] | None = None, slices: int = 1) -> Mesh:
    """A mesh of slices x data x model devices; data = -1 takes all that the others leave. One slice is no axis."""
    devices = jax.devices() if devices is None else devices
    outer = slices * model
    said = f"mesh.slices={slices} x mesh.model={model}" if slices > 1 else f"mesh.model={model}"
    if len(devices) % outer:
        raise ConfigError(f"{said} does not divide the {len(devices)} devices")
    data = len(devices) // outer if data == -1 else data
    if data * outer != len(devices):
        raise ConfigError(
            f"mesh.data={data} x {said} asks for {data * outer} devices, there are {len(devices)}; "
            f"mesh.data=-1 takes what is left"
        )
    # Auto: the partitioner spreads shardings by itself, ordinary code needs no annotations.
    if slices == 1:
        # "model" may be a part of one of the torus's axes, as 2 of 4 x 4 x 4 chips.
        placed = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
        return Mesh(placed, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return Mesh(_by_slice(devices, slices, data, model), ("slice", "data", "model"), axis_types=(AxisType.Auto,) * 3)


def _by_slice(devices: list[jax.Device], slices: int, data: int, model: int) -> np.ndarray:
    """Devices [slices, data, model]; without slices of their own (one pod, GPUs, CPU) in the order given."""
    found = len({getattr(device, "slice_index", None) for device in devices})
    if found == 1:
        return np.asarray(devices).reshape(slices, data, model)
    if found != slices:
        raise ConfigError(f"mesh.slices={slices}, but these devices are {found} slices: set mesh.slices={found} or 1")
    return mesh_utils.create_hybrid_device_mesh((1, data, model), (slices, 1, 1), devices)


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that a batch is split over."""
    return tuple(name for name in mesh.axis_names if name != "model")


def data_ways(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.size // mesh.shape["model"]


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold part i of n of every batch.

    Processes whose devices differ along "model" only hold the same part and must read the same images.

    Raises:
      ConfigError: the mesh cuts across processes.
    """
    rows = mesh.devices.reshape(data_ways(mesh), -1)
    owners = [frozenset(device.process_index for device in row) for row in rows]
    mine = {i for i, owner in enumerate(owners) if jax.process_index() in owner}
    shares: dict[frozenset[int], list[int]] = {}
    for i, owner in enumerate(owners):
        shares.setdefault(owner, []).append(i)
    here = [n for n, held in enumerate(shares.values()) if mine.intersection(held)]
    if len(here) != 1 or len({len(held) for held in shares.values()}) != 1:
        raise ConfigError(
            f"mesh.model={mesh.shape['model']} cuts the {mesh.size} devices across processes: take a number that "
            "divides the devices of one process, or is a multiple of them"
        )
    return here[0], len(shares)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = "data.batch_size") -> None:
    """Every device along "data" takes an equal share of every micro-batch."""
    parts = data_ways(mesh) * accumulate
    if batch_size % parts:
        raise ConfigError(
            f"{field}={batch_size} is not divisible by {parts} ({data_ways(mesh)} devices along the data axis x "
            f"{accumulate} micro-batches); the nearest sizes are {batch_size // parts * parts} and "
            f"{(batch_size // parts + 1) * parts}"
        )


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False, fsdp_min_size: int = 65_536) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes.

    A dimension that its mesh axis does not divide stays whole. With fsdp, leaves of at least fsdp_min_size elements are
    also split over "data", along the largest free dimension that it divides.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = list(_spec(name, leaf.shape, mesh))
        if fsdp and leaf.size >= fsdp_min_size and not re.search(NOT_FSDP, name):
            free = [i for i, axis in enumerate(spec) if axis is None and leaf.shape[i] % mesh.shape["data"] == 0]
            if free:
                spec[max(free, key=lambda i: leaf.shape[i])] = "data"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or placed shapes, the largest share."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def left_whole(tree: Any, mesh: Mesh, min_size: int) -> dict[str, int]:
    """Path -> bytes per device of placed leaves that fsdp should split and cannot: "data" divides no free dimension."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if x.size >= min_size and "data" not in x.sharding.spec and not re.search(NOT_FSDP, name):
            found[name] = device_bytes(x)
    return found if mesh.shape["data"] > 1 else {}


def unmatched(tree: Any, min_size: int = 0) -> list[str]:
    """Paths of leaves of at least min_size elements that no rule names: a new module wants a row in RULES."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    return [n for n, leaf in names if leaf.size >= min_size and not any(re.search(r, n) for r, _ in RULES)]


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> list[str | None]:
    rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    spec = [None] * (len(shape) - len(rule)) + list(rule)
    if len(spec) != len(shape):  # a scalar stand-in of the optimizer under a parameter's name
        return [None] * len(shape)
    # A mesh axis of one device splits nothing, and would keep fsdp from splitting that dimension.
    return [
        axis if axis and mesh.shape[axis] > 1 and shape[i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(spec)
    ]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all devices of a batch."""
    axes = data_axes(mesh)
    return NamedSharding(mesh, P(axes if len(axes) > 1 else axes[0]))


def pin_batch(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside `jit`: keeps the leading axis split as batches are, where it divides, and the others whole."""
    if x.shape[0] % data_ways(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, over_data(mesh))


def own_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array like `over_data` that this process answers for: together the processes have each row once,
    also where several hold it."""
    own = sorted((s for s in x.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(s.data) for s in own)])


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch -> its part of the global arrays."""
    return {k: jax.make_array_from_process_local_data(over_data(mesh), v) for k, v in batch.items()}


def place_array(value: np.ndarray, where: NamedSharding) -> jax.Array:
    """Places an array that every process holds; `jax.device_put` would first compare it between processes."""
    return jax.make_array_from_callback(value.shape, where, lambda index: np.asarray(value[index]))
