"""What a preflight found, as tables and as JSON."""

import dataclasses
import json
import os

from rich.console import Console
from rich.table import Table

from vqrae_jax import storage
from vqrae_jax.preflight import scaling
from vqrae_jax.preflight.alternatives import Way
from vqrae_jax.preflight.chips import GIB
from vqrae_jax.preflight.padding import LARGE
from vqrae_jax.preflight.programs import Cost


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a preflight found.

    Attributes:
      capacity: bytes per device.
      stand_in: the programs were compiled for CPUs in place of the chips asked for.
      others: alternatives; without a compiled program (None) where the arguments alone do not fit.
    """

    topology: str
    chips: int
    capacity: float
    stand_in: bool
    way: Way
    steps: int
    programs: list[Cost]
    others: list[tuple[Way, Cost | None]]

    @property
    def fits(self) -> bool:
        return all(cost.fits for cost in self.programs)

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything as JSON; sizes in bytes, times in seconds."""
        programs = [{**dataclasses.asdict(c), "peak": c.memory.peak, **_speed(c)} for c in self.programs]
        others = [
            {**dataclasses.asdict(way), "fits": bool(cost and cost.fits), "peak": cost and cost.memory.peak}
            | (_speed(cost) if cost else {})
            for way, cost in self.others
        ]
        values = {**dataclasses.asdict(self), "fits": self.fits, "programs": programs, "others": others}
        storage.write_bytes(path, json.dumps(values, indent=2).encode())

    def print(self) -> None:
        console = Console(width=None if Console().is_terminal else 120, highlight=False)
        tables = (
            self._memory(), self._time(), self._padding(), self._flops(), self._communication(), self._scaling(),
            self._others(),
        )  # fmt: skip
        for table in tables:
            if table.row_count:
                console.print(table)
        if self.stand_in:
            console.print(
                "Memory, traffic and collectives are those of the program that XLA compiles for as many CPUs."
            )
        if not self.others:
            console.print("--alternatives=2 compiles other ways to run it, each in about the same time again.")
        console.print(self._verdict(), soft_wrap=True)

    def _verdict(self) -> str:
        room = f"{_gib(self.capacity)} GiB per device of {self.topology}"
        if short := [c.name for c in self.programs if not c.fits]:
            return f"DOES NOT FIT: {' and '.join(short)} in {room}"
        train = self.programs[0]
        said = f"fits: {_gib(max(c.memory.peak for c in self.programs))} of {room}"
        if train.roofline is None:
            return said
        best, worst = (_duration(self.steps * t) for t in (train.roofline.fastest, train.roofline.slowest))
        return f"{said}; {self.steps:,} steps take at least {best}, {worst} if sending hides behind nothing"

    def _memory(self) -> Table:
        table = _table(f"{self.topology}: GiB per device, of {_gib(self.capacity)}", "program", "arguments",
                       "temporaries", "outputs", "code", "peak", "fits")  # fmt: skip
        for c in self.programs:
            m = c.memory
            sizes = (m.arguments, m.temporaries, m.outputs, m.code, m.peak)
            table.add_row(c.name, *map(_gib, sizes), "yes" if c.fits else "NO")
        return table

    def _time(self) -> Table:
        table = _table("roofline: ms per call if nothing else bound", "program", "images", "compute", "of it padding",
                       "memory", "network", "binds", "images/s", "utilization")  # fmt: skip
        for c in self.programs:
            if line := c.roofline:
                compute, memory, network = (f"{1e3 * t:.1f}" for t in (line.compute, line.memory, line.network))
                padded = f"{c.waste:.0%}" if c.products else ""
                worst, best = c.utilization
                table.add_row(
                    c.name, f"{c.images:,}", compute, padded, memory, network, line.bound, _rate(c),
                    f"{worst:.0%} to {best:.0%}",
                )  # fmt: skip
        return table

    def _padding(self) -> Table:
        """Large products that fill the matrix unit badly."""
        table = _table(f"products of training of which a tenth or more is padding, of {LARGE:.0%} of its FLOPs or more",
                       "product", "result", "FLOPs", "padding")  # fmt: skip
        for share, product in self.programs[0].products:
            if product.waste >= 0.1:
                name = "/".join(product.source.split("/")[-4:])
                table.add_row(name, product.shape, f"{share:.1%}", f"{product.waste:.0%}")
        return table

    def _flops(self) -> Table:
        table = _table("GFLOPs per image, products and convolutions", "program", "total", "by network")
        for c in self.programs:
            each = [f"{part} {flops / c.images / 1e9:,.1f}" for part, flops in c.parts.items()]
            table.add_row(c.name, f"{c.flops / c.images / 1e9:,.1f}", ", ".join(each))
        return table

    def _communication(self) -> Table:
        table = _table("collectives of one call", "program", "kind", "mesh axis", "MB", "runs")
        for c in self.programs:
            for kind, axis, size, runs in c.collectives:
                table.add_row(c.name, kind, axis, f"{size / 1e6:,.2f}", f"{runs:,}")
        return table

    def _scaling(self) -> Table:
        """Every number that the efficiency is made of."""
        train = self.programs[0]
        line, sizes = train.roofline, train.slices
        if not sizes:
            return _table("")
        alone = line.alone
        table = _table(
            f"weak scaling of training: {train.images // self.chips} images per chip, whose {1e3 * alone:.1f} ms of "
            "work are the same on every slice", "slice", "chips", "GB/s into a chip", "network ms",
            "step ms: sum to maximum", f"efficiency against {sizes[0].chips} chips", "against one",
        )  # fmt: skip
        for size in sizes:
            against = [scaling.efficiency(alone, size.network, before) for before in (sizes[0].network, 0.0)]
            step = f"{1e3 * (alone + size.network):.1f} to {1e3 * max(alone, size.network):.1f}"
            table.add_row(
                size.topology, str(size.chips), f"{size.rate / 1e9:.0f}", f"{1e3 * size.network:.1f}", step,
                *(f"{apart:.1%} to {together:.1%}" for apart, together in against),
            )  # fmt: skip
        sent = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, _, size, _ in train.collectives)
        table.caption = (
            f"A step sends {sent}. Of S bytes over n chips each receives S (n - 1) / n, in an all-reduce twice; "
            "network ms is that over the rate. sum: sending hides behind nothing; maximum: behind everything."
        )
        return table

    def _others(self) -> Table:
        table = _table("training otherwise", "data x model", "fsdp", "remat", "batch", "accumulate", "attention",
                       "peak GiB", "fits", "binds", "images/s")  # fmt: skip
        for way, cost in [(self.way, self.programs[0]), *self.others]:
            line = cost and cost.roofline
            slices = f"{way.slices} x " if way.slices > 1 else ""
            table.add_row(
                f"{slices}{way.data} x {way.model}", _yes(way.fsdp), _yes(way.remat), f"{way.batch:,}",
                str(way.accumulate), way.attention, _gib(cost.memory.peak) if cost else "too much",
                _yes(bool(cost and cost.fits)), line.bound if line else "", _rate(cost) if line else "",
            )  # fmt: skip
        return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or name in ("by network", "kind", "mesh axis") else "right")
    return table


def _speed(cost: Cost) -> dict[str, float]:
    """Images per second, at best and if sending hides behind nothing."""
    line = cost.roofline
    if line is None:
        return {}
    return {
        "seconds": line.fastest,
        "images_per_second": cost.images / line.fastest,
        "images_per_second_without_overlap": cost.images / line.slowest,
    }


def _rate(cost: Cost) -> str:
    speed = _speed(cost)
    return f"{speed['images_per_second_without_overlap']:,.0f} to {speed['images_per_second']:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} seconds"
    if seconds < 6000:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:.3g} hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} hours"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
