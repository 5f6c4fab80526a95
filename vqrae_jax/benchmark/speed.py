"""Times encoder, decoder, quantizer and training step, compares them with this machine's ceilings and with PyTorch.

Each time is the median over rounds. One round times every program once, in turns, so that other load on the machine
affects all of them alike. The weights are random: speed does not depend on them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable

import jax
import numpy as np

from vqrae_jax.benchmark import ceilings, stages
from vqrae_jax.benchmark.ceilings import Ceilings, time_call
from vqrae_jax.benchmark.machine import describe_machine
from vqrae_jax.benchmark.pytorch_process import PyTorchProcess
from vqrae_jax.errors import ConfigError
from vqrae_jax.models.decoder import SIZES

# Largest accepted difference from PyTorch, relative to the largest value: the two add up in different orders.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.05}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    stage: str
    seconds: float  # median of a call
    tflops: float  # reached, in 1e12 FLOPs per second
    intensity: float  # FLOPs per byte, by the compiler's count of bytes
    images_per_second: float
    memory: float  # GiB of temporaries
    compile_seconds: float
    pytorch_seconds: dict[str, float]  # PyTorch's median by variant ("eager", "compiled")
    pytorch_memory: dict[str, float]  # GiB that its first call needs beyond weights and inputs, by variant
    difference: float | None  # largest difference of its first results from ours, relative to the largest value
    share: float | None  # the quantizer's share of the training step, from a step without quantizer


def main(arguments: list[str]) -> None:
    """Prints a Markdown table; --output writes it as JSON and plots the roofline."""
    args = parse(arguments)
    shapes = stages.product_shapes(args)
    best, versions = ceilings.measure_ceilings(args.dtype, shapes), {}
    if args.against:
        flops, versions = measure_pytorch_products(args, shapes)
        best |= Ceilings(flops, 0.0, "torch")
    rows = []
    for name in args.stages:
        rows.append(time_stage(name, args))
        print(f"{name}: {rows[-1].seconds:.4g} s", file=sys.stderr)
    best |= ceilings.measure_ceilings(args.dtype, shapes)  # again, because other load on the machine changes
    machine = describe_machine(**versions)
    print(format_table(rows, best, machine, args))
    if args.output:
        save_report(pathlib.Path(args.output), rows, best, machine, args)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m vqrae_jax.benchmark", description=__doc__, formatter_class=defaults)
    parser.register("type", None, os.path.expanduser)  # arguments without a type
    parser.add_argument("stages", nargs="+", choices=stages.NAMES, metavar="stage", help=", ".join(stages.NAMES))
    parser.add_argument("--against", choices=["pytorch"], help="also time plain PyTorch with the same weights")
    parser.add_argument("--torch-python", default=sys.executable, help="Python interpreter with torch and transformers")
    parser.add_argument("--torch-compile", action="store_true", help="time torch.compile in addition to eager PyTorch")
    parser.add_argument("--encoder", choices=list(stages.DINOV2), default="base", help="DINOv2 size, at 224 pixels")
    parser.add_argument("--decoder", choices=list(SIZES), default="ViT-B", help="decoder size, at 256 pixels")
    parser.add_argument("--quantizer", choices=["ema", "none"], default="ema", help="quantizer of the training step")
    parser.add_argument("--share", action="store_true", help="train_step: report the quantizer's share of the time")
    parser.add_argument("--codes", type=int, default=8192, help="codebook size")
    parser.add_argument("--batch", type=int, default=4, help="images per batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of activations")
    parser.add_argument("--attention", choices=["xla", "cudnn"], default="xla", help="model.attention")
    parser.add_argument("--search", choices=["float32"], help="codes: search in float32; None: that of the backend")
    parser.add_argument("--lpips", action="store_true", help="train_step: add the perceptual loss")
    discriminators = ["none", "dino", "patch"]
    parser.add_argument("--adversary", choices=discriminators, default="none", help="train_step: its discriminator")
    parser.add_argument("--remat", action="store_true", help="recompute decoder blocks to save memory")
    parser.add_argument("--rounds", type=int, default=9, help="number of timed calls of each program")
    parser.add_argument("--output", type=os.path.expanduser, help="folder for speed.json and roofline.png")
    args = parser.parse_args(arguments)
    for name in ("codes", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError("must be positive", field=f"--{name}", value=getattr(args, name))
    if args.against and (args.lpips or args.adversary != "none"):
        raise ConfigError("cannot be combined with --lpips and --adversary, which the PyTorch stages do not implement",
                          field="--against", value=args.against)  # fmt: skip
    return args


def measure_pytorch_products(args: argparse.Namespace, shapes: list[ceilings.Shape]) -> tuple[float, dict[str, str]]:
    """Returns the FLOPs per second of the fastest product in PyTorch, and the versions of its libraries."""
    specification = {
        "stage": "products", "platform": jax.default_backend(), "dtype": args.dtype, "shapes": shapes,
        "repeats": ceilings.REPEATS,
    }  # fmt: skip
    process = PyTorchProcess(args.torch_python, {"latent": np.zeros(1, np.float32)}, specification, compiled=False)
    process.close()
    return float(process.results["flops"][0]), process.versions


def time_stage(name: str, args: argparse.Namespace) -> Row:
    """Builds and times one stage; an AssertionError if PyTorch computes something else, so that times mean nothing."""
    stage, specification = stages.build(name, args)
    results = {n: np.asarray(x, np.float64).ravel() for n, x in stage.call().items()}
    processes, difference = {}, None
    try:
        if args.against:
            for variant in ("eager", "compiled") if args.torch_compile else ("eager",):
                compiled = variant == "compiled"
                processes[variant] = PyTorchProcess(args.torch_python, stage.tensors, specification, compiled)
            difference = max(compute_difference(results, process.results) for process in processes.values())
            assert difference < TOLERANCE[args.dtype], f"{name}: PyTorch differs by {difference:.1e}"
        calls = {"ours": lambda: time_call(stage.call)} | {n: process.time_call for n, process in processes.items()}
        if args.share and name == "train_step":
            bare = stages.without_quantizer(stage, args)
            calls["bare"] = lambda: time_call(bare)
        seconds = time_in_turns(calls, args.rounds)
    finally:
        for process in processes.values():
            process.close()
    median, bare_median = seconds.pop("ours"), seconds.pop("bare", None)
    flops = stage.flops / median
    return Row(
        name, median, flops / 1e12, stage.flops / max(stage.bytes, 1.0), args.batch / median,
        stage.memory / 2**30, stage.compile_seconds, seconds,
        {n: process.memory / 2**30 for n, process in processes.items()}, difference,
        None if bare_median is None else 1 - bare_median / median,
    )  # fmt: skip


def time_in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each call, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(call())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compute_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Returns the largest difference relative to the largest value; for "indices", the share that differs."""
    differences = []
    for name, expected in theirs.items():
        actual = ours[name][: len(expected)]
        errors = np.abs(actual - expected)
        differences.append(np.mean(errors > 0) if name == "indices" else errors.max() / np.abs(expected).max())
    return float(max(differences))


