"""How long a step takes at the least: by its arithmetic, by its memory traffic, by what it sends."""

import dataclasses
from collections.abc import Sequence

from vqrae_jax.preflight.chips import Topology
from vqrae_jax.preflight.hlo import Collective

Position = tuple[int, ...]  # of a device: coordinates of a TPU chip, (host, place) of a GPU, a slice in front if many


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one call needs for each resource alone."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """Which one binds."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def alone(self) -> float:
        """What a chip needs where it sends nothing; arithmetic and memory overlap, as they do within a kernel."""
        return max(self.compute, self.memory)

    @property
    def fastest(self) -> float:
        """All three at the same time."""
        return max(self.alone, self.network)

    @property
    def slowest(self) -> float:
        """Nothing sent while anything is computed."""
        return self.alone + self.network


def network_seconds(collective: Collective, topology: Topology, positions: Sequence[Position]) -> float:
    """Time of one run of a collective by rings over every link that its group has.

    An all-gather or a reduce-scatter of `size` bytes over n devices receives size * (n - 1) / n on each; an all-reduce
    is one after the other; a permutation sends its array once.
    """
    n = len(collective.groups[0])
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    places = [positions[i] for i in collective.groups[0]]
    return share * collective.size / rate(places, topology)


def rate(places: list[Position], topology: Topology) -> float:
    """Bytes per second into each device of a group."""
    chip = topology.chip
    spans = [len({place[axis] for place in places}) for axis in range(len(places[0]))]
    if topology.platform == "gpu":
        return chip.network if spans[0] > 1 else chip.link
    if len(spans) > len(topology.shape) and spans[0] > 1:  # several slices
        return chip.network
    spans = spans[-len(topology.shape) :]
    # Without the wrap-around link traffic turns back at the ends, so an axis carries half.
    whole = [span == topology.shape[axis] and topology.is_ring(axis) for axis, span in enumerate(spans)]
    links = [1.0 if ring else 0.5 for span, ring in zip(spans, whole, strict=True) if span > 1]
    return chip.link * (sum(links) or 1.0)
