"""Where numbers and pictures of a run go: JSON lines, TensorBoard, Weights & Biases."""

import io
import json
import os
import pathlib
import time
import uuid
from typing import IO, Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.config import ConfigError
from vqrae_jax.inference.location import METRICS_FILE

WANDB_FILE = "wandb_run.txt"  # of a run that is logged there: its id


class Writers:
    """All writers of one run; on other processes than the first it writes nothing.

    metrics.jsonl has one object per line: {"step": ..., "time": seconds since the epoch, name: value, ...}.
    """

    def __init__(
        self, logs: pathlib.Path, name: str, config: dict[str, Any], wandb_project: str | None, active: bool = True
    ):
        """Args: the folder to write to, the run's name and config for Weights & Biases."""
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        self._lines = _added_to(logs / METRICS_FILE)
        self._board = SummaryWriter(str(logs / "tensorboard"))
        self._wandb = _start_wandb(wandb_project, logs, name, config) if wandb_project else None

    def resumed(self, step: int) -> None:
        """Tells TensorBoard to show nothing that was logged of later steps, which are going to be logged again."""
        if not self._active:
            return
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        again = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._board.file_writer.add_event(again)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """image uint8 [H, W, 3]."""
        if not self._active:
            return
        self._board.add_image(name, image, step, dataformats="HWC")
        self._board.flush()
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        if not self._active:
            return
        self._lines.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _added_to(file: pathlib.Path) -> IO[str]:
    """`file`, to be gone on with on a line of its own: a kill or a full disk may have cut the last one short."""
    lines = file.open("a+b")
    if lines.tell():
        lines.seek(-1, os.SEEK_END)
        if lines.read() != b"\n":
            lines.write(b"\n")
    return io.TextIOWrapper(lines, encoding="utf-8")


def _start_wandb(project: str, logs: pathlib.Path, name: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"train.wandb_project={project!r} needs Weights & Biases: pip install 'vqrae-jax[wandb]', or set it to None"
        ) from None
    file = logs / WANDB_FILE
    if not file.is_file():  # runs of one name, or of one path on several machines, are several runs
        storage.write(file, uuid.uuid4().hex.encode())
    return wandb.init(project=project, dir=str(logs), config=config, resume="allow", name=name, id=file.read_text())
