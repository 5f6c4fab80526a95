"""The one training loop: batches in, state forward, numbers and checkpoints out."""

import contextlib
import functools
import logging
import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import __version__, checkpoint, distributed, sharding, storage
from vqrae_jax.checkpoint import Checkpoints, find_checkpoint, read_meta
from vqrae_jax.config import AdversaryConfig, Config, LossConfig, epochs_to_steps
from vqrae_jax.data import images as image_files
from vqrae_jax.data import pipeline
from vqrae_jax.errors import CheckpointError, ConfigError
from vqrae_jax.evaluation import report
from vqrae_jax.evaluation.evaluate import Measurement
from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.train import restore
from vqrae_jax.train.guard import Guard, first_bad
from vqrae_jax.train.stop import Stopped, StopSignal
from vqrae_jax.train.task import Task, step_program
from vqrae_jax.train.terminal import Progress, print_table, status_line
from vqrae_jax.train.tokenizer import TokenizerTask
from vqrae_jax.train.watch import Health, Window, tell_left_whole, tell_memory, watching
from vqrae_jax.train.writers import METRICS_FILE, WANDB_FILE, Writers

log = logging.getLogger(__name__)

PICTURE_FILE = "reconstructions.png"
LOG_SECONDS = 60.0  # between copies of the logs to a bucket


