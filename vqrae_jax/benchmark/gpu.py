"""All figures that want a GPU, in three commands of less than ten minutes each; `launch/gpu_figures.sh` runs them.

Every figure is one other command of this package in a process of its own, so that none inherits another's memory, and
one that fails or takes too long is a line of the report like the others. The report, Markdown and JSON, is written anew
after every figure: what was measured before a machine was taken away is there.
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

from vqrae_jax.train.writers import METRICS_FILE

LIMIT = 570.0  # seconds of one command, whatever is left of it


@dataclasses.dataclass(frozen=True)
class Figure:
    """One command and what it is to show.

    Attributes:
      asked: the number to reach, in words.
      module: `vqrae_jax.benchmark` or `vqrae_jax.main`.
    """

    name: str
    asked: str
    arguments: str
    module: str = "vqrae_jax.benchmark"


SPEED = "--dtype=bfloat16 --rounds=20"
XL = f"train_step {SPEED} --decoder=ViT-XL"
RECIPE = f"{XL} --lpips --adversary=dino"
PYTORCH = "--against=pytorch --torch-compile"
PICTURES = (
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
        Figure("tokenize", "60 % of the ceiling, about 10,000 images/s", f"codes {SPEED} --batch=256 {PYTORCH}"),
        Figure("step", "55 %, 1.3 x compiled PyTorch, 1.6 x eager", f"{XL} --batch=64 --attention=cudnn {PYTORCH}"),
        Figure("step-xla", "as step", f"{XL} --batch=64"),
        Figure("step-large", "55 %", f"{XL} --batch=128 --attention=cudnn"),
        Figure("step-remat", "55 %", f"{XL} --batch=256 --attention=cudnn --remat"),
        Figure("tokenize-cudnn", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn"),
        Figure("tokenize-float32", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --search=float32"),
        Figure("tokenize-kernel", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --search=kernel"),
        Figure("tokenize-cores", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --search=tensor_cores"),
        Figure("tokenize-int8", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --matmul=int8"),
        Figure("tokenize-fp8", "as tokenize", f"codes {SPEED} --batch=256 --attention=cudnn --matmul=fp8"),
    ],
    "recipe": [
        Figure("recipe", "45 %", f"{RECIPE} --batch=32 --attention=cudnn"),
        Figure("recipe-large", "45 %", f"{RECIPE} --batch=64 --attention=cudnn"),
        Figure(
            "quantizer", "3 x the textbook layer, memory / 8",
            "quantizer --batch=512 --codes=16384 --rounds=9 --against=pytorch",
        ),
        Figure("kernels", "the fastest becomes the GPU's own", "kernels"),
        Figure("share", "quantizer's share at most 5 %", f"{XL} --batch=64 --attention=cudnn --share"),
        Figure("share-65536", "as above", f"{XL} --batch=64 --attention=cudnn --codes=65536 --share"),
        Figure("loop", "the loop adds at most 2 %", "end_to_end --steps=400 --batch=64 --size=128"),
    ],
    "pictures": [
        Figure("l1", "PSNR, SSIM, feature distance", f"{PICTURES} {L1_ONLY}", "vqrae_jax.main"),
        Figure("features", "as above", f"{PICTURES} {WITHOUT_ADVERSARY}", "vqrae_jax.main"),
        Figure("adversary", "as above", PICTURES, "vqrae_jax.main"),
    ],
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Runs the figures of one part and writes the report after each."""
    given = parse(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    end, found = time.monotonic() + given.limit, []
    for figure, command in commands(given):
        print(f"{figure.name}: {shlex.join(command)}", flush=True)
        if given.dry_run:
            continue
        found.append(run(figure, command, given.output, end - time.monotonic()))
        (given.output / f"{given.part}.json").write_text(json.dumps(found, indent=2) + "\n")
        (given.output / f"{given.part}.md").write_text(markdown(found))
        print(f"  {found[-1]['seconds']:.0f} s{': ' + found[-1]['failed'] if found[-1]['failed'] else ''}", flush=True)
    if found:
        print(markdown(found))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark gpu", description=__doc__)
    parser.add_argument("part", choices=list(PARTS), help="which of the three commands")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("gpu_figures"), help="folder for the report"
    )
    parser.add_argument("--only", help="figures, comma-separated")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--images", default="photographs", help="pictures: folder with train/ and val/")
    parser.add_argument("--encoder", default="", help="pictures: a DINOv2-like hub folder with 16-pixel patches")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds; figures that do not fit are left out")
    parser.add_argument("--smaller", default="", help="arguments added to each: smaller sizes, for a trial")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser.parse_args(arguments)


