"""The training loop."""

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from vqrae_jax import checkpoint, distributed, sharding, storage
from vqrae_jax.config import Config
from vqrae_jax.data import images as image_files
from vqrae_jax.errors import CheckpointError, ConfigError
from vqrae_jax.evaluation import report
from vqrae_jax.train import hooks, restore
from vqrae_jax.train.metric_writers import MetricWriters
from vqrae_jax.train.restore import Start
from vqrae_jax.train.run import Run, git_revision, open_run, save_checkpoint
from vqrae_jax.train.sample_evaluation import check_compared, evaluate_samples, sample_metrics
from vqrae_jax.train.task import Batch, TrainState, jit_step, place_horizon

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run stopped early on request, with everything saved. Not an error."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped at step {step}, which is saved")


def train(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None, profile_steps: range = range(0)
) -> dict[str, int | float]:
    """Trains to config.train.steps, from the newest checkpoint if there is one; returns the last evaluation's metrics.

    Raises:
      Stopped: after SIGTERM, Ctrl-C or a preemption notice; the last step is saved.
    """
    with contextlib.ExitStack() as stack:
        run, state = stack.enter_context(open_run(config, workdir, devices))
        settings, start, first = run.config.train, int(state.step), jax.process_index() == 0
        if start >= settings.steps:
            log.info("nothing to train: train.steps=%d are done; raise train.steps to continue", settings.steps)
        log_memory(state, run.frozen)
        if run.evaluator is None:
            log.info("no validation images (data.eval_path): nothing is evaluated")
        writers = MetricWriters(run.workdir, run.config.model_dump(), settings.wandb_project, first)
        stack.callback(writers.close)
        if start:
            writers.mark_resumed(start)
        timer = hooks.StepTimer(run.config.data.batch_size, settings.codebook_alarm)
        clock = hooks.SaveClock(settings.checkpoint_minutes)
        watching = _make_hooks(run, timer, writers, start, profile_steps)
        for hook in watching:
            stack.callback(hook.close)
        stop_requested = stack.enter_context(_stop_requests())

        train_step, horizon = jit_step(run.task, run.mesh), place_horizon(settings.steps, run.mesh)
        batches = timer.timed(
            sharding.place_batch({n: batch[n] for n in run.task.inputs}, run.mesh) for batch in run.batches
        )
        step, metrics = start, {}
        for step, batch in zip(range(start + 1, settings.steps + 1), batches, strict=False):
            for hook in watching:
                hook.before_step(step)
            state, step_metrics = train_step(state, run.frozen, batch, horizon)
            last, stopped = step == settings.steps, stop_requested(step)
            event = hooks.StepEvent(
                step, state, step_metrics,
                log=step % settings.log_every == 0 or last,
                evaluate=(step % settings.evaluate_every == 0 and not stopped) or last,
                save=step % settings.checkpoint_every == 0 or last or stopped,
            )  # fmt: skip
            for hook in watching:
                hook.after_step(event)
            if event.evaluate:
                metrics = _evaluate_and_log(run, state, step, batch, writers)
            if event.save or (event.log and clock.is_due()):
                timer.pause()
                save_checkpoint(run, state, metrics if event.evaluate else {})
                clock.restart()
            if stopped:
                break
        run.checkpoints.wait()
        if start >= settings.steps and run.evaluator:
            metrics = run.evaluator.evaluate(state.inference(), run.frozen).metrics
    if step < settings.steps:
        raise Stopped(step)
    if first:
        _print_summary(step, metrics, run)
    return metrics


def log_memory(state: TrainState, frozen: Any) -> None:
    """Logs the bytes that the parts of the state and the frozen networks take on each device."""
    trees = {name: tree for name, tree in vars(state).items() if name != "step"} | {"frozen": frozen}
    sizes = {name: sharding.device_bytes(tree) for name, tree in trees.items()}
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in sizes.items())
    log.info("memory per device: %s; total %s", parts, decimal(sum(sizes.values())))