class Run:
    """Everything one run holds; built before anything long starts, so that what is wrong is said at once."""

    def __init__(
        self,
        config: Config,
        workdir: str | os.PathLike,
        devices: list[jax.Device] | None = None,
        evaluate_step: int | None = None,
    ):
        """With `evaluate_step`, the step of a checkpoint, nothing is read or written that only training needs: another
        run may be saving there."""
        self.config, self.workdir, self.evaluate_step = config, storage.resolve_path(workdir), evaluate_step
        self.evaluating = evaluating = evaluate_step is not None
        self.first = jax.process_index() == 0
        self.skipped = pipeline.Skipped()
        distributed.run_together(lambda: self._prepare(devices))
        checkpoint.check_shared(self.workdir)
        if distributed.process_count() > 1:
            distributed.check_equal(
                self._listings(), "give all of them the same images, as each reads its share of all"
            )
        settings = self.config.train
        kept = (settings.keep_last, settings.keep_best, settings.keep_every)
        self.checkpoints = Checkpoints(self.workdir, *kept, read_only=evaluating)
        self.logs, writing = storage.Mirror(self.workdir), self.first and not evaluating
        if writing:
            for name in (METRICS_FILE, WANDB_FILE):  # both are gone on with
                self.logs.restore(name)
        self.writers = Writers(
            self.logs.folder, self.workdir.name, self.config.model_dump(), settings.wandb_project, writing
        )
        self._begin()
        self.step = step_program(self.task, self.mesh)
        self.accumulate = jax.jit(lambda total, new: jax.tree.map(jnp.add, total, new), donate_argnums=0)
        self.first_bad = jax.jit(first_bad)
        where = sharding.replicated(self.mesh)
        self.codebook = jax.jit(self.task.codebook, out_shardings=where)
        self.pictures = jax.jit(self.task.pictures, out_shardings=where)

    def _prepare(self, devices: list[jax.Device] | None) -> None:
        """What each process does by itself, and what most errors come from.

        Nothing here is a collective, which would wait for a process that has failed.
        """
        if not self.evaluating:
            self.config = epochs_to_steps(self.config, lambda: pipeline.count_training_images(self.config.data))
        config = self.config
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices, config.mesh.slices)
        sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, self.mesh)
        sharding.check_batch(config.data.eval_batch_size, 1, self.mesh, "data.eval_batch_size")
        index, count = sharding.data_share(self.mesh)
        shard = {"process_index": index, "process_count": count}
        self.evaluation = pipeline.evaluation_batches(config.data, limit=config.evaluation.images, **shard)
        self.batches = None
        if not self.evaluating:
            self.batches = pipeline.train_batches(config.data, seed=config.train.seed, skipped=self.skipped, **shard)
        folder = self.workdir / checkpoint.FOLDER
        own = restore.own_model(folder, self.evaluate_step) if config.train.start_from else None
        wanted = _without_critics(config) if self.evaluating else config
        self.task: Task = TokenizerTask.build(wanted, self.mesh, own=own)
        self.measurement = None
        if self.evaluation is not None:
            wanted = config.evaluation.metrics if self.evaluating else config.evaluation.training_metrics
            self.measurement = Measurement(config, self.task, self.mesh, self.evaluation, wanted)
        checkpoint.check_writable(self.workdir)

    def _listings(self) -> dict[str, Any]:
        """What images this process has found, by field."""
        trained = {} if self.batches is None else {"data.path": self.batches.listing()}
        return trained if self.measurement is None else trained | self.measurement.listings()

    def _begin(self) -> None:
        """References, frozen networks, and the state of the newest checkpoint or a new one."""
        if self.measurement is not None:
            self.measurement.begin()
        place = functools.partial(
            sharding.shardings, mesh=self.mesh, fsdp=self.config.mesh.fsdp, fsdp_min_size=self.config.mesh.fsdp_min_size
        )
        shapes = self.task.shapes()
        if self.config.mesh.fsdp:
            tell_left_whole(sharding.left_whole(shapes, self.mesh, self.config.mesh.fsdp_min_size), self.mesh)
        self.frozen = self.task.frozen()
        found = restore.resume(self.checkpoints, shapes, place, only=self.evaluate_step)
        if found is None:
            self.state = self.task.init()
            return
        self.state, data = found
        step = int(self.state.step)
        self._tell_config_changes(step)
        if self.batches is not None:
            self.batches.set_state(data)
            self.writers.resumed(step)
        log.info("%s step %d of %s", "evaluating" if self.evaluating else "resumed from", step, self.checkpoints.folder)

    def save(self, metrics: dict[str, float] | None = None) -> None:
        state = self.state
        meta = {
            "config": self.config.model_dump(mode="json"),
            "version": __version__,
            "revision": git_revision(),
            "step": int(state.step),
        }
        scores = {"psnr": metrics["eval/psnr"]} if metrics and "eval/psnr" in metrics else None
        data = self.batches.get_state()
        self.checkpoints.save(int(state.step), state.inference(), state.rest(), data, meta, scores)

    def evaluate(self) -> dict[str, float]:
        """Figures over all validation images, by the EMA parameters with the live codebook; empty without data."""
        return {} if self.measurement is None else self.measure()[1]

    def measure(self) -> tuple[Evaluator, dict[str, float]]:
        """`evaluate`, and what it gathered."""
        evaluator, figures = self.measurement.run(self.state.inference(), self.frozen)
        return evaluator, {f"eval/{name}": value for name, value in figures.items()}

    def draw(self) -> np.ndarray | None:
        """The first validation images, reconstructed."""
        if self.evaluation is None:
            return None
        batch = self._placed(next(iter(self.evaluation)), "image")
        arrays = jax.device_get(self.pictures(self.state.inference(), self.frozen, batch))
        return self.task.draw(arrays)

    def next_batch(self) -> dict[str, jax.Array]:
        return self._placed(next(self.batches), "image")

    def close(self, orderly: bool = True) -> None:
        """Unless `orderly`, the other processes may be gone, and what would wait for them is left as it is."""
        with contextlib.ExitStack() as closing:  # the last first, and each whatever the others raise
            if orderly or distributed.process_count() == 1:
                closing.callback(self.checkpoints.close)
            if self.batches is not None:
                closing.callback(self.batches.close)
            closing.callback(self.logs.close)
            closing.callback(self.writers.close)

    def _placed(self, batch: dict[str, np.ndarray], *names: str) -> dict[str, jax.Array]:
        return sharding.place_batch({n: batch[n] for n in names}, self.mesh)

    def _tell_config_changes(self, step: int) -> None:
        before = read_meta(find_checkpoint(self.checkpoints.folder, step))["config"]
        now = self.config.model_dump(mode="json")
        if self.evaluating:  # the others play no part
            before, now = ({"model": config["model"]} for config in (before, now))
        for name, old, new in _differences(before, now):
            doing = "evaluating" if self.evaluating else "resuming"
            log.warning("%s with another %s: %r, the checkpoint had %r", doing, name, new, old)


