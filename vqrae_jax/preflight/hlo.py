"""What a compiled program moves, read from its text: bytes between devices, and bytes between a device and its memory.

The text lists computations of instructions; loops name their body, and either carry their number of trips or compare a
counter with a constant. A loop whose trips depend on data (k-means on the first batch) counts as none.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "iota", "opt-barrier",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
VIEWS = {"bitcast", "reshape", "get-tuple-element"}

BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4}
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`; `literal` is the operands' text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        """The name of the operation in the traced program, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, or ""."""
        found = re.search(rf"{attribute}=%?([\w.-]+)", self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of COLLECTIVES.
      groups: positions in the mesh's device order that take part together.
      size: bytes of the whole array: what an all-gather makes, or an all-reduce or reduce-scatter sums.
      trips: how often it runs in one call of the program.
      source: the name of the operation in the traced program.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    size: float
    trips: float
    source: str


class Program:
    """A compiled program (`compiled.as_text()`) for `devices` devices."""

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations, self.entry = _parse(text)

    def collectives(self) -> list[Collective]:
        """Every collective of more than one device that runs at least once."""
        found, seen = [], set()
        for computation, op, trips in self.executed(fusions=True):
            kind = op.opcode.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)", op.attributes)
            if kind not in COLLECTIVES or (channel and channel[1] in seen):
                continue
            seen.add(channel[1] if channel else op.name)
            groups = _groups(op, self.devices)
            size = sum(_bytes(self.computations[computation][o].shape) for o in op.operands)
            size *= len(groups[0]) if kind == "all-gather" else 1
            if len(groups[0]) > 1:
                found.append(Collective(kind, groups, size, trips, op.source))
        return found

    def memory_traffic(self) -> float:
        """Bytes that one device reads from and writes to its memory in one call; arrays kept on the chip do not count.

        What a fusion only slices counts by the slice, and what it updates in place by the update.
        """
        total = 0.0
        for computation, op, trips in self.executed(fusions=False):
            if op.opcode not in MOVES_NOTHING and not op.opcode.endswith("-done"):
                total += trips * (self._read(computation, op) + self._written(computation, op))
        return total

    def executed(self, fusions: bool) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, trips), loops unfolded; with `fusions` what is inside of them as well."""
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, trips = waiting.pop()
            for op in self.computations.get(name, {}).values():
                yield name, op, trips
                if op.opcode == "while":
                    if inner := trips * self._trips(op):
                        waiting.append((op.called("body"), inner))
                elif op.opcode == "conditional":
                    branches = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
                    names = re.findall(r"[\w.-]+", branches[1]) if branches else []
                    names += [op.called(f"{side}_computation") for side in ("true", "false")]
                    waiting += [(branch, trips) for branch in names if branch]
                elif op.opcode == "call":
                    waiting.append((op.called("to_apply"), trips))
                elif fusions and op.opcode in ("fusion", "async-start"):
                    waiting.append((op.called("calls"), trips))

    def _trips(self, loop: Instruction) -> int:
        """Trips of a loop that counts up from zero; 0 where they depend on data."""
        if known := re.search(r'known_trip_count[":{n\s]+(\d+)', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        root = next(op for op in condition.values() if op.root)
        limits = [condition[o].literal for o in root.operands if condition[o].opcode == "constant"]
        counts = root.opcode == "compare" and "direction=LT" in root.attributes and len(limits) == 1
        return int(limits[0]) if counts and limits[0].isdigit() else 0

    def _read(self, computation: str, op: Instruction) -> float:
        body = self.computations[computation]
        sizes = [_bytes(body[o].shape, on_chip=False) for o in op.operands if o in body]
        if op.opcode == "async-start":
            return min(sum(sizes), self._started(computation, op, on_chip=True))
        if op.opcode in SLICES:
            return min(sizes[0], _bytes(op.shape)) if sizes else 0.0
        if op.opcode == "dynamic-update-slice":
            return sizes[1]
        if op.opcode == "fusion":
            inner = op.called("calls")
            return sum(min(size, self._used(inner, i)) for i, size in enumerate(sizes) if size)
        return sum(sizes)

    def _written(self, computation: str, op: Instruction) -> float:
        if op.opcode in ("copy-start", "async-start"):
            return self._started(computation, op, on_chip=False)
        if op.opcode.endswith("-start"):  # its result repeats its operands
            return sum(_bytes(self.computations[computation][o].shape, on_chip=False) for o in op.operands)
        whole = _bytes(op.shape, on_chip=False)
        if op.opcode == "dynamic-update-slice":
            return min(whole, _bytes(self.computations[computation][op.operands[1]].shape))
        return min(whole, self._made(op.called("calls"))) if op.opcode == "fusion" and whole else whole

    def _started(self, computation: str, op: Instruction, on_chip: bool) -> float:
        """Bytes of what a copy or an asynchronous slice makes; its own shape repeats the operands."""
        body = self.computations[computation]
        return _bytes(op.shape, on_chip) - sum(_bytes(body[o].shape, on_chip) for o in op.operands)

    @functools.cache  # noqa: B019 - a program is read once and dropped
    def _used(self, fusion: str, index: int) -> float:
        """Bytes of a fusion's parameter that it looks at."""
        body = self.computations.get(fusion, {})
        name = next((op.name for op in body.values() if op.opcode == "parameter" and op.literal == str(index)), None)
        return self._used_of(fusion, name) if name else math.inf

    def _used_of(self, fusion: str, name: str) -> float:
        total = 0.0
        for op in self.computations[fusion].values():
            if name not in op.operands:
                continue
            if op.opcode in SLICES and op.operands[0] == name:
                total += _bytes(op.shape)
            elif op.opcode == "dynamic-update-slice" and op.operands[0] == name:
                continue
            elif op.opcode in VIEWS:
                total += math.inf if op.root else self._used_of(fusion, op.name)
            elif op.opcode == "fusion":
                total += self._used(op.called("calls"), op.operands.index(name))
            else:
                return math.inf
        return total

    @functools.cache  # noqa: B019
    def _made(self, fusion: str) -> float:
        """Bytes that a fusion writes: of arrays that it updates in place, the update."""
        body = self.computations.get(fusion, {})
        root = next((op for op in body.values() if op.root), None)
        if root is None:
            return math.inf
        outputs = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        return sum(self._update(body, op) for op in outputs)

    def _update(self, body: Computation, op: Instruction) -> float:
        while op.opcode in VIEWS and op.operands[0] in body:
            op = body[op.operands[0]]
        if op.opcode == "dynamic-update-slice":
            return _bytes(body[op.operands[1]].shape)
        if op.opcode == "fusion":
            return min(_bytes(op.shape, on_chip=False), self._made(op.called("calls")))
        return _bytes(op.shape, on_chip=False)


def array(shape: str) -> tuple[list[int], str]:
    """Dimensions and layout of an array's shape; of a tuple's first."""
    _, dims, layout = ARRAY.findall(shape)[0]
    return _ints(dims) if dims else [], layout


def axes(collective: Collective, mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes (name -> size, in order) along which the collective's groups reach."""
    names, sizes = list(mesh), list(mesh.values())
    positions = [_unravel(i, sizes) for i in collective.groups[0]]
    return tuple(name for axis, name in enumerate(names) if len({p[axis] for p in positions}) > 1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = collections.defaultdict(dict)
    entry = name = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
        elif match := INSTRUCTION.match(line):
            op = _instruction(match[2], match[3], bool(match[1]))
            computations[name][op.name] = op
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    return Instruction(
        name, shape, rest[:start], tuple(re.findall(r"%([\w.-]+)", literal)), literal, rest[stop + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _bytes(shape: str, on_chip: bool = True) -> float:
    """Bytes of an array or a tuple of arrays; without `on_chip` only of those in the device's main memory."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(shape):
        if on_chip or "S(" not in layout:
            total += _bits(dtype) / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _groups(op: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who takes part together: explicit lists, an iota that is reshaped and transposed, or axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", op.attributes):
        return (tuple(sorted({int(n) for n in re.findall(r"\d+", pairs[1].split("},")[0])})),)
    text = op.attributes.partition("replica_groups=")[2]
    if text.startswith("{{"):
        listed = re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 2])
        return tuple(tuple(map(int, group.split(","))) for group in listed)
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _ints(match[1]), _ints(match[2])
        order = _transposed(dims, _ints(match[3]) if match[3] else range(len(dims)))
        return tuple(tuple(order[i : i + shape[1]]) for i in range(0, len(order), shape[1]))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        groups, order = _mesh_groups(match[1], match[3]), _device_order(match[2], devices)
        return tuple(tuple(order[i] for i in group) for group in groups)
    if not text or text.startswith("{}"):
        return (tuple(range(devices)),)
    raise ValueError(f"replica groups of a form that is not known: {text[:100]}")


def _mesh_groups(mesh: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=4,'b'=2] {'b'}; an axis may be cut, 'a':(2)2 being its two inner devices of each outer two."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    cuts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        cuts[name].append((int(before or 1), int(size or sizes[name])))
    dims, inside = [], []
    for name, size in sizes.items():
        done = 1
        for before, length in sorted(cuts[name]):
            dims += [before // done, length]
            inside += [False, True]
            done = before * length
        dims.append(size // done)
        inside.append(False)
    kept = [i for i, chosen_axis in enumerate(inside) if not chosen_axis]
    taken = [i for i, chosen_axis in enumerate(inside) if chosen_axis]
    length = math.prod(dims[i] for i in taken)
    order = _transposed(dims, [*kept, *taken])
    return tuple(tuple(order[i : i + length]) for i in range(0, len(order), length))


def _device_order(text: str | None, devices: int) -> list[int]:
    """The devices of a mesh in its order: as they are, [4,2]T(1,0), or listed."""
    if not text:
        return list(range(devices))
    if match := re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", text):
        dims = _ints(match[1])
        return _transposed(dims, _ints(match[2]) if match[2] else range(len(dims)))
    return _ints(text)


def _transposed(dims: list[int], permutation: list[int] | range) -> list[int]:
    """iota(dims), transposed, flat."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    order = [0]
    for axis in permutation:
        order = [base + i * strides[axis] for base in order for i in range(dims[axis])]
    return order


def _unravel(index: int, sizes: list[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        found.append(place)
    return found[::-1]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
