"""Where arrays live: a ("data", "model") mesh, a table of names, and one rule for fsdp; the model knows none of it."""

import logging
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
    (r"quantizer/(.*/)?(codebook|sums)$", P("model", None)),
    (r"quantizer/(.*/)?counts$", P("model")),
    (r"quantizer/(.*/)?logits/kernel$", P(None, "model")),
    (r"quantizer/(.*/)?logits/bias$", P("model")),
    (r"quantizer/(.*/)?(kernel|gain|fourier|basis|deviation|fitted)$", P()),
    (r"(patch_embed|embed|pred|features)/kernel$", P()),
    (r"conv\w*/kernel$", P()),  # discriminators, LPIPS
    (r"quantizer/.+/kernel$", P()),  # projections and adapters
    (r"(pos_embed|cls|registers)$", P()),
    (r"(scale|bias|step|count|started|mean|var)$", P()),
]


# Search compares every latent with every code, so codes are never split over "data".
NOT_FSDP = r"quantizer/(codebook|sums|counts)$"


class MeshError(ValueError):
    """Devices, mesh and batch do not fit together."""


def make_mesh(data: int = -1, model: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of data x model devices; data = -1 takes all that model leaves."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % model:
        raise MeshError(f"mesh.model={model} does not divide the {len(devices)} devices")
    data = len(devices) // model if data == -1 else data
    if data * model != len(devices):
        raise MeshError(
            f"mesh.data={data} x mesh.model={model} asks for {data * model} devices, there are {len(devices)}; "
            f"mesh.data=-1 takes what mesh.model leaves"
        )
    # Auto: the partitioner spreads shardings by itself, ordinary code needs no annotations.
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = "data.batch_size") -> None:
    """Every device along "data" takes an equal share of every micro-batch."""
    parts = mesh.shape["data"] * accumulate
    if batch_size % parts:
        raise MeshError(
            f"{field}={batch_size} is not divisible by {parts} ({mesh.shape['data']} devices along the data axis x "
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
    """Leading axis split over "data"."""
    return NamedSharding(mesh, P("data"))


def pin_batch(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside `jit`: keeps the leading axis split over "data", where it divides, and the others whole."""
    if x.shape[0] % mesh.shape["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, over_data(mesh))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch -> its part of the global arrays."""
    return {k: jax.make_array_from_process_local_data(over_data(mesh), v) for k, v in batch.items()}
