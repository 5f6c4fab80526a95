"""Rates and memory of chips, and the topologies that exist, as plain numbers without JAX.

Sources for TPUs: Google Cloud's system architecture pages and "How to Scale Your Model" (Austin et al. 2025), chapter
2; their memory is what libtpu's compiler lets a program use. For GPUs: NVIDIA's data sheets, dense rates, SXM boards.

A device is a GPU, a TPU chip, or on TPU7x one of the two cores of a chip, with half of its memory, rates and links.
"""

import dataclasses
import itertools
import math
import os
import re

from vqrae_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory in bytes and rates per second of one device."""

    memory: float  # that a program may use
    flops: float  # bfloat16
    passes: dict[str, float]  # time of a float32 product relative to bfloat16, by the precision of `flops.Product`
    bandwidth: float  # bytes from and to the device's memory
    link: float  # bytes that a device receives over one ICI axis (both directions) or over NVLink
    network: float  # bytes that a device receives over the network of the data centre
    cores: int = 1  # devices of one chip
    core_link: float = 0.0  # bytes that a device receives from the other core of its chip


TPU_PASSES = {"default": 1.0, "high": 3.0, "highest": 6.0}  # numbers of bfloat16 products
# TF32 for "default" and "high", without tensor cores for "highest".
CHIPS = {
    "v4": Chip(30.75 * GIB, 2.75e14, TPU_PASSES, 1.2e12, 9e10, 3.1e9),
    "v5e": Chip(15.75 * GIB, 1.97e14, TPU_PASSES, 8.1e11, 9e10, 3.1e9),
    "v5p": Chip(95.73 * GIB, 4.59e14, TPU_PASSES, 2.8e12, 1.8e11, 6.2e9),
    "v6e": Chip(31.24 * GIB, 9.2e14, TPU_PASSES, 1.6e12, 1.8e11, 1.25e10),
    "tpu7x": Chip(94.74 * GIB, 1.1535e15, TPU_PASSES, 3.69e12, 9e10, 6.25e9, cores=2, core_link=5.4e11),
    "a100": Chip(80e9, 3.12e14, {"default": 2.0, "high": 2.0, "highest": 16.0}, 2.0e12, 3e11, 2.5e10),
    "h100": Chip(80e9, 9.89e14, {"default": 2.0, "high": 2.0, "highest": 14.8}, 3.35e12, 4.5e11, 5e10),
    "h200": Chip(141e9, 9.89e14, {"default": 2.0, "high": 2.0, "highest": 14.8}, 4.8e12, 4.5e11, 5e10),
    "b200": Chip(180e9, 2.25e15, {"default": 2.0, "high": 2.0, "highest": 30.0}, 7.7e12, 9e11, 5e10),
}
GPUS = ("a100", "h100", "h200", "b200")
GPUS_PER_HOST = 8
GPU_COUNTS = (1, 2, 4, 8, *(8 * 2**i for i in range(1, 8)))

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x16x16",
    "16x16x16",
)  # fmt: skip
SHAPES = {
    "v4": CUBES, "v5e": FLAT, "v5p": (*CUBES, "16x16x24"), "v6e": FLAT,
    "tpu7x": ("1x1x1", *CUBES, "16x16x24", "16x24x24"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and their connections."""

    name: str  # as the user writes it, for example "v5e:16x16"
    platform: str  # "tpu", "gpu" or "cpu"
    kind: str  # a name in CHIPS, or "cpu"
    shape: tuple[int, ...]  # chips along each physical axis of a TPU slice; otherwise the number of devices
    slices: int = 1  # TPU slices of this shape, connected by the network of the data center

    @property
    def size(self) -> int:
        return self.slices * math.prod(self.shape) * (self.chip.cores if self.chip else 1)  # devices

    @property
    def chip(self) -> Chip | None:
        """Rates of one device; None for a CPU, whose rates are unknown."""
        return CHIPS.get(self.kind)

    @property
    def memory(self) -> float:
        """Bytes per device; CPU devices share the memory of this machine."""
        if self.chip:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.size

    def is_ring(self, axis: int) -> bool:
        """Returns whether a wrap-around link closes a physical axis: of 16 chips, or of whole cubes of 4 x 4 x 4."""
        if self.kind in ("v5e", "v6e"):
            return self.shape[axis] == 16
        return all(length % 4 == 0 for length in self.shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses "v5e:16x16", of which there are `slices`, "gpu:8xh200" or "cpu:8"; a ConfigError lists all that exist."""
    kind, _, rest = name.partition(":")
    if kind in SHAPES and rest in SHAPES[kind]:
        return Topology(name, "tpu", kind, tuple(map(int, rest.split("x"))), slices)
    gpus = re.fullmatch(r"(\d+)x(\w+)", rest) if kind == "gpu" else None
    if gpus and gpus[2] in GPUS and int(gpus[1]) in GPU_COUNTS:
        return Topology(name, "gpu", gpus[2], (int(gpus[1]),))
    if kind == "cpu" and rest.isdigit() and 1 <= int(rest) <= 64:
        return Topology(name, "cpu", "cpu", (int(rest),))
    lines = [f"  {kind}: {', '.join(f'{kind}:{shape}' for shape in shapes)}" for kind, shapes in SHAPES.items()]
    lines.append(f"  gpu: gpu:NxKIND with N in {', '.join(map(str, GPU_COUNTS))} and KIND in {', '.join(GPUS)}")
    lines.append("  cpu: cpu:1 to cpu:64")
    raise ConfigError("unknown topology; choose one of\n" + "\n".join(lines), field="--topology", value=name)


def positions(topology: Topology) -> list[tuple[int, ...]]:
    """Returns the coordinates of each device: (slice, *chip, core) for TPUs, (host, index) for GPUs, or (index,)."""
    if topology.platform == "gpu":
        return [divmod(i, GPUS_PER_HOST) for i in range(topology.size)]
    sizes = (topology.slices, *topology.shape, topology.chip.cores) if topology.platform == "tpu" else topology.shape
    return list(itertools.product(*map(range, sizes)))
