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
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vqrae_jax import storage
from vqrae_jax.errors import ConfigError, UserError, first_line, import_extra
from vqrae_jax.evaluation.report import METRICS_FILE

with import_extra("train", "training"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

log = logging.getLogger(__name__)

WANDB_FILE = "wandb_run.txt"  # in a workdir: id of the run at Weights & Biases
COPY_SECONDS = 60.0  # between copies of the log to a bucket


class MetricWriters:
    """All writers of one run; with active=False, as in all processes except the first, nothing is written.

    metrics.jsonl has one object per line: {"step": ..., "time": seconds since the epoch, name: value, ...}. Logs for a
    bucket are written to a temporary folder and copied. `tensorboard` is the folder of TensorBoard's files.
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
        self.tensorboard.mkdir(exist_ok=True)
        # Without the suffix two runs that start in the same second share a file.
        name, suffix = str(self.tensorboard / "events"), f".{uuid.uuid4().hex[:8]}"
        self._events: EventsWriter | None = EventsWriter(name, filename_suffix=suffix)
        self._wandb = _start_wandb(wandb_project, folder, workdir.name, config) if wandb_project else None

    def mark_resumed(self, step: int) -> None:
        """Makes TensorBoard hide what was logged of later steps, which will be logged again."""
        if self._active:
            self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, int | float]) -> None:
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._write_event(step, summary=summary.scalar(name, value))
        if self._wandb:
            self._wandb.log(values, step=step)
        self._mirror.upload(COPY_SECONDS)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        if not self._active:
            return
        self._write_event(step, summary=summary.image(name, image, dataformats="HWC"))
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            closing.callback(self._mirror.close)
            if self._active:
                if self._wandb:
                    closing.callback(self._wandb.finish)
                closing.enter_context(contextlib.suppress(OSError))  # writing has reported it already
                if self._events:
                    closing.callback(self._events.close)
                closing.callback(self._lines.close)

    def _write_event(self, step: int, **content: Any) -> None:
        """Writes a `summary` or a `session_log` at once; an error ends this file, which TensorBoard reads no further.

        A full disk ends the thread of tensorboardX's own writer, and the run would then wait for its queue forever.
        """
        try:
            if self._events:
                self._events.write_event(Event(wall_time=time.time(), step=step, **content))
                self._events.flush()
        except OSError as error:
            remedy = f"TensorBoard receives nothing more until this run is resumed; {METRICS_FILE} is complete"
            log.warning("%s: %s; %s", self.tensorboard, error, remedy)
            self._events = None


def check_wandb(project: str | None) -> None:
    """Raises ConfigError if Weights & Biases is requested and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        message = "Weights & Biases is not installed: pip install 'vqrae-jax[wandb]', or set it to None"
        raise ConfigError(message, field="train.wandb_project", value=project)


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
    options = {"dir": str(folder), "config": config, "resume": "allow", "name": name, "id": file.read_text()}
    try:
        return wandb.init(project=project, **options)
    except Exception as error:  # without an API key or a network
        message = f"Weights & Biases cannot start ({first_line(error)}); set WANDB_API_KEY, or WANDB_MODE=offline"
        raise UserError(message, field="train.wandb_project", value=project) from error
