"""Plots the training curves of one run or several from their metrics.jsonl, without TensorBoard.

vqrae plot --workdir=runs/quickstart --output=curves.png
"""

import argparse
import fnmatch
import json
import os
import sys

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.report import METRICS_FILE

METRICS = (  # patterns of the metrics that are shown by default
    "loss/*", "eval/psnr", "eval/ssim", "eval/lpips", "eval/rfid", "eval/bits_per_code", "eval/token_accuracy",
    "codebook/usage", "eval/codebook_usage",
    "codebook/perplexity", "eval/codebook_perplexity", "codebook/quantization_error", "gan/discriminator",
    "gan/accuracy", "grad_norm", "learning_rate", "images_per_second",
)  # fmt: skip
UNITS = {  # by patterns of metrics
    "*psnr": "dB", "*usage": "%", "*accuracy": "%", "data_wait": "%", "*perplexity": "codes", "*dead": "codes",
    "*bits*": "bits", "learning_rate": "", "images_per_second": "images per second", "step_seconds/*": "s",
}  # fmt: skip
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")

parser = command_line.Parser("plot", f"Plots the curves in the {METRICS_FILE} of runs.")
parser.add("--workdir", "workdirs of runs, which share the panels", required=True, nargs="+")
parser.add("--output", f"file to write: {', '.join(SUFFIXES)}", required=True)
parser.add("--show", "patterns of the metrics to show, as 'eval/*'; a selection by default", nargs="+")


def plot(args: argparse.Namespace) -> list[str]:
    """Runs the command; returns the metrics that the panels show."""
    output = command_line.output_file(args.output, SUFFIXES)
    names = command_line.short_names(args.workdir)
    runs = {name: read_metrics(path) for name, path in zip(names, args.workdir, strict=True)}
    metrics = sorted({metric for curves in runs.values() for metric in curves})
    matches = {pattern: fnmatch.filter(metrics, pattern) for pattern in args.show or METRICS}
    selection = list(dict.fromkeys(metric for names in matches.values() for metric in names))
    empty = [pattern for pattern, names in matches.items() if not names]
    problem = f"no metric matches {', '.join(empty)}; {METRICS_FILE} has: {', '.join(metrics) or 'none'}"
    if not selection:
        raise DataError(problem, field="--show")
    if args.show and empty:
        print(f"--show: {problem}", file=sys.stderr)
    panels = {metric: {run: curves[metric] for run, curves in runs.items() if metric in curves} for metric in selection}
    units = {metric: unit for metric in panels for pattern, unit in UNITS.items() if fnmatch.fnmatch(metric, pattern)}
    storage.write_bytes(output, visualize.curves(panels, output.suffix.lower()[1:], units))
    print(f"wrote {output}: {', '.join(panels)}")
    return list(panels)


def read_metrics(workdir: str | os.PathLike) -> dict[str, visualize.Curve]:
    """Reads the metrics of a run, by rising steps.

    A run that was resumed from an earlier checkpoint logs some steps twice: the later line counts. Lines that are not
    complete are ignored.
    """
    file = storage.resolve_path(workdir) / METRICS_FILE
    if not file.is_file():
        raise DataError(f"has no {METRICS_FILE}: no run has logged to it", field="--workdir", value=os.fspath(workdir))
    by_name: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if isinstance(value, int | float) and name != "time":
                by_name.setdefault(name, {})[step] = value
    return {name: tuple(map(list, zip(*sorted(by_step.items()), strict=True))) for name, by_step in by_name.items()}


main = command_line.build_main(parser, plot)

if __name__ == "__main__":
    main()
