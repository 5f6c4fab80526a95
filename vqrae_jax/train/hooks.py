"""Everything that only watches a run: times, log lines, NaN guard, profile, heartbeat, watchdog."""

import contextlib
import dataclasses
import faulthandler
import io
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vqrae_jax import storage
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.errors import StorageError, UserError
from vqrae_jax.evaluation import codebook_health
from vqrae_jax.progress import Pace
from vqrae_jax.train.task import Metrics, TrainState, is_sum

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
STEP_SECONDS = 30.0  # without a line about a step
WAIT_WARNING = 0.05  # share of the time that steps may wait for data
NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """A step that the host has dispatched, and what the loop does after it."""

    step: int
    state: TrainState
    metrics: Metrics  # on the device, possibly still being computed
    log: bool = False
    evaluate: bool = False
    save: bool = False


class Hook:
    """An observer of a run."""

    def before_step(self, step: int) -> None:
        """Prepares to observe a step, which is dispatched next."""

    def after_step(self, event: StepEvent) -> None:
        """Observes a step; may wait for the device only if the event logs, evaluates or saves."""

    def close(self) -> None:
        """Ends the observation, once at the end of the run, after errors too."""


class StepTimer(Hook):
    """Sums metrics on the device and times steps, between two log lines.

    The host waits for the end of a step only after it has dispatched the next one, so the device never waits for it.
    """

    def __init__(self, batch_size: int, codebook_alarm: float = 0.0):
        self._batch_size, self._codebook_alarm = batch_size, codebook_alarm
        self._add = jax.jit(lambda total, new: jax.tree.map(jnp.add, total, new), donate_argnums=0)
        self._since: float | None = None  # end of the last step that was waited for; None: the clock is stopped
        self._pending = False  # whether a newer step has not been waited for
        self._reset()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Iterates over batches; the time for one counts as waiting if the device then has nothing left to do."""
        start = time.perf_counter()
        for batch in batches:
            if self._since is not None and all(x.is_ready() for x in jax.tree.leaves(self._total)):
                self._waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def after_step(self, event: StepEvent) -> None:
        if self._since is None:  # the first step after a pause may compile or wait: it is not timed
            jax.block_until_ready(event.metrics)
            self._since = time.perf_counter()
        else:
            self._wait_for_step()
            self._pending = True
        self._total = event.metrics if self._total is None else self._add(self._total, event.metrics)
        self._steps += 1

    def pause(self) -> None:
        """Stops the clock until the end of the next step: evaluation and saving are not training time."""
        self._wait_for_step()
        self._since = None

    def restart(self) -> None:
        """Leaves out the time since `flush`, which is not training time either."""
        if self._since is not None:
            self._since = time.perf_counter()

    def flush(self) -> dict[str, int | float]:
        """Returns metrics and times since the last call, and the share of the time that steps waited for data."""
        self._wait_for_step()
        total = jax.device_get(self._total)
        counts = total.pop("counts", None)
        values = {n: float(v) if is_sum(v) else float(v) / self._steps for n, v in total.items()}
        if counts is not None:
            values |= {f"codebook/{n}": v for n, v in codebook_health.health(counts).items()}
            if message := codebook_health.alarm(counts, self._codebook_alarm):
                log.warning(message)
        if self._seconds:
            spent = sum(self._seconds)
            values["images_per_second"] = self._batch_size * len(self._seconds) / spent
            values |= {f"step_seconds/p{q}": float(np.percentile(self._seconds, q)) for q in (50, 90, 99)}
            values["data_wait"] = min(self._waited / spent, 1.0)
        self._reset()
        return values

    def _reset(self) -> None:
        self._total: Metrics | None = None
        self._steps, self._seconds, self._waited = 0, [], 0.0

    def _wait_for_step(self) -> None:
        if self._pending:
            jax.block_until_ready(self._total)
            now = time.perf_counter()
            self._seconds.append(now - self._since)
            self._since, self._pending = now, False


class Logger(Hook):
    """Passes step and metrics to its `outputs` at every event that logs; warns once if data is slow.

    `state_metrics` is computed only then; `skipped` returns the number of images that this process could not read.
    """

    def __init__(
        self, timer: StepTimer, state_metrics: Callable[[TrainState], Metrics], skipped: Callable[[], int],
        *outputs: Callable[[int, dict[str, int | float]], None],
    ):  # fmt: skip
        self._timer, self._state_metrics, self._skipped, self._outputs = timer, state_metrics, skipped, outputs
        self._warned = False

    def after_step(self, event: StepEvent) -> None:
        if event.log:
            values = self.combine(self._timer.flush() | {"data/skipped": self._skipped()})
            values |= {n: float(value) for n, value in jax.device_get(self._state_metrics(event.state)).items()}
            self._timer.restart()
            for output in self._outputs:
                output(event.step, values)
        if event.evaluate or event.save:
            self._timer.pause()

    def combine(self, values: dict[str, int | float]) -> dict[str, int | float]:
        """Combines the values of all processes: the longest wait for data, the sum of skipped images."""
        wait = values.get("data_wait", 0.0)
        if jax.process_count() > 1:
            local = np.array([wait, values["data/skipped"], values.get("step_seconds/p50", 0.0)])
            waits, skipped, medians = np.asarray(multihost_utils.process_allgather(local)).T
            wait, values = float(waits.max()), values | {"data/skipped": int(skipped.sum())}
            if "data_wait" in values:
                values["data_wait"] = wait
                log.info(
                    "%d processes: median step %.3f to %.3f s, longest wait for data %.1f %% (process %d), skipped %d",
                    len(waits), medians.min(), medians.max(), 100 * wait, waits.argmax(), skipped.sum(),
                )  # fmt: skip
        if wait > WAIT_WARNING and not self._warned:
            self._warned = True
            remedy = "raise data.workers or data.threads, or store smaller images"
            log.warning("steps wait for data %.0f %% of the time; %s", 100 * wait, remedy)
        return values


class SaveClock:
    """Measures the time since the last checkpoint, by the clock of process 0; `minutes` is the limit, 0: none."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._saved = time.monotonic()

    def is_due(self) -> bool:
        """Returns whether the limit is reached. All processes call it between two steps and get the same answer."""
        if not self._seconds:
            return False
        due = time.monotonic() - self._saved >= self._seconds
        return bool(multihost_utils.broadcast_one_to_all(np.int32(due))) if jax.process_count() > 1 else due


