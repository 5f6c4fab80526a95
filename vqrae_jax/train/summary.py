"""Output of a run that is printed once: memory per device at its start, a table of results at its end."""

import logging
from typing import Any

from vqrae_jax import sharding, storage
from vqrae_jax.evaluation.report import METRICS_FILE
from vqrae_jax.train.state import TrainState

log = logging.getLogger(__name__)

IMAGE_FILE = "reconstructions.png"  # in a workdir: validation images and their reconstructions


def log_memory(state: TrainState, frozen: Any) -> None:
    """Logs the bytes that the parts of the state and the frozen networks take on each device."""
    trees = {
        "params": state.params, "ema": state.ema_params, "optimizer": state.opt_state,
        "batch_stats": state.batch_stats, "frozen": frozen,
    }  # fmt: skip
    sizes = {name: sharding.device_bytes(tree) for name, tree in trees.items()}
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in sizes.items())
    log.info("memory per device: %s; total %s", parts, _format_bytes(sum(sizes.values())))


def print_summary(step: int, metrics: dict[str, float], workdir: storage.Path, checkpoints: storage.Path) -> None:
    """Prints the validation metrics of a finished run, and where its files are."""
    from rich.console import Console
    from rich.table import Table

    rows = []
    if metrics:
        rows.append(("validation PSNR", f"{metrics['eval/psnr']:.2f} dB over {metrics['eval/images']} images"))
    if "eval/codebook_usage" in metrics:
        dead = metrics["eval/codebook_dead"]
        rows.append(("codebook usage", f"{metrics['eval/codebook_usage']:.1%} of the codes ({dead:.0f} unused)"))
        rows.append(("perplexity", f"{metrics['eval/codebook_perplexity']:.0f}"))
    rows += [
        ("images", str(workdir / IMAGE_FILE)),
        ("checkpoints", str(checkpoints)),
        ("log", str(workdir / METRICS_FILE)),
        ("TensorBoard", f"tensorboard --logdir {workdir / 'tensorboard'}"),
    ]
    table = Table(title=f"step {step}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _format_bytes(size: int | float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
