"""Plots the training curves of one run or several from their metrics.jsonl, without TensorBoard.

vqrae plot --workdir=runs/quickstart --output=curves.png
"""

import argparse
import fnmatch
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from vqrae_jax import storage
from vqrae_jax.commands import command_line
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize
from vqrae_jax.evaluation.report import METRICS_FILE

CHARTS = {  # title: patterns of metric names; charts without values are left out
    "loss": ("loss/*",),
    "validation PSNR (dB)": ("eval/psnr",),
    "share of the codes in use": ("codebook/usage", "eval/codebook_usage"),
    "codebook perplexity": ("codebook/perplexity", "eval/codebook_perplexity"),
    "quantization error": ("codebook/quantization_error",),
    "discriminator": ("gan/discriminator", "gan/accuracy"),
    "gradient norm": ("grad_norm", "grad_norm/*"),
    "learning rate": ("learning_rate",),
    "images per second": ("images_per_second",),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")

parser = command_line.Parser("plot", f"Plots the curves in the {METRICS_FILE} of runs.")
parser.add("--workdir", "workdirs of runs; several share the charts", required=True, nargs="+")
parser.add("--output", f"file to write: {', '.join(SUFFIXES)}", required=True)
parser.add("--show", "one chart per pattern of metric names, as 'eval/*'; a selection by default", nargs="+")


def plot(args: argparse.Namespace) -> list[str]:
    """Runs the command; returns the titles of the charts."""
    suffix = pathlib.Path(args.output).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"its suffix must be one of {', '.join(SUFFIXES)}", field="--output", value=args.output)
    runs = {name: read_metrics(path) for name, path in zip(_names(args.workdir), args.workdir, strict=True)}
    selection = {pattern: (pattern,) for pattern in args.show} if args.show else CHARTS
    charts = {title: select_curves(runs, patterns) for title, patterns in selection.items()}
    empty = [title for title, curves in charts.items() if not curves]
    charts = {title: curves for title, curves in charts.items() if curves}
    metrics = ", ".join(sorted({name for curves in runs.values() for name in curves})) or "none"
    if not charts:
        raise DataError(f"no metric matches {', '.join(selection)}; {METRICS_FILE} has: {metrics}", field="--show")
    if args.show and empty:
        print(f"--show: no metric matches {', '.join(empty)}; {METRICS_FILE} has: {metrics}", file=sys.stderr)
    storage.write_bytes(storage.resolve_path(args.output), visualize.curves(charts, suffix[1:]))
    print(f"wrote {args.output}: {', '.join(charts)}")
    return list(charts)


def read_metrics(workdir: str | os.PathLike) -> visualize.Curves:
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


def select_curves(runs: dict[str, visualize.Curves], patterns: Sequence[str]) -> visualize.Curves:
    """Returns the curves of one chart, labeled by metric, and by run if there are several."""
    return {
        name if len(runs) == 1 else f"{run}: {name}": curves[name]
        for run, curves in runs.items()
        for name in sorted(curves)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _names(workdirs: Sequence[str]) -> list[str]:
    """Returns the last parts of paths, or whole paths if two of those are equal."""
    last = [pathlib.Path(path).absolute().name for path in workdirs]
    return last if len(set(last)) == len(last) else list(map(str, workdirs))


main = command_line.build_main(parser, plot)

if __name__ == "__main__":
    main()