def format_table(rows: list[Row], best: Ceilings, machine: dict[str, str], args: argparse.Namespace) -> str:
    """Returns the machine and the rows as a Markdown table."""
    variants = sorted({variant for row in rows for variant in row.pytorch_seconds})
    header = ["stage", "seconds", "images/s", "TFLOP/s", "of the matmul ceiling", "temporaries, GiB", "compilation, s"]
    header += [f"{what}PyTorch {v} / ours" for v in variants for what in ("", "memory: ")]
    header += ["quantizer's share"] if args.share else []
    lines = [
        f"{'; '.join(f'{name} {value}' for name, value in machine.items())}.",
        "",
        f"{args.dtype}, batch {args.batch}, DINOv2-{args.encoder} at 224 pixels, {args.decoder} at 256, "
        f"{args.codes} codes. Ceilings: matmul {best.flops / 1e12:.3g} TFLOP/s ({best.product}), "
        f"copy {best.bandwidth / 1e9:.3g} GB/s.",
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
    ]
    for row in rows:
        cells = [row.stage, f"{row.seconds:.4g}", f"{row.images_per_second:.4g}", f"{row.tflops:.3g}"]
        cells += [f"{row.tflops * 1e12 / best.flops:.0%}", f"{row.memory:.2f}", f"{row.compile_seconds:.0f}"]
        for v in variants:
            cells += [f"{row.pytorch_seconds[v] / row.seconds:.2f}"]
            cells += [f"{row.pytorch_memory[v] / row.memory:.1f}" if row.memory else ""]
        cells += ["" if row.share is None else f"{row.share:.1%}"] if args.share else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save_report(
    folder: pathlib.Path, rows: list[Row], best: Ceilings, machine: dict[str, str], args: argparse.Namespace
) -> None:
    """Writes speed.json with everything and roofline.png."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine, "arguments": vars(args), "ceilings": dataclasses.asdict(best),
        "rows": [dataclasses.asdict(row) | {"utilization": row.tflops * 1e12 / best.flops} for row in rows],
    }  # fmt: skip
    (folder / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_roofline(rows, best, f"{machine['device']}, {machine['processor']}", folder / "roofline.png")


def plot_roofline(rows: list[Row], best: Ceilings, title: str, path: pathlib.Path) -> None:
    """Plots FLOPs per second over FLOPs per byte (Williams et al., CACM 52(4), 2009) with the measured ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    x = np.logspace(-1, 4, 200)
    axes.loglog(x, np.minimum(best.flops, x * best.bandwidth), color="black", label="measured ceilings")
    for row in rows:
        axes.loglog(row.intensity, row.tflops * 1e12, "o", label=f"{row.stage} ({row.tflops * 1e12 / best.flops:.0%})")
    axes.set(xlabel="FLOPs per byte", ylabel="FLOPs per second", title=title)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