def _make_hooks(run: Run, timer: hooks.StepTimer, writers: MetricWriters, start: int, steps: range) -> list[hooks.Hook]:
    settings = run.config.train
    log_metrics = jax.jit(run.task.log_metrics, out_shardings=sharding.replicated(run.mesh))
    heartbeat = hooks.Heartbeat(run.workdir, start)
    steps_log = hooks.StepLog(settings.steps, heartbeat.first_step_seconds)
    return [
        timer,
        hooks.NaNGuard(run.checkpoints),
        hooks.Watchdog(settings.hang_seconds),
        heartbeat,
        steps_log,
        hooks.Logger(
            timer,
            lambda state: log_metrics(state, run.frozen),
            lambda: run.skipped.count,
            writers.scalars,
            steps_log.show,
        ),
        hooks.Profiler(steps, writers.tensorboard),
    ]


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields a function that every process calls after every step: whether to save it and stop, the same in all.

    SIGTERM and Ctrl-C only request a stop, and a second Ctrl-C interrupts as usual. With several processes JAX handles
    SIGTERM: it notifies all of them and agrees on a step that all can reach.
    """
    received = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {}
    if threading.current_thread() is threading.main_thread() and not distributed.is_connected():
        handlers = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(received) or multihost_utils.reached_preemption_sync_point(step)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _evaluate_and_log(
    run: Run, state: TrainState, step: int, batch: Batch, writers: MetricWriters
) -> dict[str, int | float]:
    """Returns metrics of the validation images; logs pictures of them, or of the training batch if there are none."""
    variables, metrics, images, name = state.inference(), {}, batch, f"training_{run.task.pictures}"
    if run.evaluator is not None:
        log.info("evaluating step %d on the validation images", step)
        metrics = run.evaluator.evaluate(variables, run.frozen).metrics
        text = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        log.info("validation of step %d: %s", step, text)
        writers.scalars(step, metrics)
        images, name = run.evaluator.first_images(), run.task.pictures
    image = run.task.sample_images(variables, run.frozen, images)
    if image is not None:
        writers.image(step, name, image)
        if jax.process_index() == 0:
            image_files.write_image(run.workdir / f"{run.task.pictures}.png", image)
    return metrics


def _print_summary(step: int, metrics: dict[str, int | float], run: Run) -> None:
    columns = Column(style="bold", no_wrap=True), Column(overflow="fold")
    table = Table(*columns, title=f"step {step}", show_header=False, title_justify="left")
    for name, title, text in (
        ("psnr", "validation PSNR", "{:.2f} dB"), ("bits_per_code", "validation", "{:.3f} bits per code"),
    ):  # fmt: skip
        if f"eval/{name}" in metrics:
            table.add_row(title, f"{text.format(metrics[f'eval/{name}'])} over {metrics['eval/images']} images")
    if "eval/codebook_usage" in metrics:
        dead = metrics["eval/codebook_dead"]
        table.add_row("codebook usage", f"{metrics['eval/codebook_usage']:.1%} of the codes ({dead:.0f} unused)")
        table.add_row("perplexity", f"{metrics['eval/codebook_perplexity']:.0f}")
    installed = importlib.util.find_spec("tensorboard") is not None  # tensorboardX only writes its files
    of_images = f"{'validation' if run.evaluator else 'training'} images"
    pictures = of_images if run.task.pictures == "reconstructions" else run.task.pictures
    viewer = "tensorboard --logdir {}" if installed else "{} (to view it: pip install tensorboard)"
    for name, path, text in (
        (pictures, run.workdir / f"{run.task.pictures}.png", "{}"),
        ("checkpoints", run.checkpoints.folder, "{}"),
        ("log", run.workdir / report.METRICS_FILE, "{}"),
        ("TensorBoard", run.workdir / "tensorboard", viewer),
    ):
        if storage.is_remote(path) or path.exists():
            table.add_row(name, text.format(path))
    with contextlib.suppress(SystemExit):  # rich raises it if standard output is closed, but the run is complete
        Console().print(table)


def evaluate(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None, step: int | None = None,
    start: bool = False,
) -> dict[str, int | float | None]:  # fmt: skip
    """Evaluates a checkpoint (default: the newest), writes the files of a report, and returns step and metrics.

    With `start` it evaluates the tokenizer that train.start_from names; the workdir only receives the report.
    """
    name, model = distributed.run_together(lambda: _find_model(config, workdir, step, start))
    if config.train.task == "generator":
        return _evaluate_generator(config, workdir, devices, int(distributed.exchange(str(model))[0]))
    # The processes agree on the step, because another run may be saving at the same time.
    step = model.location.provenance.get("step") if start else int(distributed.exchange(str(model))[0])
    with open_run(config, workdir, devices, evaluate_step=model if start else step) as (run, state):
        if run.evaluator is None:
            raise ConfigError("there are no validation images to evaluate on", field="data.eval_path", value=None)
        variables = state.inference()
        result = run.evaluator.evaluate(variables, run.frozen)
        examples = run.evaluator.examples(result, variables, run.frozen)
        if jax.process_index() == 0:
            source = {"checkpoint": name, "revision": git_revision()}
            report.write_report(run.workdir, step, result, run.evaluator.protocol(result) | source, examples)
            files = run.workdir / report.EVALUATION_FILE, run.workdir / report.FOLDER / "index.html"
            log.info("wrote %s and %s", *files)
    return {"step": step, **result.metrics}


def _evaluate_generator(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None, step: int
) -> dict[str, int | float | None]:
    """Evaluates a generator on validation codes, if there are any, and its samples against references."""
    check_compared(config)
    with open_run(config, workdir, devices, evaluate_step=step) as (run, state):
        if run.evaluator is None and not sample_metrics(config):
            message = "there are no validation codes, nor evaluation.metrics of samples ('inception', 'encoder')"
            raise ConfigError(message, field="data.eval_path", value=None)
        result, protocol = None, {}
        if run.evaluator is not None:
            result = run.evaluator.evaluate(state.inference(), run.frozen)
            protocol = run.evaluator.protocol(result)
        protocol |= {"revision": git_revision()}
        metrics = evaluate_samples(run.config, run.workdir, step, run.mesh, result, protocol)
    return {"step": step, **metrics}


def _find_model(config: Config, workdir: str | os.PathLike, step: int | None, start: bool) -> tuple[str, int | Start]:
    """Returns the name of the model to evaluate, and its step in the workdir or otherwise the start."""
    folder = storage.resolve_path(workdir) / checkpoint.FOLDER
    if start:
        model = restore.find_start(config)
        if checkpoint.completed_steps(folder) and model.location.path.parent != folder:
            message = "is the workdir of another model, whose evaluation would be replaced; choose another folder"
            raise CheckpointError(message, field="--workdir", value=str(workdir))
        return config.train.start_from, model
    path = checkpoint.find_checkpoint(workdir, step, "--workdir")
    if path.parent != folder:
        message = f"expected the workdir of a run; choose this checkpoint with --step={path.name}"
        raise CheckpointError(message, field="--workdir", value=str(workdir))
    return str(path), int(path.name)
