"""How a run is doing: times of its steps, signs of life, what memory holds, stacks when it hangs, a profile."""

import faulthandler
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vqrae_jax import sharding, storage
from vqrae_jax.errors import StorageError
from vqrae_jax.evaluation import codebook_health as codebook
from vqrae_jax.train.task import Metrics, is_sum

log = logging.getLogger(__name__)

HEARTBEAT_FOLDER = "heartbeat"
HEARTBEAT_SECONDS = 10.0
WAIT_WARNING = 0.05  # share of the time that steps may wait for data


class Window:
    """Sums metrics on the device and times steps between two log lines.

    The host is one step ahead of the device: it waits for a step to end only once it has handed over the next one, so
    the device never waits for it, and the ends that it sees are the times of the steps.
    """

    def __init__(self, batch_size: int, codebook_alarm: float = 0.0):
        self._batch_size, self._codebook_alarm = batch_size, codebook_alarm
        self._total: Metrics | None = None
        self._steps = 0
        self._pending = False  # the newest step has not been waited for
        self._since: float | None = None  # when the step before it ended
        self._seconds: list[float] = []
        self._waited = 0.0

    def fetch(self, next_batch: Callable[[], Any]) -> Any:
        """next_batch(), whose time counts as waiting if the device had nothing left to do at its end."""
        began = time.perf_counter()
        batch = next_batch()
        if self._since is not None and all(x.is_ready() for x in jax.tree.leaves(self._total)):
            self._waited += time.perf_counter() - began
        return batch

    def add(self, metrics: Metrics, accumulate: Any) -> None:
        if self._since is None:  # the first step after a pause may compile or wait: it is not timed
            jax.block_until_ready(metrics)
            self._since = time.perf_counter()
        else:
            self._settle()
            self._pending = True
        self._total = metrics if self._total is None else accumulate(self._total, metrics)
        self._steps += 1

    def pause(self) -> None:
        """Evaluation and saving are not training time."""
        self._settle()
        self._since = None

    def resume(self) -> None:
        """What was done since `flush` is not training time either."""
        if self._since is not None:
            self._since = time.perf_counter()

    def flush(self) -> dict[str, float]:
        """Means of scalars, sums of events, codebook health over the window, images per second, and percentiles of the
        steps' times; warns of bad health."""
        self._settle()
        total = jax.device_get(self._total)
        counts = total.pop("counts", None)
        values = {n: float(v) if is_sum(v) else float(v) / self._steps for n, v in total.items()}
        if counts is not None:
            values |= {f"codebook/{n}": v for n, v in codebook.health(counts).items()}
            if message := codebook.alarm(counts, self._codebook_alarm):
                log.warning(message)
        if self._seconds:
            spent = sum(self._seconds)
            values["images_per_second"] = self._batch_size * len(self._seconds) / spent
            for q in (50, 90, 99):
                values[f"step_seconds/p{q}"] = float(np.percentile(self._seconds, q))
            values["data_wait"] = min(self._waited / spent, 1.0)
        self._total, self._steps, self._seconds, self._waited = None, 0, [], 0.0
        return values

    def _settle(self) -> None:
        if self._pending:
            jax.block_until_ready(self._total)
            now = time.perf_counter()
            self._seconds.append(now - self._since)
            self._since, self._pending = now, False


class Health:
    """What the processes of a run know of each other at each log line, and the warning when data is slow."""

    def __init__(self):
        self._warned = False

    def share(self, values: dict[str, float]) -> dict[str, float]:
        """`values` of this process -> those of the run: the longest wait for data, the sum of skipped images."""
        wait = values.get("data_wait", 0.0)
        numbers = np.array([wait, values["data/skipped"], values.get("step_seconds/p50", 0.0)])
        if jax.process_count() > 1:
            every = np.asarray(multihost_utils.process_allgather(numbers))
            slowest = int(every[:, 0].argmax())
            wait = float(every[slowest, 0])
            if "data_wait" in values:
                log.info(
                    "%d processes: median step %.3f to %.3f s, longest wait for data %.1f %% (process %d), skipped %d",
                    len(every), every[:, 2].min(), every[:, 2].max(), 100 * wait, slowest, every[:, 1].sum(),
                )  # fmt: skip
            values = values | {"data/skipped": int(every[:, 1].sum())}
            if "data_wait" in values:
                values["data_wait"] = wait
        if wait > WAIT_WARNING and not self._warned:
            self._warned = True
            log.warning(
                "steps wait for data %.0f %% of the time: more data.workers or data.threads, or a smaller "
                "data.image_size on disk, would make the run faster",
                100 * wait,
            )
        return values


class Heartbeat:
    """workdir/heartbeat/<process>.json: {"step", "time": seconds since the epoch, "process", "processes"}.

    Written at most every ten seconds; a file that grows old tells of a run that hangs or is gone.
    """

    def __init__(self, workdir: storage.Path):
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._path = workdir / HEARTBEAT_FOLDER / f"{self._process}.json"
        self._last = -HEARTBEAT_SECONDS

    def beat(self, step: int, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._last < HEARTBEAT_SECONDS and not force:
            return
        self._last = now
        sign = {"step": step, "time": round(time.time(), 3), "process": self._process, "processes": self._processes}
        try:
            storage.write_bytes(self._path, json.dumps(sign).encode())
        except (OSError, StorageError) as error:  # the run is worth more than the sign
            log.warning("no heartbeat: %s", error)


class Watchdog:
    """Prints the stack of every thread to standard error after `seconds` without a step, and again after as many.

    An evaluation and a save count as part of the step before them.
    """

    def __init__(self, seconds: float, file: IO[str] | None = None):
        self._seconds, self._file = seconds, file or sys.__stderr__

    def step(self) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Profile:
    """Traces the steps of a range into TensorBoard's folder, for its profile tab and XProf."""

    def __init__(self, steps: range, folder: pathlib.Path):
        self._steps, self._folder, self._tracing = steps, folder, False

    def before(self, step: int) -> None:
        if self._steps and not self._tracing and step in self._steps:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, metrics: Metrics) -> None:
        if self._tracing and step >= self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()
            log.info("profile of steps %d to %d in %s", self._steps[0], self._steps[-1], self._folder)

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


@contextmanager
def watching(
    workdir: storage.Path, logs: pathlib.Path, hang_seconds: float, profile_steps: range
) -> Iterator[tuple[Heartbeat, Watchdog, Profile]]:
    """The three that must be stopped when a run ends, however it ends; traces go to the folder `logs`."""
    watchdog, profile = Watchdog(hang_seconds), Profile(profile_steps, logs / "tensorboard")
    watchdog.step()
    try:
        yield Heartbeat(workdir), watchdog, profile
    finally:
        watchdog.close()
        profile.close()


def tell_left_whole(leaves: dict[str, int], mesh: Mesh) -> None:
    """Warns of what `sharding.left_whole` found."""
    if leaves:
        log.warning(
            "mesh.fsdp leaves %d arrays whole on each device, %.2f GiB, because mesh.data=%d divides none of their "
            "dimensions (%s): a mesh.data that does, as with a larger mesh.model, would split them",
            len(leaves), sum(leaves.values()) / 2**30, mesh.shape["data"], max(leaves, key=leaves.get),
        )  # fmt: skip


def tell_memory(trees: dict[str, Any]) -> None:
    """One line: what each tree takes on each device."""
    sizes = {name: sharding.device_bytes(tree) for name, tree in trees.items()}
    parts = ", ".join(f"{name} {_readable(size)}" for name, size in sizes.items())
    log.info("memory per device: %s; together %s", parts, _readable(sum(sizes.values())))


def _readable(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
