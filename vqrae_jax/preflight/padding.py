"""What a TPU multiplies beside what a program needs, because the shapes of its products do not fill the matrix unit.

The unit multiplies square tiles, so the contracted axis is cut into pieces as long as its side, and the result lies in
memory by tiles of its two minor axes (8 x 128 numbers); both are read from the compiled program, whose layouts the
compiler chose. libtpu writes products as convolutions, and what they run over in parallel as axes of a window.
"""

import dataclasses
import math
import re

from vqrae_jax.preflight.hlo import Computation, Instruction, Program, array

LARGE = 0.01  # of a program's arithmetic: smaller products are not listed


@dataclasses.dataclass(frozen=True)
class Product:
    """A product or convolution of the compiled program.

    Attributes:
      shape: of its result.
      source: the name of the operation in the traced program.
      flops: two per multiply-add that is needed, of all trips of the loops around it, on one device.
      padding: what is multiplied beside, relative to `flops`.
      highest: whether it multiplies float32 in several passes.
    """

    shape: str
    source: str
    flops: float
    padding: float
    highest: bool

    @property
    def waste(self) -> float:
        """The share of what is multiplied that is not needed."""
        return self.padding / (1 + self.padding)


def products(program: Program, side: int) -> list[Product]:
    """Every product of a program for a TPU whose matrix unit is `side` wide, the largest first."""
    found = []
    for computation, op, trips in program.executed(fusions=True):
        if op.opcode == "convolution":
            found.append(_product(program.computations[computation], op, trips, side))
    return sorted(found, key=lambda product: -product.flops)


def total(found: list[Product], passes: float) -> float:
    """Padding of all of them together; float32 counts `passes` times."""
    weights = [product.flops * (passes if product.highest else 1.0) for product in found]
    return sum(w * p.padding for w, p in zip(weights, found, strict=True)) / (sum(weights) or 1.0)


def large(found: list[Product]) -> list[tuple[float, Product]]:
    """Those that are LARGE, with their share of all FLOPs."""
    flops = sum(product.flops for product in found)
    return [(p.flops / flops, p) for p in found if p.flops >= LARGE * flops]


def _product(body: Computation, op: Instruction, trips: float, side: int) -> Product:
    (left, _), (right, _) = (array(body[name].shape) for name in op.operands)
    out, layout = array(op.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    taps = 1.0
    for axis, window in enumerate(_windows(op.attributes, sum(label.isdigit() for label in labels[1]))):
        n, size, length = (
            dims[names.index(str(axis))] for dims, names in zip((left, right, out), labels.groups(), strict=True)
        )
        taps *= _multiplied(n, size, length, *window) / length
    contracted = right[labels[2].index("i")] * taps
    padded = math.ceil(contracted / side) * side / contracted * _tiled(out, layout)
    needed = 2.0 * math.prod(out) * contracted * trips
    return Product(op.shape.partition("{")[0], op.source, needed, padded - 1, "highest" in op.attributes)


def _windows(attributes: str, axes: int) -> list[tuple[int, int, int, int]]:
    """(stride, spread of the input, spread of the window, padding in front) of every axis."""
    given = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(word.split("=") for word in given[1].split()) if given else {}

    def numbers(name: str, otherwise: int) -> list[int]:
        return [int(text.split("_")[0]) for text in fields[name].split("x")] if name in fields else [otherwise] * axes

    names = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    return list(zip(*(numbers(*name) for name in names.items()), strict=True))


def _multiplied(n: int, size: int, length: int, stride: int, spread: int, step: int, before: int) -> int:
    """Pairs of an output and a tap of the window that meet a number of the input, not padding or a gap."""
    places = (i * stride + tap * step - before for i in range(length) for tap in range(size))
    return sum(0 <= place <= (n - 1) * spread and place % spread == 0 for place in places)


def _tiled(dims: list[int], layout: str) -> float:
    """What an array takes in tiles, relative to its numbers."""
    tile = re.search(r"T\((\d+),(\d+)\)", layout)
    if not tile:
        return 1.0
    minor = [int(axis) for axis in layout[1:].split(":")[0].split(",")][:2]
    return math.prod(
        -(-dims[axis] // int(n)) * int(n) / dims[axis] for axis, n in zip(minor, tile.group(2, 1), strict=False)
    )