class NaNGuard(Hook):
    """Stops a run whose losses are not finite, before such a state is logged, evaluated or saved."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._first: Metrics = {}  # on the device: the step in which each metric was first not finite
        self._update = jax.jit(_update_first)

    def after_step(self, event: StepEvent) -> None:
        watched = {n: v for n, v in event.metrics.items() if n.startswith(("loss/", "gan/", "grad_norm"))}
        first = self._first or dict.fromkeys(watched, np.int32(NEVER))
        self._first = self._update(first, watched, np.int32(event.step))
        if not (event.log or event.evaluate or event.save):
            return
        first = {n: int(step) for n, step in jax.device_get(self._first).items()}
        if (step := min(first.values(), default=NEVER)) == NEVER:
            return
        self._checkpoints.wait()  # the last one may still be being written
        resume = "No checkpoint is complete; the same command starts again"
        if steps := self._checkpoints.steps:
            path = self._checkpoints.folder / str(steps[-1])
            resume = f"The last good checkpoint is {path}; the same command resumes from it"
        raise UserError(
            f"step {step}: {', '.join(n for n in first if first[n] == step)} not finite. {resume}: run it with a lower "
            "optimizer.learning_rate, a smaller weight of the term, or optimizer.clip_norm"
        )


def _update_first(first: Metrics, metrics: Metrics, step: jax.Array) -> Metrics:
    return {n: jnp.where(jnp.isfinite(metrics[n]), first[n], jnp.minimum(first[n], step)) for n in first}


class Heartbeat(Hook):
    """Writes workdir/heartbeat/<process>.json at most every ten seconds; an old file means a process that hangs.

    Attributes:
      first_step_seconds: duration of the first step, which compiles, at the last start in this workdir; None: unknown.
    """

    def __init__(self, workdir: storage.Path, step: int = 0):
        process = jax.process_index()
        self._content = {"step": step, "time": 0.0, "process": process, "processes": jax.process_count()}  # Unix time
        self._path = workdir / "heartbeat" / f"{process}.json"
        self._last, self._start = -HEARTBEAT_SECONDS, 0.0
        self.first_step_seconds: float | None = None
        with contextlib.suppress(OSError, StorageError, ValueError, KeyError, TypeError):
            self.first_step_seconds = float(json.loads(self._path.read_bytes())["first_step_seconds"])

    def before_step(self, step: int) -> None:
        self._start = self._start or time.monotonic()

    def after_step(self, event: StepEvent) -> None:
        if "first_step_seconds" not in self._content:  # `StepTimer` has waited for the first step
            self._content["first_step_seconds"] = round(time.monotonic() - self._start, 1)
        self._content["step"] = event.step
        if time.monotonic() - self._last >= HEARTBEAT_SECONDS:
            self._last = time.monotonic()
            self.close()

    def close(self) -> None:
        self._content["time"] = round(time.time(), 3)
        try:
            storage.write_bytes(self._path, json.dumps(self._content).encode())
        except (OSError, StorageError) as error:  # the run is more important
            log.warning("no heartbeat: %s", error)


class Watchdog(Hook):
    """Prints all stacks after each `seconds` (0: never) without a step, with which evaluation and saving count."""

    def __init__(self, seconds: int | float, file: io.TextIOWrapper | None = None):
        self._seconds, self._file = seconds, file or sys.__stderr__
        self.after_step(None)

    def after_step(self, event: StepEvent | None) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Profiler(Hook):
    """Traces a range of steps for TensorBoard's profile tab and XProf."""

    def __init__(self, steps: range, folder: pathlib.Path):
        self._steps, self._folder, self._tracing = steps, folder, False

    def before_step(self, step: int) -> None:
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after_step(self, event: StepEvent) -> None:
        if self._tracing and event.step >= self._steps[-1]:
            jax.block_until_ready(event.metrics)
            self.close()
            log.info("wrote a profile of steps %d to %d to %s", self._steps[0], self._steps[-1], self._folder)

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


