"""What chips can do, and which groups of them exist; plain numbers, no jax.

TPU figures: Google Cloud's system architecture pages and "How to Scale Your Model" (Austin et al. 2025), chapter 2;
usable memory is what libtpu's compiler grants a program. GPU figures: NVIDIA's data sheets, dense rates, SXM boards.
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
    """One device as a program sees it; rates per second.

    Attributes:
      memory: bytes that a program may use.
      flops: multiply-adds x 2 in bfloat16.
      passes: time of a float32 product relative to bfloat16, by precision ("default", "highest").
      bandwidth: bytes from and to the device's memory.
      link: bytes that a device sends, and at the same time receives, over one ICI axis (both directions) or NVLink.
      network: the same over the data centre's network.
      side: of a TPU's matrix unit, which multiplies square tiles; 0 where tiles are small.
    """

    memory: float
    flops: float
    passes: dict[str, float]
    bandwidth: float
    link: float
    network: float
    side: int = 0


TPU_PASSES = {"default": 1, "highest": 6}
CHIPS = {
    "v4": Chip(30.75 * GIB, 2.75e14, TPU_PASSES, 1.2e12, 9e10, 3.1e9, 128),
    "v5e": Chip(15.75 * GIB, 1.97e14, TPU_PASSES, 8.1e11, 9e10, 3.1e9, 128),
    "v5p": Chip(95.73 * GIB, 4.59e14, TPU_PASSES, 2.8e12, 1.8e11, 6.2e9, 128),
    "v6e": Chip(31.24 * GIB, 9.2e14, TPU_PASSES, 1.6e12, 1.8e11, 1.25e10, 256),
    "a100": Chip(80e9, 3.12e14, {"default": 2, "highest": 16}, 2.0e12, 3e11, 2.5e10),
    "h100": Chip(80e9, 9.89e14, {"default": 2, "highest": 14.8}, 3.35e12, 4.5e11, 5e10),
    "h200": Chip(141e9, 9.89e14, {"default": 2, "highest": 14.8}, 4.8e12, 4.5e11, 5e10),
    "b200": Chip(180e9, 2.25e15, {"default": 2, "highest": 30}, 7.7e12, 9e11, 5e10),
}
GPUS = ("a100", "h100", "h200", "b200")
GPUS_PER_HOST = 8
GPU_COUNTS = (1, 2, 4, 8, *(8 * 2**i for i in range(1, 8)))

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x16x16",
    "16x16x16",
)  # fmt: skip
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": (*CUBES, "16x16x24"), "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are wired.

    Attributes:
      text: as it was asked for, "v5e:16x16".
      platform: "tpu", "gpu" or "cpu".
      kind: a name in CHIPS, or "cpu".
      shape: chips along each physical axis of a TPU slice; the number of devices elsewhere.
    """

    text: str
    platform: str
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """None for a CPU: its rates are not known, its memory is this machine's."""
        return CHIPS.get(self.kind)

    @property
    def memory(self) -> float:
        """Bytes per device."""
        if self.chip:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.size

    def is_ring(self, axis: int) -> bool:
        """Whether a physical axis is closed by a wrap-around link."""
        length = self.shape[axis]
        return length == 16 if self.kind in ("v5e", "v6e") else length % 4 == 0


def parse(text: str) -> Topology:
    """ "v5e:16x16", "gpu:8xh200" or "cpu:8".

    Raises:
      ConfigError: lists what exists.
    """
    kind, _, rest = text.partition(":")
    if kind in SHAPES and rest in SHAPES[kind]:
        return Topology(text, "tpu", kind, tuple(map(int, rest.split("x"))))
    gpus = re.fullmatch(r"(\d+)x(\w+)", rest) if kind == "gpu" else None
    if gpus and gpus[2] in GPUS and int(gpus[1]) in GPU_COUNTS:
        return Topology(text, "gpu", gpus[2], (int(gpus[1]),))
    if kind == "cpu" and rest.isdigit() and 1 <= int(rest) <= 64:
        return Topology(text, "cpu", "cpu", (int(rest),))
    raise ConfigError(f"--topology={text!r} does not exist; these do:\n{known()}")


def known() -> str:
    """Every topology, a line per kind."""
    tpus = [f"  {kind}: {', '.join(f'{kind}:{shape}' for shape in shapes)}" for kind, shapes in SHAPES.items()]
    counts = ", ".join(map(str, GPU_COUNTS))
    return "\n".join([*tpus, f"  gpu: gpu:Nx{{{','.join(GPUS)}}} with N in {counts}", "  cpu: cpu:1 to cpu:64"])


def positions(topology: Topology) -> list[tuple[int, ...]]:
    """Coordinates: of TPU chips in the slice, of GPUs (host, place), of CPUs (place,)."""
    if topology.platform == "gpu":
        return [(i // GPUS_PER_HOST, i % GPUS_PER_HOST) for i in range(topology.size)]
    return list(itertools.product(*map(range, topology.shape)))