def commands(given: argparse.Namespace) -> Iterator[tuple[Figure, list[str]]]:
    """The chosen figures and what is run for each."""
    names = given.only.split(",") if given.only else [figure.name for figure in PARTS[given.part]]
    for figure in PARTS[given.part]:
        if figure.name not in names:
            continue
        told = {"output": given.output, "name": figure.name, "images": given.images, "encoder": given.encoder}
        words = shlex.split(figure.arguments.format(**told)) + shlex.split(given.smaller)
        if "--against=pytorch" in words:
            words.append(f"--torch-python={given.torch_python}")
        if figure.module == "vqrae_jax.benchmark" and words[0] != "end_to_end":
            words.append(f"--output={given.output / figure.name}")
        yield figure, [sys.executable, "-m", figure.module, *words]


def run(figure: Figure, command: list[str], output: pathlib.Path, seconds: float) -> dict[str, Any]:
    """What the command printed and wrote, or why it did not."""
    # PyTorch runs on the same card: JAX must leave it the memory that it does not need itself.
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    start, failed, printed = time.monotonic(), "", ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=max(seconds, 0.1), check=False)
        printed = done.stdout
        if done.returncode:
            failed = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        failed = "no time was left"
    return {
        "name": figure.name, "asked": figure.asked, "command": shlex.join(command[1:]), "failed": failed,
        "seconds": time.monotonic() - start, "printed": printed,
        "report": None if failed else _report(output / figure.name),
    }  # fmt: skip


def _report(folder: pathlib.Path) -> dict[str, Any] | None:
    """What a benchmark wrote, or the last evaluation of a training run."""
    for file in sorted(folder.glob("*.json")):
        return json.loads(file.read_text())
    log = folder / METRICS_FILE
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    evaluated = [line for line in lines if "eval/psnr" in line]
    return evaluated[-1] if evaluated else None


def markdown(found: list[dict[str, Any]]) -> str:
    """A table of all figures, then what each printed."""
    lines = ["| figure | asked | of the ceiling | images/s | x eager | x compiled | memory / ours | share |"]
    lines.append("| --- " * 8 + "|")
    for figure in found:
        rows = (figure["report"] or {}).get("rows", [])
        cells = [""] * 6
        if rows and "utilization" in rows[0]:
            row = rows[0]
            ratio = {variant: f"{theirs / row['seconds']:.2f}" for variant, theirs in row["against"].items()}
            memory = row["against_memory"].get("eager")
            cells = [f"{row['utilization']:.0%}", f"{row['images_per_second']:.0f}"]
            cells += [ratio.get("eager", ""), ratio.get("compiled", "")]
            cells += [f"{memory / row['memory']:.1f}" if memory and row["memory"] else ""]
            cells += [f"{row['share']:.1%}" if row["share"] is not None else ""]
        lines.append(f"| {figure['name']} | {figure['asked']} | {' | '.join(cells)} |")
    for figure in found:
        told = {n: v for n, v in (figure["report"] or {}).items() if n.startswith("eval/")}
        lines += ["", f"{figure['name']}: `{figure['command']}`", "", figure["failed"] or figure["printed"].strip()]
        lines += ["", ", ".join(f"{n.removeprefix('eval/')} {v:.4g}" for n, v in told.items())] if told else []
    return "\n".join(lines) + "\n"