class StepLog(Hook):
    """Logs the first step, the metrics of every logged step, and the number of a step where those are rare."""

    def __init__(self, total: int, first_step_seconds: float | None = None):
        """`first_step_seconds` is the duration of the first step, which compiles, at an earlier start."""
        self._total, self._expected, self._pace, self._last = total, first_step_seconds, Pace(total), None

    def before_step(self, step: int) -> None:
        if self._last is None:
            duration = "minutes for large models" if self._expected is None else f"about {self._expected:.0f} s"
            log.info("compiling the training step (%s)", duration)
            self._last = time.monotonic()

    def after_step(self, event: StepEvent) -> None:
        eta, seconds = self._pace.describe(event.step), time.monotonic() - self._last
        if not eta and event.step < self._total:  # the first step
            self._log(event.step, f"total {float(event.metrics['loss/total']):.4f}, {seconds:.0f} s with compilation")
        elif seconds >= STEP_SECONDS and not event.log:
            self._log(event.step, eta)

    def show(self, step: int, values: dict[str, int | float]) -> None:
        """Logs the metrics of a step."""
        names = [n for n in ("loss/total", "loss/pixel", "loss/vq", "accuracy") if n in values]
        text = ", ".join(f"{n.removeprefix('loss/')} {values[n]:.4f}" for n in names)
        if "codebook/usage" in values:
            text += f", codes {values['codebook/usage']:.0%}"
        if "images_per_second" in values:
            text += f", {values['images_per_second']:,.1f} images/s"
        self._log(step, text + self._pace.describe(step))

    def _log(self, step: int, text: str) -> None:
        log.info("step %s of %s: %s", f"{step:,}", f"{self._total:,}", text.removeprefix(", "))
        self._last = time.monotonic()
