"""Opens a run: checks everything that can be wrong before long work starts, and reads the state to start from."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vqrae_jax import __version__, checkpoint, distributed, sharding, storage
from vqrae_jax.build import weights
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.config import AdversaryConfig, Config, LossConfig, epochs_to_steps, from_saved
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError, UserError
from vqrae_jax.evaluation.code_evaluator import CodeEvaluator
from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.train import restore
from vqrae_jax.train.generator import FrozenTokenizer, GeneratorTask, complete_config
from vqrae_jax.train.lock import lock_workdir
from vqrae_jax.train.metric_writers import check_wandb
from vqrae_jax.train.restore import Start
from vqrae_jax.train.task import Task, TrainState
from vqrae_jax.train.tokenizer import TokenizerTask

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of an open run that do not change from step to step."""

    config: Config  # without epochs
    workdir: storage.Path
    mesh: Mesh
    task: Task
    frozen: Any
    checkpoints: Checkpoints
    batches: pipeline.TrainBatches | None  # None: evaluation only
    skipped: pipeline.Skipped
    evaluator: Evaluator | CodeEvaluator | None  # None: no validation images


@contextlib.contextmanager
def open_run(
    config: Config, workdir: str | os.PathLike, devices: list[jax.Device] | None = None,
    evaluate_step: int | Start | None = None,
) -> Iterator[tuple[Run, TrainState]]:  # fmt: skip
    """Opens a run and its state: the newest checkpoint of the workdir, or a new state.

    With `evaluate_step` it opens that checkpoint, or the tokenizer that train.start_from names, and nothing that only
    training needs: another run may save there.
    """
    workdir, skipped = storage.resolve_path(workdir), pipeline.Skipped()
    with contextlib.ExitStack() as closing:
        prepare = functools.partial(_prepare, config, workdir, devices, evaluate_step, skipped, closing)
        config, mesh, task, batches, evaluator = distributed.run_together(prepare)
        checkpoint.check_shared(workdir)
        if distributed.process_count() > 1:
            listings = evaluator.listings() if evaluator else {}
            listings |= {"data.path": batches.listing()} if batches else {}
            distributed.check_equal(listings, "give all of them the same images, as each reads its share of all")
        train, evaluating = config.train, evaluate_step is not None
        checkpoints = Checkpoints(workdir, train.keep_last, train.keep_best, train.keep_every, read_only=evaluating)

        @closing.push
        def close_checkpoints(error_type: type | None, *_: Any) -> None:
            if error_type is None or distributed.process_count() == 1:  # otherwise it may wait for ended processes
                checkpoints.close()

        if batches is not None:
            closing.callback(batches.close)
        if evaluator:
            evaluator.prepare()
        shapes, frozen = task.shapes(), task.frozen()
        if config.mesh.fsdp and (whole := sharding.left_whole(shapes, mesh, config.mesh.fsdp_min_size)):
            log.warning(
                "mesh.fsdp cannot split %d arrays (%.2f GiB per device), because mesh.data=%d divides none of their "
                "dimensions (%s); choose a mesh.data that does, for example with a larger mesh.model",
                len(whole), sum(whole.values()) / 2**30, mesh.shape["data"], max(whole, key=whole.get),
            )  # fmt: skip
        resumed = None if isinstance(evaluate_step, Start) else restore.resume(checkpoints, shapes, evaluate_step)
        if resumed is None:
            log.info("initializing the state")
            state = TrainState.of_model(task.initial_variables()) if evaluating else task.init()
        else:
            state = resumed[0]
            step = int(state.step)
            _warn_config_changes(config, checkpoints.folder / str(step), evaluating)
            if batches is not None:
                batches.set_state(resumed[1])
            log.info("%s step %d of %s", "evaluating" if evaluating else "resumed from", step, checkpoints.folder)
        yield Run(config, workdir, mesh, task, frozen, checkpoints, batches, skipped, evaluator), state


