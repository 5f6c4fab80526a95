"""The report of a preflight, as tables and as JSON."""

import dataclasses
import json
import os

from rich.console import Console
from rich.table import Table

from vqrae_jax import storage
from vqrae_jax.preflight.chips import GIB, Topology
from vqrae_jax.preflight.programs import Cost, Setup
from vqrae_jax.preflight.roofline import scaling_efficiency

YES = {True: "yes", False: "no"}


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a preflight."""

    topology: Topology
    setup: Setup
    steps: int  # of the whole run
    programs: list[Cost]  # training first
    alternatives: list[tuple[Setup, Cost | None]]  # other setups of training; None: the arguments alone do not fit
    advice: list[str]  # settings with which the run wastes the chips

    @property
    def fits(self) -> bool:
        return all(cost.fits for cost in self.programs)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON; sizes in bytes, times in seconds."""
        programs = [
            {**dataclasses.asdict(c), "flops": c.flops, "peak": c.memory.peak, **_speed(c)} for c in self.programs
        ]
        alternatives = [
            {**dataclasses.asdict(setup), "fits": bool(cost and cost.fits), "peak": cost and cost.memory.peak}
            | (_speed(cost) if cost else {})
            for setup, cost in self.alternatives
        ]
        values = {
            "topology": self.topology.name, "devices": self.topology.size, "capacity": self.topology.memory,
            "fits": self.fits, "setup": dataclasses.asdict(self.setup), "steps": self.steps, "programs": programs,
            "alternatives": alternatives, "advice": self.advice,
        }  # fmt: skip
        storage.write_bytes(path, json.dumps(values, indent=2).encode())

    def print(self) -> None:
        """Prints the tables and the verdict."""
        console = Console(width=None if Console().is_terminal else 120, highlight=False)
        tables = self._memory, self._time, self._flops, self._communication, self._scaling, self._alternatives
        for table in (build() for build in tables):
            if table.row_count:
                console.print(table)
        if self.topology.platform == "gpu":
            console.print("Memory and communication are those of the programs that XLA compiles for the CPU.")
        if self.programs[0].roofline:
            console.print(
                "Ranges: from no overlap of communication with the rest to complete overlap. Utilization: FLOPs per\n"
                "second relative to the bfloat16 peak of the chips, of which float32 products reach at most "
                f"{1 / self.topology.chip.passes['highest']:.0%}."
            )
        if not self.alternatives:
            console.print("--alternatives=2 also compiles two other setups; each takes about as long as this report.")
        for text in self.advice:
            console.print(f"Slow: {text}.", soft_wrap=True)
        console.print(self._verdict(), soft_wrap=True)

    def _verdict(self) -> str:
        capacity = f"{_gib(self.topology.memory)} GiB per device of {self.topology.name}"
        if names := [cost.name for cost in self.programs if not cost.fits]:
            return f"DOES NOT FIT: {' and '.join(names)} need more than {capacity}"
        verdict = f"Fits: the programs need at most {_gib(max(c.memory.peak for c in self.programs))} of {capacity}."
        if bounds := self.programs[0].roofline:
            fastest, slowest = (_duration(self.steps * seconds) for seconds in (bounds.fastest, bounds.slowest))
            verdict += f" {self.steps:,} steps take at least {fastest}, or {slowest} if communication never overlaps."
        return verdict

    def _memory(self) -> Table:
        title = f"Memory in GiB per device ({_gib(self.topology.memory)} on {self.topology.name})"
        table = _table(title, "program", "arguments", "temporaries", "outputs", "code", "peak", "fits")
        for cost in self.programs:
            sizes = (*dataclasses.astuple(cost.memory), cost.memory.peak)
            table.add_row(cost.name, *map(_gib, sizes), "yes" if cost.fits else "NO")
        return table

    def _time(self) -> Table:
        table = _table("Lower bounds of the time per call in ms, for each resource alone", "program", "images",
                       "compute", "memory", "network", "bound by", "images/s", "utilization")  # fmt: skip
        for cost in self.programs:
            if bounds := cost.roofline:
                times = (f"{1e3 * seconds:.2f}" for seconds in (bounds.compute, bounds.memory, bounds.network))
                speed = bounds.bound, _images_per_second(cost), "{:.0%} to {:.0%}".format(*cost.utilization)
                table.add_row(cost.name, f"{cost.images:,}", *times, *speed)
        return table

    def _flops(self) -> Table:
        table = _table("GFLOPs per image (matrix products and convolutions)", "program", "total", "by network")
        for cost in self.programs:
            parts = [f"{part} {flops / cost.images / 1e9:,.2f}" for part, flops in cost.parts.items()]
            table.add_row(cost.name, f"{cost.flops / cost.images / 1e9:,.2f}", ", ".join(parts))
        return table

    def _communication(self) -> Table:
        table = _table("Communication per call", "program", "collective", "mesh axis", "MB", "runs")
        for cost in self.programs:
            for kind, axis, size, runs in cost.collectives:
                table.add_row(cost.name, kind, axis, f"{size / 1e6:,.2f}", f"{runs:,}")
        return table

    def _scaling(self) -> Table:
        train = self.programs[0]
        if not train.slices:
            return _table("")
        alone, smallest = train.roofline.alone, train.slices[0]
        title = (
            f"Weak scaling of training: {train.images // self.topology.size} images per device, {1e3 * alone:.2f} ms "
            "of compute and memory traffic"
        )
        table = _table(title, "slice", "devices", "GB/s into a device", "network ms", "step ms",
                       f"efficiency vs {smallest.devices} devices", "vs 1 device")  # fmt: skip
        for size in train.slices:
            references = (smallest.network, 0.0)
            efficiencies = [scaling_efficiency(alone, size.network, reference) for reference in references]
            step = f"{1e3 * (alone + size.network):.2f} to {1e3 * max(alone, size.network):.2f}"
            table.add_row(
                size.topology, str(size.devices), f"{size.rate / 1e9:.0f}", f"{1e3 * size.network:.2f}", step,
                *(f"{apart:.1%} to {overlapped:.1%}" for apart, overlapped in efficiencies),
            )  # fmt: skip
        sizes = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, _, size, _ in train.collectives)
        table.caption = (
            f"Communication of a step: {sizes}. Of S bytes over n devices each receives S (n - 1) / n, twice in an "
            "all-reduce; network ms is this divided by GB/s."
        )
        return table

    def _alternatives(self) -> Table:
        table = _table("Setups of training", "data x model", "dtype", "fsdp", "remat", "batch", "accumulate",
                       "peak GiB", "fits", "bound by", "images/s")  # fmt: skip
        for setup, cost in [(self.setup, self.programs[0]), *self.alternatives]:
            speed = [cost.roofline.bound, _images_per_second(cost)] if cost and cost.roofline else ["", ""]
            slices = f"{setup.slices} x " if setup.slices > 1 else ""
            table.add_row(
                f"{slices}{setup.data} x {setup.model}", setup.dtype, YES[setup.fsdp], YES[setup.remat],
                f"{setup.batch:,}", str(setup.accumulate), _gib(cost.memory.peak) if cost else "too large",
                YES[bool(cost and cost.fits)], *speed,
            )  # fmt: skip
        return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for i, name in enumerate(columns):
        left = i == 0 or name in ("by network", "collective", "mesh axis", "bound by")
        table.add_column(name, justify="left" if left else "right")
    return table


def _speed(cost: Cost) -> dict[str, float]:
    """Returns the images per second if communication overlaps completely, and if it overlaps with nothing."""
    if cost.roofline is None:
        return {}
    fastest, slowest = cost.roofline.fastest, cost.roofline.slowest
    without_overlap = {"images_per_second_without_overlap": cost.images / slowest}
    return {"seconds": fastest, "images_per_second": cost.images / fastest, **without_overlap}


def _images_per_second(cost: Cost) -> str:
    return f"{cost.images / cost.roofline.slowest:,.0f} to {cost.images / cost.roofline.fastest:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} seconds"
    if seconds < 6000:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:.3g} hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} hours"
