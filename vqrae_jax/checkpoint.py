"""Saving and restoring, the only user of Orbax.

A checkpoint is workdir/checkpoints/<step>, here or in a bucket, with four items: `model` (what inference needs: EMA
parameters and the live batch_stats), `train` (the rest of the train state), `data` (where the input stands) and `meta`
(config, version, revision). Writing is asynchronous and atomic: a step's folder has its name only once it is complete,
in a bucket its mark of being so. Every process of a run saves its part of the arrays; each reads what it needs by
itself, so that one that cannot is not waited for.
"""

import functools
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vqrae_jax import __version__, distributed, storage
from vqrae_jax.errors import CheckpointError, DamagedError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
COMPLETE = "commit_success.txt"  # Orbax's mark in buckets, where nothing can be renamed at once
SHOWN = 8  # names listed of each kind in an error


class Checkpoints:
    """The checkpoints of one run.

    Keeps the last `keep_last`, the `keep_best` with the highest "psnr" among those saved with metrics, and those whose
    step is a multiple of `keep_every` (0: none). With `reading`, another run may be saving there: nothing is changed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep_last: int = 3,
        keep_best: int = 1,
        keep_every: int = 0,
        reading: bool = False,
    ):
        self.reading = reading
        self.folder = storage.at(workdir) / FOLDER if reading else check_writable(workdir)
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["psnr"], n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            create=not reading,
            cleanup_tmp_directories=not reading,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def steps(self) -> list[int]:
        """Of complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, model: Any, train: Any, data: dict[str, Any], meta: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Starts writing step; returns once the arrays are copied, so that the next train step may donate them."""
        if step in self._manager.all_steps():
            return
        _hush_stragglers()
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            train=ocp.args.StandardSave(train),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        self._guarded(lambda: self._manager.save(step, args=items, metrics=metrics), f"saving step {step}")

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self._guarded(self._manager.wait_until_finished, "finishing a save")

    def set_aside(self, step: int) -> None:
        """Renames the folder of `step`, so that the step can be saved again; every process calls it."""
        if jax.process_index() == 0:
            path = self.folder / str(step)
            path.rename(aside := path.with_name(f"{step}.damaged-{uuid.uuid4().hex[:8]}"))  # a bucket copies
            log.warning("%s is now called %s", path, aside.name)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def close(self) -> None:
        self._guarded(self._manager.close, "finishing a save")

    def _guarded(self, action: Any, doing: str) -> None:
        try:
            action()
        except Exception as error:
            last = max(completed_steps(self.folder), default=None)
            kept = (
                "no checkpoint is complete"
                if last is None
                else f"the last complete checkpoint is {self.folder / str(last)}"
            )
            raise CheckpointError(f"{doing} in {self.folder} failed ({_reason(error)}); {kept}") from error


def completed_steps(folder: storage.Path) -> list[int]:
    """Steps whose folder is complete."""
    if not folder.is_dir():
        return []
    mark = COMPLETE if storage.is_remote(folder) else "_CHECKPOINT_METADATA"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / mark).is_file())


def find_checkpoint(path: str | os.PathLike, step: int | None = None) -> storage.Path:
    """The folder of one checkpoint: `path` is a workdir (or its checkpoints folder, or one step of it).

    Raises:
      CheckpointError: nothing complete is there.
      StorageError: the bucket may not be read.
    """
    path = storage.at(path)
    with storage.told(path, "read"):
        there = path.is_dir()
    if not there:
        raise CheckpointError(f"{path} is not a folder; give the workdir of a run, or one step of its {FOLDER} folder")
    if (path / "model").is_dir() and (path / "meta").is_dir():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = completed_steps(folder)
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no complete checkpoint of step {step}; it has {steps or 'none'}")
    if not steps:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:SHOWN]) or "nothing"
        raise CheckpointError(f"{folder} has no complete checkpoint (it holds {there}); a run saves one at its end")
    return folder / str(steps[-1] if step is None else step)


def read_meta(path: storage.Path) -> dict[str, Any]:
    """Config, version and revision of the checkpoint at `path`.

    Raises:
      DamagedError: not to be read.
      CheckpointError: written by a newer version of this package.
    """
    meta = _read_json(path / "meta", "config")
    if _numbers(meta["version"]) > _numbers(__version__):
        raise CheckpointError(
            f"{path} was written by vqrae_jax {meta['version']}, newer than this {__version__}: update the package"
        )
    return meta


def saved_shapes(path: storage.Path, item: str = "model") -> Any:
    """The `model` or `train` item of the checkpoint at `path`, as a tree of jax.ShapeDtypeStruct."""
    _hush_stragglers()
    try:
        tree = ocp.StandardCheckpointHandler().metadata(path / item).tree
    except Exception as error:
        raise DamagedError(f"{path} cannot be read ({item}: {_reason(error)}); the checkpoint is damaged") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read_model(path: storage.Path, target: Any, partial: bool = False) -> Any:
    """The `model` item onto the shapes and shardings of `target`; partial: of what is saved, the leaves in `target`."""
    if not partial:
        check_shapes(saved_shapes(path), target, path)
        return _read(path, "model", target)
    return _guarded_read(
        path,
        lambda: ocp.PyTreeCheckpointHandler().restore(
            path / "model",
            args=ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
            ),
        ),
    )


def read_checkpoint(path: storage.Path, model: Any, train: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a checkpoint onto the shapes and shardings of `model` and `train`, whatever mesh it was saved on.

    Returns model, train, data; with None for `train` that is not read.

    Raises:
      DamagedError: not to be read.
      CheckpointError: of another architecture, of other things that train, or written by a newer version of this
        package.
    """
    read_meta(path)
    # Before anything is read: to Orbax a tree of another form is an error like a file that is cut.
    start = f"--config.train.start_from={path.parent.parent}"
    remedy = f"use the config it was trained with, or another workdir with {start}, which takes the model"
    rest = None
    check_shapes(saved_shapes(path), model, path, remedy=f"{remedy}, or with train.start_parts what fits of it")
    if train is not None:
        what = "has this model, but other optimizers, terms or trained parts"
        check_shapes(saved_shapes(path, "train"), train, path, what, f"{remedy} and nothing else")
        rest = _read(path, "train", train)
    return _read(path, "model", model), rest, _read_json(path / "data", "data state")