def train(
    config: Config,
    workdir: str | os.PathLike,
    devices: list[jax.Device] | None = None,
    profile_steps: range = range(0),
) -> dict[str, float]:
    """Trains to config.train.steps, from the newest checkpoint if there is one; returns the last evaluation.

    Args:
      profile_steps: steps that are traced for TensorBoard's profile tab.

    Raises:
      Stopped: SIGTERM, Ctrl-C or a preemption notice; the step before it is saved.
    """
    run = Run(config, workdir, devices)
    settings = run.config.train
    start = int(run.state.step)
    if start >= settings.steps:
        log.info("nothing to train: train.steps=%d are done; give more to go on", settings.steps)
    tell_memory(
        {"params": run.state.params, "ema": run.state.ema_params, "optimizer": run.state.opt_state,
         "batch_stats": run.state.batch_stats, "frozen": run.frozen}
    )  # fmt: skip
    progress = Progress(settings.steps, start, run.first)
    window, health = Window(config.data.batch_size, settings.codebook_alarm), Health()
    guard = Guard(run.checkpoints)
    figures: dict[str, float] = {}
    orderly = False
    try:
        watched = watching(run.workdir, run.logs.folder, settings.hang_seconds, profile_steps)
        with StopSignal() as stop, watched as (beats, dog, profile):
            for step in range(start + 1, settings.steps + 1):
                profile.before(step)
                batch = window.fetch(run.next_batch)
                run.state, metrics = run.step(run.state, run.frozen, batch)
                window.add(metrics, run.accumulate)
                guard.add(step, metrics, run.first_bad)
                dog.step()
                beats.beat(step)
                progress.advance(step)
                profile.after(step, metrics)
                last, stopped = step == settings.steps, stop.asked(step)
                evaluated = (step % settings.evaluate_every == 0 and not stopped) or last
                saved = step % settings.checkpoint_every == 0 or last or stopped
                if saved or evaluated or step % settings.log_every == 0:
                    guard.check()
                if step % settings.log_every == 0 or last:
                    values = health.share(window.flush() | {"data/skipped": run.skipped.count})
                    codebook = jax.device_get(run.codebook(run.state, run.frozen))
                    values |= {name: float(value) for name, value in codebook.items()}
                    window.resume()
                    run.writers.scalars(step, values)
                    run.logs.upload(LOG_SECONDS)
                    progress.status(step, status_line(values))
                if evaluated or saved:
                    window.pause()
                if evaluated:
                    figures = _evaluate(run, step)
                if saved:
                    run.save(figures if evaluated else None)
                if stopped:
                    break
            run.checkpoints.wait()
            beats.beat(int(run.state.step), force=True)
            orderly = True
    finally:
        progress.close()
        run.close(orderly)
    step = int(run.state.step)
    if step < settings.steps:
        raise Stopped(step)
    if not figures:  # the run was complete before it began
        figures = _evaluate(run, start, write=False)
    if run.first:
        _report(run, figures)
    return figures


def evaluate(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None, step: int | None = None
) -> dict[str, float]:
    """Figures of a checkpoint of workdir, the newest unless `step` says which, over the validation images; writes what
    `report` describes.

    Raises:
      DamagedError: it cannot be read; no other takes its place.
    """
    path = distributed.run_together(lambda: find_checkpoint(workdir, step))
    if path.parent != storage.resolve_path(workdir) / checkpoint.FOLDER:
        raise CheckpointError(f"--workdir={workdir}: give the workdir of the run, and --step={path.name}")
    step = int(distributed.exchange(path.name)[0])  # another run may be saving meanwhile
    run = Run(config, workdir, devices, evaluate_step=step)
    if run.measurement is None:
        raise ConfigError("data.eval_path is None: there are no validation images to evaluate on")
    try:
        evaluator, figures = run.measure()
        examples = run.measurement.examples(evaluator, run.state.inference(), run.frozen)
        if run.first:
            # Not looked for again: a run that trains beside this one may have deleted it meanwhile.
            told = {"checkpoint": str(run.checkpoints.folder / str(step)), "revision": git_revision()}
            protocol = run.measurement.protocol(evaluator) | told
            report.write(run.workdir, step, figures, evaluator.remarks, protocol, examples)
            log.info(
                "wrote %s and %s", run.workdir / report.EVALUATION_FILE, run.workdir / report.FOLDER / "index.html"
            )
        return {"step": step, **figures}
    finally:
        run.close()


def git_revision() -> str | None:
    """The revision of the source tree, with a + if it has changes; None outside a checkout."""
    where = pathlib.Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=where, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip()


def _without_critics(config: Config) -> Config:
    """Without the terms of the loss, whose networks are then not read."""
    return config.model_copy(update={"loss": LossConfig(), "adversary": AdversaryConfig()})


def _evaluate(run: Run, step: int, write: bool = True) -> dict[str, float]:
    figures = run.evaluate()
    if figures and write:
        run.writers.scalars(step, figures)
        picture = run.draw()
        run.writers.picture(step, "reconstructions", picture)
        if run.first:
            image_files.write_image(run.workdir / PICTURE_FILE, picture)
    return figures


def _report(run: Run, figures: dict[str, float]) -> None:
    rows = []
    if figures:
        rows.append(("validation PSNR", f"{figures['eval/psnr']:.2f} dB over {figures['eval/images']} images"))
    if "eval/codebook_usage" in figures:
        rows.append(("codebook use", f"{figures['eval/codebook_usage']:.1%} of {run.task.codebook_size} codes"))
        rows.append(("perplexity", f"{figures['eval/codebook_perplexity']:.0f}"))
    rows += [
        ("pictures", str(run.workdir / PICTURE_FILE)),
        ("checkpoints", str(run.checkpoints.folder)),
        ("log", str(run.workdir / METRICS_FILE)),
        ("TensorBoard", f"tensorboard --logdir {run.workdir / 'tensorboard'}"),
    ]
    print_table(f"step {int(run.state.step)}", rows)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new
