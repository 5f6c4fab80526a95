"""Measures the time that input, logging and checkpoints of the training loop add to its bare step.

python benchmarks/end_to_end.py

The same program runs in the loop and, on one batch, alone; alone before and after the loop, so that a change of the
machine's speed affects both.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the checkout

from vqrae_jax import sharding
from vqrae_jax.benchmark.ceilings import time_call
from vqrae_jax.benchmark.machine import format_machine
from vqrae_jax.commands import command_line
from vqrae_jax.commands.command_line import count
from vqrae_jax.config import Config, from_dict
from vqrae_jax.evaluation.report import METRICS_FILE
from vqrae_jax.train import loop
from vqrae_jax.train.run import Run, open_run
from vqrae_jax.train.task import TrainState, jit_step, place_horizon

LOG_EVERY = 20


def main(arguments: list[str]) -> None:
    """Prints the seconds per step of both, and their difference."""
    args = parse(arguments)
    config = build_config(args.steps, args.batch, args.size)
    with tempfile.TemporaryDirectory() as folder:
        with open_run(config, pathlib.Path(folder) / "bare") as (run, state):
            batch = sharding.place_batch({"image": next(run.batches)["image"]}, run.mesh)
            before, state = time_bare_step(run, state, batch, args.steps // 2)
            loop.train(config, pathlib.Path(folder) / "loop")
            after, state = time_bare_step(run, state, batch, args.steps // 2)
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "loop" / METRICS_FILE).read_text().splitlines()]
    logs = [line for line in lines if "loss/total" in line]
    in_loop = (logs[-1]["time"] - logs[0]["time"]) / (logs[-1]["step"] - logs[0]["step"])
    bare = (before + after) / 2
    wait = statistics.mean(line["data_wait"] for line in logs[1:])
    print(format_machine())
    print(
        f"bare step {before:.4f} s before, {after:.4f} s after; in the loop {in_loop:.4f} s: {in_loop / bare - 1:+.1%}"
    )
    every = config.train.checkpoint_every
    print(f"  {len(logs)} log lines, a checkpoint every {every} steps, {wait:.1%} of the time waiting for data")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=240, help="steps of the loop; half as many in each bare run")
    parser.add_argument("--batch", type=count, default=16, help="images per batch")
    parser.add_argument("--size", type=count, default=128, help="pixels")
    args = parser.parse_args(arguments)
    if args.steps < 2 * LOG_EVERY:
        parser.error(f"--steps={args.steps}: must be at least {2 * LOG_EVERY}, for two lines of the log")
    return args


def build_config(steps: int, batch: int, size: int) -> Config:
    """Returns a small tokenizer on the photographs of scikit-image and scikit-learn."""
    architecture = {
        "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 8, "image_size": size
    }  # fmt: skip
    return from_dict(Config, {
        "model": {
            "encoder_config_path": None, "encoder_params": {"architecture": architecture}, "encoder_input_size": size,
            "decoder_config_path": "ViT-Nano", "decoder_patch_size": 8, "num_embeddings": 1024,
        },
        "data": {"source": "photographs", "image_size": size, "batch_size": batch, "scale": (1.5, 4.0)},
        "train": {
            "steps": steps, "log_every": LOG_EVERY, "evaluate_every": 10 * steps, "checkpoint_every": steps // 2
        },
    })  # fmt: skip


def time_bare_step(run: Run, state: TrainState, batch: dict, steps: int) -> tuple[float, TrainState]:
    """Returns the mean seconds of a step on a batch that is on the device, after a few that are not timed."""
    step, horizon = jit_step(run.task, run.mesh), place_horizon(run.config.train.steps, run.mesh)

    def run_steps(count: int) -> TrainState:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, run.frozen, batch, horizon)
        return state

    run_steps(5)
    return time_call(lambda: run_steps(steps)) / steps, state


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv[1:]))
