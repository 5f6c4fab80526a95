"""The training loop."""

import contextlib
import functools
import logging
import os

import jax

from vqrae_jax import checkpoint, distributed, sharding, storage
from vqrae_jax.config import Config
from vqrae_jax.data import images as image_files
from vqrae_jax.errors import CheckpointError, ConfigError
from vqrae_jax.evaluation import report
from vqrae_jax.train import hooks
from vqrae_jax.train.metric_writers import MetricWriters
from vqrae_jax.train.run import Run, git_revision, open_run, save_checkpoint
from vqrae_jax.train.state import TrainState
from vqrae_jax.train.stop import Stopped, StopSignal
from vqrae_jax.train.summary import IMAGE_FILE, log_memory, print_summary
from vqrae_jax.train.task import jit_step, place_horizon

log = logging.getLogger(__name__)


def train(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None, profile_steps: range = range(0)
) -> dict[str, float]:
    """Trains to config.train.steps, from the newest checkpoint if there is one.

    Args:
      profile_steps: steps that are traced for TensorBoard's profile tab.

    Returns:
      The metrics of the last evaluation; empty without validation images.

    Raises:
      Stopped: after SIGTERM, Ctrl-C or a preemption notice; the last step is saved.
    """
    with contextlib.ExitStack() as stack:
        run, state = stack.enter_context(open_run(config, workdir, devices))
        settings, start, first = run.config.train, int(state.step), jax.process_index() == 0
        if start >= settings.steps:
            log.info("nothing to train: train.steps=%d are done; raise train.steps to continue", settings.steps)
        log_memory(state, run.frozen)
        writers = MetricWriters(run.workdir, run.config.model_dump(), settings.wandb_project, first)
        stack.callback(writers.close)
        if start:
            writers.mark_resumed(start)
        timer = hooks.StepTimer(run.config.data.batch_size, settings.codebook_alarm)
        watching = stack.enter_context(contextlib.closing(_build_hooks(run, timer, writers, start, profile_steps)))
        stop = stack.enter_context(StopSignal())

        train_step, horizon = jit_step(run.task, run.mesh), place_horizon(settings.steps, run.mesh)
        batches = timer.timed(sharding.place_batch({"image": batch["image"]}, run.mesh) for batch in run.batches)
        step, metrics = start, {}
        for step, batch in zip(range(start + 1, settings.steps + 1), batches, strict=False):
            watching.before_step(step)
            state, step_metrics = train_step(state, run.frozen, batch, horizon)
            last, stopped = step == settings.steps, stop.requested(step)
            event = hooks.StepEvent(
                step, state, step_metrics,
                log=step % settings.log_every == 0 or last,
                evaluate=(step % settings.evaluate_every == 0 and not stopped) or last,
                save=step % settings.checkpoint_every == 0 or last or stopped,
            )  # fmt: skip
            watching.after_step(event)
            if event.evaluate:
                metrics = _evaluate_and_log(run, state, step, writers)
            if event.save:
                save_checkpoint(run, state, metrics if event.evaluate else {})
            if stopped:
                break
        run.checkpoints.wait()
        if start >= settings.steps and run.evaluator:
            metrics = run.evaluator.evaluate(state.inference(), run.frozen).metrics
    if step < settings.steps:
        raise Stopped(step)
    if first:
        print_summary(step, metrics, run.workdir, run.checkpoints.folder)
    return metrics


def _build_hooks(run: Run, timer: hooks.StepTimer, writers: MetricWriters, start: int, profile: range) -> hooks.Hooks:
    settings = run.config.train
    state_metrics = jax.jit(run.task.log_metrics, out_shardings=sharding.replicated(run.mesh))
    state_metrics = functools.partial(state_metrics, frozen=run.frozen)
    bar = hooks.ProgressBar(settings.steps, start, jax.process_index() == 0)
    return hooks.Hooks(
        timer,
        hooks.NaNGuard(run.checkpoints),
        hooks.Watchdog(settings.hang_seconds),
        hooks.Heartbeat(run.workdir, start),
        bar,
        hooks.Logger(timer, state_metrics, lambda: run.skipped.count, writers.scalars, bar.show),
        hooks.Profiler(profile, writers.tensorboard),
    )


def _evaluate_and_log(run: Run, state: TrainState, step: int, writers: MetricWriters) -> dict[str, float]:
    if run.evaluator is None:
        return {}
    variables = state.inference()
    metrics = run.evaluator.evaluate(variables, run.frozen).metrics
    writers.scalars(step, metrics)
    image = run.task.sample_images(variables, run.frozen, run.evaluator.first_images())
    writers.image(step, "reconstructions", image)
    if jax.process_index() == 0:
        image_files.write_image(run.workdir / IMAGE_FILE, image)
    return metrics


def evaluate(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None, step: int | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint (default: the newest) on the validation images, and writes the files of a report.

    Returns:
      Its step and metrics.

    Raises:
      DamagedError: the checkpoint cannot be read; no other replaces it.
    """
    path = distributed.run_together(lambda: checkpoint.find_checkpoint(workdir, step))
    if path.parent != storage.resolve_path(workdir) / checkpoint.FOLDER:
        message = f"expected the workdir of a run; choose this checkpoint with --step={path.name}"
        raise CheckpointError(message, field="--workdir", value=str(workdir))
    step = int(distributed.exchange(path.name)[0])  # another run may be saving at the same time
    with open_run(config, workdir, devices, evaluate_step=step) as (run, state):
        if run.evaluator is None:
            raise ConfigError("there are no validation images to evaluate on", field="data.eval_path", value=None)
        variables = state.inference()
        result = run.evaluator.evaluate(variables, run.frozen)
        examples = run.evaluator.examples(result, variables, run.frozen)
        if jax.process_index() == 0:
            source = {"checkpoint": str(path), "revision": git_revision()}
            report.write_report(run.workdir, step, result, run.evaluator.protocol(result) | source, examples)
            page = run.workdir / report.FOLDER / "index.html"
            log.info("wrote %s and %s", run.workdir / report.EVALUATION_FILE, page)
    return {"step": step, **result.metrics}