def _prepare(
    config: Config, workdir: storage.Path, devices: Any, evaluate_step: int | Start | None,
    skipped: pipeline.Skipped, closing: contextlib.ExitStack,
) -> tuple[Config, Mesh, Task, pipeline.TrainBatches | None, Evaluator | CodeEvaluator | None]:  # fmt: skip
    """Builds what each process builds by itself; no collective operation, which would wait for a failed process.

    A run locks its workdir before it reads weights, and `closing` unlocks it at the end.
    """
    training = evaluate_step is None
    if training:
        config = epochs_to_steps(config, lambda: len(pipeline.training_source(config.data)))
        check_wandb(config.train.wandb_project)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices, config.mesh.slices)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    sharding.check_batch(config.data.eval_batch_size, 1, mesh, "data.eval_batch_size")
    share, shares = sharding.data_share(mesh)
    split = {"process_index": share, "process_count": shares}
    validation = pipeline.evaluation_batches(config.data, limit=config.evaluation.images, **split)
    batches = None
    if training:
        batches = pipeline.train_batches(config.data, seed=config.train.seed, skipped=skipped, **split)
    checkpoint.check_writable(workdir)
    if training and distributed.process_index() == 0:
        closing.enter_context(lock_workdir(workdir))
    if config.train.task == "generator":
        sources = [read.source for read in (batches, validation) if read is not None]
        source, folder = next(iter(sources), None), workdir / checkpoint.FOLDER
        unset = config.generator.classes is None
        config, task = _build_generator(config, mesh, folder, evaluate_step, source)
        for other in sources[1:]:
            _check_validation_classes(config, other, unset)
        evaluator = CodeEvaluator(config, task, mesh, validation) if validation is not None else None
        return config, mesh, task, batches, evaluator
    start = evaluate_step
    if not isinstance(start, Start):  # it is found before weights are downloaded
        start = restore.find_start(config, workdir / checkpoint.FOLDER, evaluate_step)
    # The networks of the loss are not read for evaluation.
    update = {} if training else {"loss": LossConfig(), "adversary": AdversaryConfig()}
    metrics = config.evaluation.training_metrics if training else config.evaluation.metrics
    log.info("reading the weights and building the networks")
    weights.fetch_all(weights.list_weights(config, metrics if validation is not None else (), losses=training))
    task = TokenizerTask.build(config.model_copy(update=update), mesh, start=start)
    evaluator = Evaluator(config, task, mesh, validation, metrics) if validation is not None else None
    return config, mesh, task, batches, evaluator


def _check_validation_classes(config: Config, source: Any, unset: bool) -> None:
    """Raises DataError if the labels of validation do not fit; `unset` is whether the user left the classes out."""
    codes, classes = config.data.source == "codes", config.generator.classes
    if codes and classes:
        source.check_labels(classes)
    elif unset and not classes and (source.num_classes if codes else source.classes):
        message = "has no classes, but data.eval_path has; use class folders or labels, or set generator.classes=0"
        raise DataError(message, field="data.path", value=config.data.path)


def _build_generator(
    config: Config, mesh: Mesh, folder: storage.Path, step: int | None, source: Any
) -> tuple[Config, GeneratorTask]:
    """Reads the tokenizer, and builds the generator for its codes; a checkpoint in `folder` decides their shape."""
    steps = checkpoint.completed_steps(folder) if step is None else [step]
    saved = checkpoint.read_meta(folder / str(steps[-1])) if steps else {"config": {}}
    name, tokenizer = config.generator.tokenizer, None
    if name is not None:
        log.info("reading the tokenizer %s", name)
        encoding = source.plan.encoding if source is not None and config.data.source == "codes" else "float32"
        try:
            tokenizer = FrozenTokenizer.load(name, encoding)
            made_by = saved["config"].get("generator", {}).get("tokenizer_hash")
            if made_by and encoding == "float32" and made_by != tokenizer.hash:  # of codes encoded in bfloat16
                tokenizer = FrozenTokenizer.load(name, "bfloat16")
        except UserError as error:
            raise error.renamed({"checkpoint": "generator.tokenizer"}) from error.__cause__
    config = complete_config(config, saved["config"].get("generator", {}), tokenizer, source)
    classes = saved.get("classes") or getattr(source, "classes", None)
    return config, GeneratorTask.build(config, mesh, tokenizer, classes and tuple(classes))


def save_checkpoint(run: Run, state: TrainState, metrics: dict[str, int | float]) -> None:
    """Starts to save the state and the position of the input; `metrics` of the validation images choose the best."""
    step, config = int(state.step), run.config.model_dump(mode="json")
    meta = {"config": config, "version": __version__, "revision": git_revision(), "step": step}
    meta["classes"] = run.batches.classes  # names of the labels
    log.info("saving step %d", step)
    score = run.task.score(metrics)
    scores = None if score is None else {"score": score}
    run.checkpoints.save(step, state.inference(), state.rest(), run.batches.get_state(), meta, scores)


def git_revision() -> str | None:
    """Returns the revision of the source tree, with a + if it has changes; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    options = {"cwd": pathlib.Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True, "timeout": 10}
    try:
        return subprocess.check_output(command, **options).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _warn_config_changes(config: Config, path: storage.Path, evaluating: bool) -> None:
    configs = [c.model_dump(mode="json") for c in (from_saved(Config, checkpoint.read_meta(path)["config"]), config)]
    if evaluating:  # the other sections have no effect
        configs = [values["generator" if config.train.task == "generator" else "model"] for values in configs]
    saved, current = (flatten_dict(values, keep_empty_nodes=True, sep=".") for values in configs)
    for name in sorted(saved.keys() | current.keys()):
        if (old := saved.get(name)) != (new := current.get(name)):
            doing = "evaluating" if evaluating else "resuming"
            log.warning("%s with %s=%r; the checkpoint has %r", doing, name, new, old)
