"""Communication and memory traffic of a compiled program, read from its text.

The text (HLO) lists computations of instructions. Loops name their body, and either state their number of iterations
("trips") or compare a counter with a constant. A loop whose length depends on data (k-means on the first batch) does
not count.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "iota", "opt-barrier",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
VIEWS = {"bitcast", "reshape", "get-tuple-element"}

HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction `name = shape opcode(operands), attributes`; `literal` is the text of the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    def called(self, attribute: str) -> str:
        """Returns the computation that an attribute names, or ""."""
        match = re.search(rf"(?:{attribute})=\{{?%?([\w.-]+)", self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation."""

    kind: str  # one of COLLECTIVES
    groups: tuple[tuple[int, ...], ...]  # devices that communicate with each other, as positions in the mesh
    size: float  # bytes of the whole array: the result of an all-gather, the operand of the reductions
    trips: float  # number of runs in one call of the program


class Program:
    """A compiled program (`compiled.as_text()`) for a number of devices."""

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations, self.entry = _parse(text)

    def collectives(self) -> list[Collective]:
        """Returns the collectives of more than one device that run at least once."""
        collectives, channels = [], set()
        for computation, op, trips in self.executed(fusions=True):
            kind = op.opcode.removesuffix("-start")
            if between := op.opcode == "send" and re.search(r'megascale_transfer_type="(\w+)"', op.attributes):
                kind = between[1].lower().replace("_", "-")
            channel = re.search(r"channel_id=(\d+)", op.attributes)
            key = kind, channel[1] if channel else op.name
            if kind not in COLLECTIVES or key in channels:
                continue
            channels.add(key)
            groups = tuple(tuple(map(int, group)) for group in _groups(op, self.devices))
            size = sum(_bytes(self.computations[computation][o].shape) for o in op.operands)
            size *= len(groups[0]) if kind == "all-gather" else 1
            if len(groups[0]) > 1:
                collectives.append(Collective(kind, groups, size, trips))
        return collectives

    def memory_traffic(self) -> float:
        """Returns the bytes that one device reads from and writes to its main memory in one call.

        Of an array that a fusion slices the slice counts, of one that it updates in place the update.
        """
        total = 0.0
        for computation, op, trips in self.executed(fusions=False):
            if op.opcode not in MOVES_NOTHING and not op.opcode.endswith("-done"):
                total += trips * (self._read(computation, op) + self._written(computation, op))
        return total

    def executed(self, fusions: bool) -> Iterator[tuple[str, Instruction, float]]:
        """Yields (computation, instruction, trips), with the bodies of loops, and of fusions if `fusions`."""
        pending = [(self.entry, 1.0)]
        while pending:
            name, trips = pending.pop()
            for op in self.computations.get(name, {}).values():
                yield name, op, trips
                if op.opcode == "while":
                    if inner := trips * self._trips(op):
                        pending.append((op.called("body"), inner))
                elif op.opcode == "conditional":
                    branches = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
                    names = re.findall(r"[\w.-]+", branches[1]) if branches else []
                    names += [op.called(f"{side}_computation") for side in ("true", "false")]
                    pending += [(branch, trips) for branch in names if branch]
                elif op.opcode == "call":
                    pending.append((op.called("to_apply"), trips))
                elif fusions and op.opcode in ("fusion", "async-start", "custom-call"):  # the last: on SparseCores
                    pending.append((op.called("calls|called_computations"), trips))

    def _trips(self, loop: Instruction) -> int:
        """Returns the trips of a loop that counts up from zero; 0 if they depend on data."""
        if match := re.search(r'known_trip_count[":{n\s]+(\d+)', loop.attributes):
            return int(match[1])
        condition = self.computations[loop.called("condition")]
        root = next(op for op in condition.values() if op.root)
        limits = [condition[o].literal for o in root.operands if condition[o].opcode == "constant"]
        counts = root.opcode == "compare" and "direction=LT" in root.attributes and len(limits) == 1
        return int(limits[0]) if counts and limits[0].isdigit() else 0

    def _read(self, computation: str, op: Instruction) -> int | float:
        body = self.computations[computation]
        sizes = [_bytes(body[o].shape, on_chip=False) for o in op.operands if o in body]
        if op.opcode == "async-start":
            return min(sum(sizes), self._async_bytes(computation, op, on_chip=True))
        if op.opcode in SLICES:
            return min(sizes[0], _bytes(op.shape)) if sizes else 0.0
        if op.opcode == "dynamic-update-slice":
            return sizes[1]
        if op.opcode == "fusion":
            inner = op.called("calls")
            return sum(min(size, self._parameter_bytes(inner, i)) for i, size in enumerate(sizes) if size)
        return sum(sizes)

    def _written(self, computation: str, op: Instruction) -> float:
        if op.opcode in ("copy-start", "async-start"):
            return self._async_bytes(computation, op, on_chip=False)
        if op.opcode.endswith("-start"):  # its shape contains its operands
            return sum(_bytes(self.computations[computation][o].shape, on_chip=False) for o in op.operands)
        whole = _bytes(op.shape, on_chip=False)
        if op.opcode == "dynamic-update-slice":
            return min(whole, _bytes(self.computations[computation][op.operands[1]].shape))
        return min(whole, self._output_bytes(op.called("calls"))) if op.opcode == "fusion" and whole else whole

    def _async_bytes(self, computation: str, op: Instruction, on_chip: bool) -> float:
        """Returns the bytes of the result of an asynchronous copy or slice, whose shape contains the operands too."""
        body = self.computations[computation]
        return _bytes(op.shape, on_chip) - sum(_bytes(body[o].shape, on_chip) for o in op.operands)

    @functools.cache  # noqa: B019 - a program is short-lived
    def _parameter_bytes(self, fusion: str, index: int) -> float:
        """Returns the bytes that a fusion reads of its parameter; infinity for the whole."""
        body = self.computations.get(fusion, {})
        name = next((op.name for op in body.values() if op.opcode == "parameter" and op.literal == str(index)), None)
        return self._used_bytes(fusion, name) if name else math.inf

    def _used_bytes(self, fusion: str, name: str) -> float:
        total = 0.0
        for op in self.computations[fusion].values():
            if name not in op.operands:
                continue
            if op.opcode in SLICES and op.operands[0] == name:
                total += _bytes(op.shape)
            elif op.opcode == "dynamic-update-slice" and op.operands[0] == name:
                continue
            elif op.opcode in VIEWS:
                total += math.inf if op.root else self._used_bytes(fusion, op.name)
            elif op.opcode == "fusion":
                total += self._parameter_bytes(op.called("calls"), op.operands.index(name))
            else:
                return math.inf
        return total

    @functools.cache  # noqa: B019
    def _output_bytes(self, fusion: str) -> float:
        """Returns the bytes that a fusion writes: of arrays that it updates in place, the update."""
        body = self.computations.get(fusion, {})
        root = next((op for op in body.values() if op.root), None)
        if root is None:
            return math.inf
        outputs = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        return sum(self._update_bytes(body, op) for op in outputs)

    def _update_bytes(self, body: Computation, op: Instruction) -> float:
        while op.opcode in VIEWS and op.operands[0] in body:
            op = body[op.operands[0]]
        if op.opcode == "dynamic-update-slice":
            return _bytes(body[op.operands[1]].shape)
        size = _bytes(op.shape, on_chip=False)
        return min(size, self._output_bytes(op.called("calls"))) if op.opcode == "fusion" else size


