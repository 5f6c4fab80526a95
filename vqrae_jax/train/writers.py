"""Where numbers and pictures of a run go: JSON lines, TensorBoard, Weights & Biases."""

import contextlib
import io
import json
import logging
import os
import pathlib
import time
import uuid
from typing import IO, Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.errors import ConfigError
from vqrae_jax.evaluation.report import METRICS_FILE

log = logging.getLogger(__name__)

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
        self._lines = _added_to(logs / METRICS_FILE)
        self._board = Board(logs / "tensorboard")
        self._wandb = _start_wandb(wandb_project, logs, name, config) if wandb_project else None

    def resumed(self, step: int) -> None:
        """Tells TensorBoard to show nothing that was logged of later steps, which are going to be logged again."""
        if not self._active:
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        self._board.add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        from tensorboardX import summary

        for name, value in values.items():
            self._board.add(step, summary=summary.scalar(name, value))
        self._board.flush()
        if self._wandb:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """image uint8 [H, W, 3]."""
        if not self._active:
            return
        from tensorboardX import summary

        self._board.add(step, summary=summary.image(name, image, dataformats="HWC"))
        self._board.flush()
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        if not self._active:
            return
        with contextlib.suppress(OSError):  # of a line that could not be written, which `scalars` has told
            self._lines.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


class Board:
    """TensorBoard's events, written at once: its own writer has a thread, which a full disk ends, and a queue to that
    thread, at which the run would then wait without end.

    What a disk does not take ends the board alone, as the run is worth more: a record that is cut ends what TensorBoard
    reads of the file.
    """

    def __init__(self, folder: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{uuid.uuid4().hex[:8]}"  # two runs in one second would else be one file
        self._folder = folder
        self._file: Any = EventsWriter(str(folder / "events"), filename_suffix=suffix)

    def add(self, step: int, **content: Any) -> None:
        """An event of this step: `summary` or `session_log`."""
        from tensorboardX.proto.event_pb2 import Event

        self._do("write_event", Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")

    def _do(self, what: str, *given: Any) -> None:
        if self._file is None:
            return
        try:
            getattr(self._file, what)(*given)
        except OSError as error:
            told = f"TensorBoard gets no more of this run until it is resumed; {METRICS_FILE} has all"
            log.warning("%s: %s; %s", self._folder, error, told)
            self._file = None


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
        storage.write_bytes(file, uuid.uuid4().hex.encode())
    return wandb.init(project=project, dir=str(logs), config=config, resume="allow", name=name, id=file.read_text())
