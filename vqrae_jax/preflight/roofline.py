"""Lower bounds of the time of a step, from its arithmetic, its memory traffic and its communication."""

import dataclasses
import math
from collections.abc import Sequence

from vqrae_jax.preflight.chips import GPU_COUNTS, SHAPES, Chip, Topology, parse_topology, positions
from vqrae_jax.preflight.flops import Product
from vqrae_jax.preflight.hlo import Collective

MIN_DEVICES, MAX_DEVICES = 8, 256  # sizes of slices for weak scaling


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one call needs for each resource alone."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """Name of the resource that takes the longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def alone(self) -> float:
        """Seconds of a device that sends nothing; arithmetic and memory traffic overlap, as they do within a kernel."""
        return max(self.compute, self.memory)

    @property
    def fastest(self) -> float:
        """Seconds if communication overlaps completely with the rest."""
        return max(self.alone, self.network)

    @property
    def slowest(self) -> float:
        """Seconds if communication overlaps with nothing."""
        return self.alone + self.network


@dataclasses.dataclass(frozen=True)
class ScaledSlice:
    """A slice of another size that runs the same step with the same number of images per device."""

    topology: str
    devices: int
    rate: float  # bytes per second into each device, over all its links
    network: float  # seconds of communication per step


def compute_seconds(products: list[Product], devices: int, chip: Chip) -> float:
    """Returns the time of the products, spread evenly over a number of devices."""
    return sum(p.flops * chip.passes.get(p.kind, 1) for p in products) / (devices * chip.flops)


def network_seconds(collective: Collective, topology: Topology, positions: Sequence[tuple[int, ...]]) -> float:
    """Returns the time of one run of a collective, by rings over all links of its group.

    In an all-gather or reduce-scatter of `size` bytes over n devices each receives size * (n - 1) / n; an all-reduce is
    one after the other; a permutation sends its array once.
    """
    n = len(collective.groups[0])
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    return share * collective.size / receive_rate([positions[i] for i in collective.groups[0]], topology)


def receive_rate(group: list[tuple[int, ...]], topology: Topology) -> float:
    """Returns the bytes per second into each device of a group, given by `chips.positions`."""
    chip = topology.chip
    spans = [len({position[axis] for position in group}) for axis in range(len(group[0]))]
    if spans[0] > 1:  # several hosts of GPUs or slices of TPUs
        return chip.network
    if topology.platform == "gpu":
        return chip.link
    _, *spans, cores = spans
    if max(spans) == 1:
        return chip.core_link
    # Without the wrap-around link, traffic turns back at the ends, so an axis carries half.
    rings = [span == topology.shape[axis] and topology.is_ring(axis) for axis, span in enumerate(spans)]
    links = [1.0 if ring else 0.5 for span, ring in zip(spans, rings, strict=True) if span > 1]
    return cores * chip.link * sum(links)  # two cores of a chip receive each byte once and share it


def weak_scaling(collectives: list[Collective], topology: Topology) -> list[ScaledSlice]:
    """Returns the communication of a step on every slice of MIN_DEVICES to MAX_DEVICES of the same kind.

    Gradients and weights have the same size on every slice; what changes is the share of them that a device receives,
    and the number of its links. `collectives` are those of a program that splits only batches and weights.
    """
    if topology.platform == "cpu":
        return []
    if topology.platform == "gpu":
        names = [f"gpu:{count}x{topology.kind}" for count in GPU_COUNTS]
    else:
        names = [f"{topology.kind}:{shape}" for shape in SHAPES[topology.kind]]
    slices = []
    for other in sorted(map(parse_topology, names), key=lambda other: other.size):
        if MIN_DEVICES <= other.size <= MAX_DEVICES:
            devices, group = positions(other), (tuple(range(other.size)),)
            scaled = [dataclasses.replace(c, groups=group) for c in collectives]
            network = math.fsum(c.trips * network_seconds(c, other, devices) for c in scaled)
            slices.append(ScaledSlice(other.name, other.size, receive_rate(devices, other), network))
    return slices


def scaling_efficiency(alone: float, network: float, reference: float = 0.0) -> tuple[float, float]:
    """Returns the time of a step with `reference` seconds of communication, relative to one with `network` seconds.

    Both compute and read for `alone` seconds. The first ratio is without overlap of the two, the second with complete
    overlap.
    """
    return (alone + reference) / (alone + network), max(alone, reference) / max(alone, network)
