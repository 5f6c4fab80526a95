"""Weak scaling on paper: the same step, with as many images per chip, on slices of other sizes.

A chip computes and reads as much as before. What is sent is gradients, statistics and weights, whose size does not
depend on the number of chips; what does depend on it is how much of it a chip receives, and over how many links.
"""

import dataclasses
import math

from vqrae_jax.preflight import roofline
from vqrae_jax.preflight.chips import GPU_COUNTS, SHAPES, Topology, parse, positions
from vqrae_jax.preflight.hlo import Collective

SMALLEST, LARGEST = 8, 256  # chips


@dataclasses.dataclass(frozen=True)
class Size:
    """One slice.

    Attributes:
      rate: bytes per second into each chip, over all its links.
      network: seconds that a step sends for.
    """

    topology: str
    chips: int
    rate: float
    network: float


def sizes(collectives: list[Collective], topology: Topology) -> list[Size]:
    """The step's collectives on every slice of 8 to 256 chips of a kind; empty where the kind is not known.

    Args:
      collectives: of a program that only splits batches and weights, all over the same axis of all chips.
      topology: that it was compiled for.
    """
    if topology.chip is None:
        return []
    found = []
    for text in _texts(topology):
        other = parse(text)
        if not SMALLEST <= other.size <= LARGEST:
            continue
        where, everyone = positions(other), (tuple(range(other.size)),)
        moved = [dataclasses.replace(c, groups=everyone) for c in collectives]
        network = sum(c.trips * roofline.network_seconds(c, other, where) for c in moved)
        found.append(Size(text, other.size, roofline.rate(where, other), network))
    return found


def efficiency(sizes: list[Size], chip_seconds: float) -> list[tuple[float, float]]:
    """Of each size, a step's time on the smallest one over that on it: if nothing overlaps, and if all does.

    Args:
      chip_seconds: what a chip computes and reads for, whatever the size.
    """
    first = sizes[0]
    return [
        (
            (chip_seconds + first.network) / (chip_seconds + size.network),
            max(chip_seconds, first.network) / max(chip_seconds, size.network),
        )
        for size in sizes
    ]


def _texts(topology: Topology) -> list[str]:
    if topology.platform == "gpu":
        return [f"gpu:{count}x{topology.kind}" for count in GPU_COUNTS]
    return [f"{topology.kind}:{shape}" for shape in sorted(SHAPES[topology.kind], key=_chips)]


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))
