"""The log of a run: JSON lines, TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vqrae_jax import storage
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation.report import METRICS_FILE

log = logging.getLogger(__name__)

WANDB_FILE = "wandb_run.txt"  # in a workdir: id of the run at Weights & Biases
COPY_SECONDS = 60.0  # between copies of the log to a bucket


class MetricWriters:
    """All writers of one run.

    metrics.jsonl has one object per line: {"step": ..., "time": seconds since the epoch, name: value, ...}.

    Logs for a bucket are written to a temporary folder and copied. With active=False, as in all processes except the
    first, nothing is written. `tensorboard` is the folder of TensorBoard's files.
    """

    def __init__(self, workdir: storage.Path, config: dict[str, Any], wandb_project: str | None, active: bool = True):
        self._active, self._mirror = active, storage.Mirror(workdir)
        folder = self._mirror.folder
        self.tensorboard = folder / "tensorboard"
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, WANDB_FILE):  # a resumed run continues these files
            self._mirror.restore(name)
        self._lines = _open_lines(folder / METRICS_FILE)
        self._events = EventFile(self.tensorboard)
        self._wandb = _start_wandb(wandb_project, folder, workdir.name, config) if wandb_project else None

    def mark_resumed(self, step: int) -> None:
        """Makes TensorBoard hide what was logged of later steps, which will be logged again."""
        if not self._active:
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        self._events.add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of metrics."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        from tensorboardX import summary

        for name, value in values.items():
            self._events.add(step, summary=summary.scalar(name, value))
        if self._wandb:
            self._wandb.log(values, step=step)
        self._mirror.upload(COPY_SECONDS)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Writes an image to TensorBoard and Weights & Biases."""
        if not self._active:
            return
        from tensorboardX import summary

        self._events.add(step, summary=summary.image(name, image, dataformats="HWC"))
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Closes all files, and copies them to a bucket."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._mirror.close)
            if self._active:
                if self._wandb:
                    closing.callback(self._wandb.finish)
                closing.callback(self._events.close)
                closing.enter_context(contextlib.suppress(OSError))  # `scalars` has raised it already
                closing.callback(self._lines.close)


class EventFile:
    """A file of TensorBoard events that is written at once.

    tensorboardX's own writer has a thread, which a full disk ends, and a queue, for which the run would then wait
    forever. Here such an error ends this file alone: TensorBoard reads nothing after an incomplete record.
    """

    def __init__(self, folder: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # Without the suffix two runs that start in the same second share a file.
        self._writer: Any = EventsWriter(str(folder / "events"), filename_suffix=f".{uuid.uuid4().hex[:8]}")

    def add(self, step: int, **content: Any) -> None:
        """Writes an event with a `summary` or a `session_log`."""
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step, **content)
        self._try(lambda writer: (writer.write_event(event), writer.flush()))

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            remedy = f"TensorBoard receives nothing more until this run is resumed; {METRICS_FILE} is complete"
            log.warning("%s: %s; %s", self._folder, error, remedy)
            self._writer = None


def check_wandb(project: str | None) -> None:
    """Raises ConfigError if Weights & Biases is requested and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "Weights & Biases is not installed: pip install 'vqrae-jax[wandb]', or set it to None",
            field="train.wandb_project", value=project,
        )  # fmt: skip


def _open_lines(path: pathlib.Path) -> io.TextIOWrapper:
    """Opens a file to append lines, also if a kill or a full disk has cut its last line short."""
    lines = path.open("a+b")
    if lines.tell():
        lines.seek(-1, os.SEEK_END)
        if lines.read() != b"\n":
            lines.write(b"\n")
    return io.TextIOWrapper(lines, encoding="utf-8")


def _start_wandb(project: str, folder: pathlib.Path, name: str, config: dict[str, Any]) -> Any:
    import wandb

    file = folder / WANDB_FILE
    if not file.is_file():  # runs of the same name, or of the same path on several machines, are different runs
        storage.write_bytes(file, uuid.uuid4().hex.encode())
    return wandb.init(project=project, dir=str(folder), config=config, resume="allow", name=name, id=file.read_text())
