"""Encoder, decoder, quantizer and train step, timed beside this machine's ceilings and beside plain PyTorch.

Every figure is the median over rounds; in a round everything is timed once, in turns, so that a busy moment of the
machine meets all of them. The weights are random: speed does not depend on them.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

import jax
import numpy as np

from vqrae_jax.benchmark import stages
from vqrae_jax.benchmark.ceilings import Ceilings, measure, seconds
from vqrae_jax.benchmark.opponent import Opponent
from vqrae_jax.errors import UserError
from vqrae_jax.models.decoder import SIZES

SAME = {"float32": 2e-4, "bfloat16": 0.05}  # relative to the largest; both sides add up in another order


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      seconds: median of a call.
      tflops: achieved, 1e12 per second.
      utilization: achieved / the measured matrix product.
      intensity: FLOPs per byte that the compiler counts.
      images_per_second: of the batch.
      memory: GiB of temporaries.
      against: PyTorch's median seconds by variant ("eager", "compiled").
      against_memory: GiB that PyTorch's first call needs beyond weights and inputs, by variant.
      difference: of PyTorch's first result from ours, relative to the largest value.
      share: of the quantizer in it: what a step without one is faster by.
    """

    stage: str
    seconds: float
    tflops: float
    utilization: float
    intensity: float
    images_per_second: float
    memory: float
    compile_seconds: float
    against: dict[str, float]
    against_memory: dict[str, float]
    difference: float | None
    share: float | None


def main(arguments: list[str]) -> None:
    """Prints a Markdown table; --output writes it as JSON and draws the roofline."""
    given = parse(arguments)
    rows, ceilings = [], measure(given.dtype)
    for name in given.stages:
        row = run(name, given, ceilings)
        rows.append(row)
        print(f"{name}: {row.seconds:.4g} s", file=sys.stderr)
    print(table(rows, ceilings, given))
    if given.output:
        write(pathlib.Path(given.output), rows, ceilings, given)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=stages.NAMES, metavar="stage", help=", ".join(stages.NAMES))
    parser.add_argument("--against", choices=["pytorch"], help="also time plain PyTorch with the same weights")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--torch-compile", action="store_true", help="time torch.compile as well as eager PyTorch")
    parser.add_argument("--encoder", choices=list(stages.DINOV2), default="base", help="DINOv2 size, at 224 pixels")
    parser.add_argument("--decoder", choices=list(SIZES), default="ViT-B", help="painting 256 pixels")
    parser.add_argument("--quantizer", choices=["ema", "none"], default="ema", help="none: what a step costs without")
    parser.add_argument("--share", action="store_true", help="train_step: also time it without a quantizer")
    parser.add_argument("--codes", type=int, default=8192, help="codebook size")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--attention", choices=["xla", "cudnn", "pallas"], default="xla", help="as model.attention")
    parser.add_argument("--matmul", choices=["dtype", "int8", "fp8"], default="dtype", help="of encoder and codes")
    parser.add_argument("--search", choices=list(stages.SEARCHES), default="own", help="of codes; own: the backend's")
    parser.add_argument("--lpips", action="store_true", help="train_step: with the perceptual loss")
    parser.add_argument("--adversary", choices=["none", "dino", "patch"], default="none", help="train_step: against it")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True, help="as model.scan_layers")
    parser.add_argument("--remat", action="store_true", help="recompute decoder blocks: less memory")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--output", help="folder for speed.json and roofline.png")
    return parser.parse_args(arguments)


