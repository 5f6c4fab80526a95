"""python -m vqrae_jax.commands.plot --workdir=runs/quickstart --output=curves.png

The curves of one run or several, drawn from their metrics.jsonl; TensorBoard is not needed.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from vqrae_jax import storage
from vqrae_jax.commands import command_line as command
from vqrae_jax.data import images
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import visualize as pictures
from vqrae_jax.evaluation.report import METRICS_FILE

# Title of a chart -> what it shows; a panel without values is left out.
PANELS = {
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

VECTORS = (".pdf", ".svg")

Series = dict[str, tuple[list[float], list[float]]]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.plot", description=f"Draws the curves in the {METRICS_FILE} of runs."
    )
    parser.add_argument("--workdir", required=True, nargs="+", help="workdir of a run; several are drawn together")
    parser.add_argument("--output", required=True, help="picture to write: .png, .jpg, .webp, .pdf or .svg")
    parser.add_argument(
        "--show", nargs="+", help="one chart for each pattern of names, as 'eval/*'; the usual charts by default"
    )
    return parser.parse_args(argv)


def plot(args: argparse.Namespace) -> list[str]:
    """Runs the command; returns the titles of the charts drawn."""
    suffix = pathlib.Path(args.output).suffix.lower()
    if suffix not in (accepted := (*images.SAVE_OPTIONS, *VECTORS)):
        raise DataError(f"--output={args.output}: its suffix must be one of {', '.join(accepted)}")
    runs = {name: read(path) for name, path in zip(_names(args.workdir), args.workdir, strict=True)}
    chosen = {pattern: (pattern,) for pattern in args.show} if args.show else PANELS
    panels = {title: _lines(runs, patterns) for title, patterns in chosen.items()}
    empty = [title for title, lines in panels.items() if not lines]
    panels = {title: lines for title, lines in panels.items() if lines}
    known = ", ".join(sorted({name for series in runs.values() for name in series})) or "nothing"
    if not panels:
        raise DataError(f"{METRICS_FILE} has nothing to draw of {list(chosen)}; it has: {known}")
    if args.show and empty:
        print(f"--show: nothing in {METRICS_FILE} is called {', '.join(empty)}; it has: {known}", file=sys.stderr)
    if suffix in VECTORS:
        storage.write_bytes(storage.resolve_path(args.output), pictures.curves_file(panels, suffix[1:]))
    else:
        images.write_image(args.output, pictures.curves(panels))
    print(f"wrote {args.output}: {', '.join(panels)}")
    return list(panels)


def read(workdir: str | os.PathLike) -> Series:
    """{name: (steps, values)} of a run's log, by rising steps.

    A run that was resumed from an earlier checkpoint logged some steps twice: the later line counts. A line that a kill
    cut short is left out.

    Raises:
      DataError: there is no log.
    """
    file = storage.resolve_path(workdir) / METRICS_FILE
    if not file.is_file():
        raise DataError(f"--workdir={os.fspath(workdir)!r}: it has no {METRICS_FILE}, so no run has logged there")
    found: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if isinstance(value, int | float) and name != "time":
                found.setdefault(name, {})[step] = value
    return {name: tuple(map(list, zip(*sorted(by_step.items()), strict=True))) for name, by_step in found.items()}


def _lines(runs: dict[str, Series], patterns: Sequence[str]) -> Series:
    """Lines of one chart, called by their metric, and by their run where there are several."""
    lines = {}
    for run, series in runs.items():
        for name in sorted(series):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                lines[name if len(runs) == 1 else f"{run}: {name}"] = series[name]
    return lines


def _names(workdirs: Sequence[str]) -> list[str]:
    """Last parts of paths, or whole paths where those are alike."""
    last = [pathlib.Path(path).absolute().name for path in workdirs]
    return last if len(set(last)) == len(last) else list(map(str, workdirs))


def main() -> None:
    command.run(lambda: plot(parse()))


if __name__ == "__main__":
    main()