def check_shapes(
    saved: Any,
    target: Any,
    path: storage.Path,
    what: str = "is of another architecture",
    remedy: str = "use the config it was trained with, or another workdir",
) -> None:
    """Raises CheckpointError if the two trees differ, naming the leaves."""
    have, want = ({jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in
                   jax.tree_util.tree_leaves_with_path(tree)} for tree in (saved, target))  # fmt: skip
    differing = [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]
    kinds = {
        "missing": [n for n in want if n not in have],
        "unexpected": [n for n in have if n not in want],
        "of another size": differing,
    }
    if not any(kinds.values()):
        return
    lines = [f"{path} {what} than this config:"]
    for kind, names in kinds.items():
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {kind} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
    raise CheckpointError("\n".join([*lines, remedy]))


def check_writable(workdir: str | os.PathLike) -> storage.Path:
    """The folder of checkpoints in `workdir`, made and tried.

    Raises:
      CheckpointError: no rights, no space, a file in its place.
      StorageError: no rights to the bucket.
    """
    folder = storage.at(workdir) / FOLDER
    probe = folder / ".writable"  # of the same name in every process, so that all say the same of it
    try:
        with storage.told(folder, "written"):
            if not storage.is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"may be deleted")
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--workdir: {folder} cannot be written ({error.strerror}); choose a folder that can"
        ) from error
    return folder


def check_shared(workdir: str | os.PathLike) -> None:
    """Every process of a run sees what process 0 writes in `workdir`; all of them call it.

    Raises:
      CheckpointError: one does not.
    """
    if distributed.process_count() == 1:
        return
    probe = storage.at(workdir) / FOLDER / f".shared-{distributed.exchange(uuid.uuid4().hex)[0]}"
    if distributed.process_index() == 0:
        storage.write(probe, b"may be deleted")
    distributed.exchange("written")

    def look() -> None:
        if not probe.exists():
            raise CheckpointError(
                f"--workdir: {probe.parent} of process 0 is another folder here: give one that all processes share"
            )

    distributed.run_together(look)
    if distributed.process_index() == 0:
        probe.unlink()


def _read(path: storage.Path, item: str, target: Any) -> Any:
    args = ocp.args.StandardRestore(target)
    return _guarded_read(path, lambda: ocp.StandardCheckpointHandler().restore(path / item, args=args))


def _guarded_read(path: storage.Path, action: Callable[[], Any]) -> Any:
    _hush_stragglers()
    try:
        return action()
    except Exception as error:
        raise DamagedError(f"{path} cannot be read ({_reason(error)}); the checkpoint is damaged") from error


def _read_json(path: storage.Path, what: str) -> dict[str, Any]:
    try:
        return ocp.JsonCheckpointHandler().restore(path)
    except Exception as error:
        raise DamagedError(
            f"{path.parent} has no readable {what} ({_reason(error)}); the checkpoint is not complete"
        ) from error


@functools.cache
def _hush_stragglers() -> None:
    """Once a read or a save has failed, threads of its other arrays report to an event loop that is closed: pages."""
    others = sys.unraisablehook

    def hook(seen: Any) -> None:
        if not (isinstance(seen.exc_value, RuntimeError) and str(seen.exc_value) == "Event loop is closed"):
            others(seen)

    sys.unraisablehook = hook


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _reason(error: BaseException) -> str:
    if "No space left" in str(error):
        return "no space left: make room or lower train.keep_last, and the same command goes on"
    first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first.strip()[:300]}"