def run(name: str, given: argparse.Namespace, ceilings: Ceilings) -> Row:
    """Times one stage.

    Raises:
      UserError: PyTorch cannot be asked.
      AssertionError: PyTorch computes something else; a ratio would mean nothing.
    """
    stage, told = stages.build(name, given)
    mine = {n: np.asarray(x, np.float64).ravel() for n, x in stage.call().items()}
    opponents, difference = {}, None
    try:
        if given.against and (given.lpips or given.adversary != "none"):
            raise UserError("PyTorch's train step has neither --lpips nor --adversary: leave out --against")
        if given.against:
            for variant in ("eager", "compiled") if given.torch_compile else ("eager",):
                opponents[variant] = Opponent(given.torch_python, stage.tensors, told, variant == "compiled")
            difference = max(_difference(mine, other.out) for other in opponents.values())
            assert difference < SAME[given.dtype], f"{name}: PyTorch differs by {difference:.1e} of the largest value"
        calls = {"ours": lambda: seconds(stage.call)} | {n: o.seconds for n, o in opponents.items()}
        if given.share and name == "train_step":
            bare = stages.without_quantizer(stage, given)
            calls["bare"] = lambda: seconds(bare)
        times = in_turns(calls, given)
    finally:
        for opponent in opponents.values():
            opponent.close()
    median, without = times.pop("ours"), times.pop("bare", None)
    achieved = stage.flops / median
    return Row(
        name, median, achieved / 1e12, achieved / ceilings.flops, stage.flops / max(stage.bytes, 1.0),
        given.batch / median, stage.memory / 2**30, stage.compile_seconds, times,
        {n: o.memory / 2**30 for n, o in opponents.items()}, difference,
        None if without is None else 1 - without / median,
    )  # fmt: skip


def in_turns(calls: dict[str, Callable[[], float]], given: argparse.Namespace) -> dict[str, float]:
    """The median seconds of each, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(given.rounds + 1):
        for name, call in calls.items():
            times[name].append(call())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _difference(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest, relative to the largest value; of codes, the share that differ."""
    worst = 0.0
    for name, values in other.items():
        own = mine[name][: len(values)]
        if name == "indices":
            worst = max(worst, float(np.mean(own != values)))
        else:
            worst = max(worst, float(np.max(np.abs(own - values)) / np.max(np.abs(values))))
    return worst


def table(rows: list[Row], ceilings: Ceilings, given: argparse.Namespace) -> str:
    """Markdown."""
    variants = sorted({variant for row in rows for variant in row.against})
    heads = ["stage", "seconds", "images/s", "TFLOP/s", "of the matmul ceiling", "temporaries GiB", "compile s"]
    heads += [f"PyTorch {v} / ours{what}" for v in variants for what in ("", ", memory")]
    heads += ["quantizer's share"] if given.share else []
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.dtype}: batch {given.batch}, DINOv2-"
        f"{given.encoder} at 224, {given.decoder} at 256, K = {given.codes}; "
        f"matmul {ceilings.flops / 1e12:.3g} TFLOP/s, copy {ceilings.bandwidth / 1e9:.3g} GB/s",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
    ]
    for row in rows:
        cells = [row.stage, f"{row.seconds:.4g}", f"{row.images_per_second:.4g}", f"{row.tflops:.3g}"]
        cells += [f"{row.utilization:.0%}"]
        cells += [f"{row.memory:.2f}", f"{row.compile_seconds:.0f}"]
        for v in variants:
            here = v in row.against
            cells += [f"{row.against[v] / row.seconds:.2f}" if here else ""]
            cells += [f"{row.against_memory[v] / row.memory:.1f}" if here and row.memory else ""]
        cells += ["" if row.share is None else f"{row.share:.1%}"] if given.share else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: pathlib.Path, rows: list[Row], ceilings: Ceilings, given: argparse.Namespace) -> None:
    """speed.json with everything, roofline.png with where each stage stands."""
    folder.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    report = {
        "device": device, "jax": jax.__version__, "arguments": vars(given), "ceilings": dataclasses.asdict(ceilings),
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    (folder / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_roofline(rows, ceilings, device, folder / "roofline.png")


def draw_roofline(rows: list[Row], ceilings: Ceilings, device: str, path: pathlib.Path) -> None:
    """FLOPs per second over FLOPs per byte (Williams et al., CACM 52(4), 2009), with the measured ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    x = np.logspace(-1, 4, 200)
    axes.loglog(x, np.minimum(ceilings.flops, x * ceilings.bandwidth), color="black", label="measured ceilings")
    for row in rows:
        axes.loglog(row.intensity, row.tflops * 1e12, "o", label=f"{row.stage} ({row.utilization:.0%})")
    axes.set(xlabel="FLOPs per byte", ylabel="FLOPs per second", title=device)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
