"""Runs the measurements that need a GPU; `launch/gpu_figures.sh` runs all parts (speed, recipe, quality).

python benchmarks/gpu.py speed

Run it in the checkout. Each part takes less than ten minutes. Each measurement is a command in its own process, so that
it does not inherit memory from another one; one that fails or runs out of time is a line of the report like the others.
The report (Markdown and JSON) is written after every measurement, so nothing is lost when a machine is preempted.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

LIMIT = 570.0  # seconds of one part
METRICS_FILE = "metrics.jsonl"  # of a training run's workdir
BENCHMARK, TRAINING, LOOP = "-m vqrae_jax.benchmark", "-m vqrae_jax.main", "benchmarks/end_to_end.py"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One command.

    Attributes:
      target: the result to reach, in words.
      program: BENCHMARK, TRAINING or LOOP.
    """

    name: str
    target: str
    arguments: str
    program: str = BENCHMARK


SPEED = "--dtype=bfloat16 --rounds=20"
XL = f"train_step {SPEED} --decoder=ViT-XL"
RECIPE = f"{XL} --lpips --adversary=dino"
PYTORCH = "--against=pytorch --torch-compile"
QUALITY = (
    "--config=configs/cpu_recipe.py:{encoder} --workdir={output}/{name} --config.data.source=folder "
    "--config.data.path={images}/train --config.data.eval_path={images}/val --config.data.image_size=224 "
    "--config.model.encoder_input_size=224 --config.loss.perceptual.input_size=224 --config.model.dtype=bfloat16 "
    "--config.model.decoder_config_path=ViT-S --config.model.decoder_patch_size=16 --config.model.num_embeddings=2048 "
    "--config.data.batch_size=32 --config.train.steps=2000 --config.train.evaluate_every=2000 "
    "--config.train.checkpoint_every=2000 --config.train.log_every=100"
)
WITHOUT_ADVERSARY = "--config.adversary.discriminator=none"
L1_ONLY = f"{WITHOUT_ADVERSARY} --config.loss.perceptual.weight=0 --config.loss.feature_weight=0"