def mesh_axes(collective: Collective, mesh: dict[str, int]) -> tuple[str, ...]:
    """Returns the axes of the mesh (name -> size, in order) that a group of the collective extends over."""
    coordinates = np.unravel_index(collective.groups[0], tuple(mesh.values()))
    return tuple(name for name, positions in zip(mesh, coordinates, strict=True) if len(set(positions)) > 1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = collections.defaultdict(dict)
    entry = name = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
        elif match := INSTRUCTION.match(line):
            computations[name][match[2]] = _instruction(match[2], match[3], bool(match[1]))
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.-]+)", literal))
    return Instruction(name, shape, rest[:start], operands, literal, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _bytes(shape: str, on_chip: bool = True) -> float:
    """Returns the bytes of an array or tuple of arrays; without `on_chip`, of those in the device's main memory."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(shape):
        if on_chip or "S(" not in layout:
            digits = re.search(r"\d+", dtype)  # a token has no bits
            bits = int(digits[0]) if digits else 8 * (dtype == "pred")
            total += bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _groups(op: Instruction, devices: int) -> Iterable[Iterable[Any]]:
    """Reads the groups of a collective: explicit lists, a transposed iota, axes of a mesh, or all slices."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", op.attributes):
        return [sorted({int(n) for n in re.findall(r"\d+", pairs[1].split("},")[0])})]
    if last := re.search(r'megascale_target="[^"]*x\{0:(\d+)\}"', op.attributes):  # of the devices of one slice
        return np.arange(devices).reshape(-1, int(last[1]) + 1).T
    text = op.attributes.partition("replica_groups=")[2]
    if text.startswith("{{"):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 2])]
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[2], match[3]).reshape(_ints(match[1]))
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        return _device_order(match[2], devices)[_mesh_groups(match[1], match[3])]
    if not text or text.startswith("{}"):
        return [range(devices)]
    raise ValueError(f"replica groups in an unknown format: {text[:100]}")


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
    """Returns the groups of "mesh['a'=4,'b'=2] {'b'}" as positions in the mesh.

    An axis may be split: 'a':(2)2 is its two inner devices of each outer two.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    splits: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, outer, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        splits[name].append((int(outer or 1), int(size or sizes[name])))
    dims, selected = [], []
    for name, size in sizes.items():
        done = 1
        for outer, length in sorted(splits[name]):
            dims += [outer // done, length]
            selected += [False, True]
            done = outer * length
        dims.append(size // done)
        selected.append(False)
    order = np.argsort(selected, kind="stable")  # the selected axes last
    length = math.prod(size for size, inner in zip(dims, selected, strict=True) if inner)
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, length)


def _device_order(text: str | None, devices: int) -> np.ndarray:
    """Returns the devices of a mesh in its order: unchanged, "[4,2]T(1,0)", or listed."""
    if not text:
        return np.arange(devices)
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", text)
    return _iota(match[1], match[2]) if match else np.array(_ints(text))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... in the shape `dims`, transposed and flattened."""
    shape = _ints(dims)
    axes: Sequence[int] = _ints(permutation) if permutation else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).ravel()


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
