"""The training loop with input, logging and checkpoints, against its bare step on one batch; both by the same program.

The bare step is timed before and after the loop, so that a slower or faster moment of the machine meets both.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

from vqrae_jax.benchmark.ceilings import seconds
from vqrae_jax.config import Config, from_dict
from vqrae_jax.train import loop
from vqrae_jax.train.state import TrainState
from vqrae_jax.train.writers import METRICS_FILE

LOG_EVERY = 20


def main(arguments: list[str]) -> None:
    """Prints seconds per step of both and what the loop adds."""
    given = parse(arguments)
    config = settings(given.steps, given.batch, given.size)
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Run(config, pathlib.Path(folder) / "bare")
        batch = run.next_batch()
        before = bare(run, batch, given.steps // 2)
        loop.train(config, pathlib.Path(folder) / "loop")
        after = bare(run, batch, given.steps // 2)
        run.close()
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "loop" / METRICS_FILE).read_text().splitlines()]
    logged = [line for line in lines if "loss/total" in line]
    inside = (logged[-1]["time"] - logged[0]["time"]) / (logged[-1]["step"] - logged[0]["step"])
    step = (before + after) / 2
    waits = statistics.mean(line["data_wait"] for line in logged[1:])
    print(f"bare step {before:.4f} s before, {after:.4f} s after; in the loop {inside:.4f} s: {inside / step - 1:+.1%}")
    every = config.train.checkpoint_every
    print(f"  {len(logged)} log lines, a checkpoint every {every} steps, waiting for data {waits:.1%}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m vqrae_jax.benchmark end_to_end", description=__doc__)
    parser.add_argument("--steps", type=int, default=240, help="of the loop; each bare run has half as many")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    return parser.parse_args(arguments)


def settings(steps: int, batch: int, size: int) -> Config:
    """A small tokenizer on the photographs that come with scikit-image and scikit-learn."""
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


def bare(run: loop.Run, batch: dict, steps: int) -> float:
    """Mean seconds of a step whose batch is there, the first few not counted."""

    def many(count: int) -> TrainState:
        for _ in range(count):
            run.state, _ = run.step(run.state, run.frozen, batch)
        return run.state

    many(5)
    return seconds(lambda: many(steps)) / steps