PARTS = {
    "speed": [
        Measurement("tokenize", "60 % of the ceiling, about 10,000 images/s", f"codes {SPEED} --batch=256 {PYTORCH}"),
        Measurement(
            "step", "55 %, 1.3 x compiled PyTorch, 1.6 x eager", f"{XL} --batch=64 --attention=cudnn {PYTORCH}"
        ),
        Measurement("step-xla", "as step", f"{XL} --batch=64"),
        Measurement("step-large", "55 %", f"{XL} --batch=128 --attention=cudnn"),
        Measurement("step-remat", "55 %", f"{XL} --batch=256 --attention=cudnn --remat"),
        Measurement("tokenize-cudnn", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn"),
        Measurement("tokenize-float32", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --search=float32"),
    ],
    "recipe": [
        Measurement("recipe", "45 %", f"{RECIPE} --batch=32 --attention=cudnn"),
        Measurement("recipe-large", "45 %", f"{RECIPE} --batch=64 --attention=cudnn"),
        Measurement(
            "quantizer", "3 x the textbook layer, memory / 8",
            "quantizer --batch=512 --codes=16384 --rounds=9 --against=pytorch",
        ),
        Measurement("share", "quantizer's share at most 5 %", f"{XL} --batch=64 --attention=cudnn --share"),
        Measurement("share-65536", "as share", f"{XL} --batch=64 --attention=cudnn --codes=65536 --share"),
        Measurement("loop", "the loop adds at most 2 %", "--steps=400 --batch=64 --size=128", LOOP),
    ],
    "quality": [
        Measurement("l1", "PSNR, SSIM, feature distance", f"{QUALITY} {L1_ONLY}", TRAINING),
        Measurement("features", "as l1", f"{QUALITY} {WITHOUT_ADVERSARY}", TRAINING),
        Measurement("adversary", "as l1", QUALITY, TRAINING),
    ],
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Runs the measurements of one part and writes the report after each."""
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + args.limit, []
    for measurement, command in build_commands(args):
        print(f"{measurement.name}: {shlex.join(command)}", flush=True)
        if args.dry_run:
            continue
        results.append(run_measurement(measurement, command, args.output, end - time.monotonic()))
        (args.output / f"{args.part}.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.output / f"{args.part}.md").write_text(format_report(results))
        error = results[-1]["error"]
        print(f"  {results[-1]['seconds']:.0f} s{': ' + error if error else ''}", flush=True)
    if results:
        print(format_report(results))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="which measurements")
    parser.add_argument(
        "--output",
        type=lambda text: pathlib.Path(text).expanduser(),
        default="gpu_figures",
        help="folder of the report",
    )
    parser.add_argument("--only", help="names of measurements, separated by commas")
    parser.add_argument("--torch-python", default=sys.executable, help="Python interpreter with torch and transformers")
    parser.add_argument("--images", default="photographs", help="quality: folder with train/ and val/")
    parser.add_argument("--encoder", default="", help="quality: folder of a DINOv2-like encoder with 16-pixel patches")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all measurements together")
    parser.add_argument("--smaller", default="", help="arguments added to each command, for a trial in small sizes")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(arguments)
    names = [measurement.name for measurement in PARTS[args.part]]
    if args.only and (unknown := set(args.only.split(",")) - set(names)):
        parser.error(f"--only: {args.part} has no {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    return args


def build_commands(args: argparse.Namespace) -> Iterator[tuple[Measurement, list[str]]]:
    """Yields the selected measurements with their command lines."""
    names = args.only.split(",") if args.only else [measurement.name for measurement in PARTS[args.part]]
    for measurement in PARTS[args.part]:
        if measurement.name not in names:
            continue
        paths = {"output": args.output, "name": measurement.name, "images": args.images, "encoder": args.encoder}
        words = shlex.split(measurement.arguments.format(**paths)) + shlex.split(args.smaller)
        if "--against=pytorch" in words:
            words.append(f"--torch-python={args.torch_python}")
        if measurement.program == BENCHMARK:
            words.append(f"--output={args.output / measurement.name}")
        yield measurement, [sys.executable, *measurement.program.split(), *words]


def run_measurement(measurement: Measurement, command: list[str], output: pathlib.Path, limit: float) -> dict[str, Any]:
    """Runs the command for at most `limit` seconds; returns what it printed and wrote, or its error."""
    # PyTorch runs on the same GPU: JAX must leave it the memory that it does not need.
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    start, error, printed = time.monotonic(), "", ""
    try:
        process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=max(limit, 0.1), check=False)
        printed = process.stdout
        if process.returncode:
            error = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        error = "out of time"
    return {
        "name": measurement.name, "target": measurement.target, "command": shlex.join(command[1:]), "error": error,
        "seconds": time.monotonic() - start, "printed": printed,
        "report": None if error else read_report(output / measurement.name),
    }  # fmt: skip


def read_report(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the JSON file of a benchmark, or the last evaluation of a training run."""
    for file in sorted(folder.glob("*.json")):
        return json.loads(file.read_text())
    log = folder / METRICS_FILE
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    evaluations = [line for line in lines if "eval/psnr" in line]
    return evaluations[-1] if evaluations else None


def format_report(results: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of all measurements, followed by the output of each."""
    lines = ["| measurement | target | of the ceiling | images/s | x eager | x compiled | memory / ours | share |"]
    lines.append("| --- " * 8 + "|")
    for result in results:
        rows = (result["report"] or {}).get("rows", [])
        cells = [""] * 6
        if rows:
            row = rows[0]
            ratio = {variant: f"{seconds / row['seconds']:.2f}" for variant, seconds in row["pytorch_seconds"].items()}
            memory = row["pytorch_memory"].get("eager")
            cells = [f"{row['utilization']:.0%}", f"{row['images_per_second']:.0f}"]
            cells += [ratio.get("eager", ""), ratio.get("compiled", "")]
            cells += [f"{memory / row['memory']:.1f}" if memory and row["memory"] else ""]
            cells += [f"{row['share']:.1%}" if row["share"] is not None else ""]
        lines.append(f"| {result['name']} | {result['target']} | {' | '.join(cells)} |")
    for result in results:
        metrics = {n: v for n, v in (result["report"] or {}).items() if n.startswith("eval/")}
        lines += ["", f"{result['name']}: `{result['command']}`", "", result["error"] or result["printed"].strip()]
        lines += ["", ", ".join(f"{n.removeprefix('eval/')} {v:.4g}" for n, v in metrics.items())] if metrics else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
