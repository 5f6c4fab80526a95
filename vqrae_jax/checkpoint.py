"""Saving and restoring checkpoints, the only user of Orbax.

A checkpoint is workdir/checkpoints/<step>, local or in a bucket, with four items: `model` (what inference needs: EMA
parameters and the live batch_stats), `train` (the rest of the train state), `data` (position of the input) and `meta`
(config, version, revision). Writing is asynchronous and atomic: the folder of a step gets its name, or in a bucket its
completion mark, only once it is complete. Every process of a run saves its part of the arrays; each reads what it needs
by itself, so that no process waits for one that fails.

Every item has the SHA-256 of its files, which are compared before they are used: neither Orbax nor TensorStore notices
a changed bit in an array.
"""

import functools
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vqrae_jax import __version__, distributed, runtime, storage
from vqrae_jax.errors import CheckpointError, DamagedError, first_line

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
COMPLETE = "commit_success.txt"  # Orbax's completion mark in buckets, where a folder cannot be renamed atomically
DIGESTS = "digests.json"  # in each item: the SHA-256 of its other files, by name
MAX_NAMES = 8  # names listed of each kind in an error


class _Hashed:
    """Adds digests to what an Orbax handler saves.

    Each process hashes the arrays that it has written, in the background; process 0 hashes the rest, which Orbax writes
    last, before the checkpoint gets its name.
    """

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[ocp.future.Future]:
        futures = await super().async_save(directory, *args, **kwargs)
        return [ocp.future.ChainedFuture(futures or [], functools.partial(_hash_own_files, directory))]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        digests = {}
        for part in sorted(directory.glob("digests.*.json")):
            digests |= json.loads(part.read_text())
            part.unlink()
        digests |= _hash_files(directory, storage.file_versions(directory).keys() - digests.keys())
        (directory / DIGESTS).write_text(json.dumps(digests))


class _HashedArrays(_Hashed, ocp.StandardCheckpointHandler):
    typestr = ocp.StandardCheckpointHandler.typestr  # for other programs, which read checkpoints by these names


class _HashedJson(_Hashed, ocp.JsonCheckpointHandler):
    typestr = ocp.JsonCheckpointHandler.typestr


class Checkpoints:
    """The checkpoints of one run.

    Args:
      keep_last: number of newest checkpoints that are kept.
      keep_best: number of checkpoints with the highest "score" that are kept, of those saved with one.
      keep_every: checkpoints whose step is a multiple of it are kept; 0: none.
      read_only: another run may be saving there, so nothing is changed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep_last: int = 3,
        keep_best: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.read_only = read_only
        self.folder = storage.resolve_path(workdir) / FOLDER if read_only else check_writable(workdir)

        def score(metrics: dict[str, float]) -> float:
            return metrics["score"] if "score" in metrics else metrics["psnr"]  # of earlier versions

        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            best = {"get_metric_fn": score, "n": keep_best, "keep_checkpoints_without_metrics": False}
            policies.append(ocp.checkpoint_managers.BestN(**best))
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=score,  # otherwise Orbax does not save the metrics, and a resumed run would not know the best
            lightweight_initialize=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("model", "train"):
            handlers.add(item, ocp.args.StandardSave, _HashedArrays())
        for item, name in (("data", None), ("meta", None), ("metrics", "metrics")):
            handlers.add(item, ocp.args.JsonSave, _HashedJson(name))
        for step in () if read_only else completed_steps(self.folder):
            _check_metrics(self.folder / str(step))
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, model: Any, train: Any, data: dict[str, Any], meta: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Starts to write a step; returns once the arrays are copied, so that the next train step may donate them."""
        if step in self._manager.all_steps():
            return
        runtime.silence_closed_event_loops()
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            train=ocp.args.StandardSave(train),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta | {"digests": "sha256"}),
        )
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics), f"saving step {step}")

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self._guard(self._manager.wait_until_finished, "finishing a save")

    def set_aside(self, step: int) -> None:
        """Renames the folder of `step`, so that the step can be saved again; every process calls it."""
        if jax.process_index() == 0:
            path = self.folder / str(step)
            path.rename(aside := path.with_name(f"{step}.damaged-{uuid.uuid4().hex[:8]}"))  # a copy in buckets
            log.warning("%s was renamed to %s", path, aside.name)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def close(self) -> None:
        """Finishes pending writes."""
        self._guard(self._manager.close, "finishing a save")

    def _guard(self, action: Callable[[], Any], what: str) -> None:
        try:
            action()
        except Exception as error:
            last = max(completed_steps(self.folder), default=None)
            state = "no checkpoint is complete"
            if last is not None:
                state = f"the last complete checkpoint is {self.folder / str(last)}"
            raise CheckpointError(f"{what} in {self.folder} failed ({_reason(error)}); {state}") from error


def completed_steps(folder: storage.Path) -> list[int]:
    """Returns the steps whose folder is complete, ascending."""
    mark = COMPLETE if storage.is_remote(folder) else "_CHECKPOINT_METADATA"
    with storage.convert_errors(folder, "read"):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit() and (folder / name / mark).is_file())


def find_checkpoint(path: str | os.PathLike, step: int | None = None, field: str = "checkpoint") -> storage.Path:
    """Returns the folder of one checkpoint.

    Args:
      path: workdir of a run, its checkpoints folder, or one step of it.
      step: None: the newest.
      field: what names the path, for messages.

    Raises:
      CheckpointError: there is no complete checkpoint.
      StorageError: the bucket cannot be read.
    """
    path = storage.resolve_path(path)
    with storage.convert_errors(path, "read"):
        is_folder, exists = path.is_dir(), path.exists()
    accepted = f"expected the workdir of a run, one step of its {FOLDER} folder, or a saved folder"
    if not is_folder:
        problem = "is a file; `vqrae import-pytorch` converts those of PyTorch" if exists else "does not exist"
        raise CheckpointError(f"{problem}; {accepted}", field=field, value=str(path))
    if (path / "model").is_dir() and (path / "meta").is_dir():
        if step is not None and path.name != str(step):
            raise CheckpointError(f"is one checkpoint, not step {step}; pass its run", field=field, value=str(path))
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = completed_steps(folder)
    if step is not None and step not in steps:
        problem = f"has no complete checkpoint of step {step}; complete steps: {steps or 'none'}"
        raise CheckpointError(problem, field=field, value=str(path))
    if not steps:
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:MAX_NAMES]) or "nothing"
        problem = f"has no complete checkpoint, which a run saves at its end (it holds {content})"
        raise CheckpointError(f"{problem}; {accepted}", field=field, value=str(path))
    return folder / str(steps[-1] if step is None else step)


def verify(path: storage.Path, *items: str, share: int = 0, shares: int = 1) -> None:
    """Compares the files of items of the checkpoint at `path` with the digests that were saved with them.

    Files are hashed once for each size and time of change. With `shares`, only one share of them is hashed.

    Raises:
      DamagedError: a file is missing, unexpected or changed. Checkpoints of versions without digests pass.
    """
    for item in items:
        versions = _guarded_read(path, lambda item=item: storage.file_versions(path / item))
        _verify_versions(path, item, tuple(sorted(versions.items())), share, shares)


def read_meta(path: storage.Path) -> dict[str, Any]:
    """Returns config, version and revision of the checkpoint at `path`.

    Raises:
      DamagedError: the item cannot be read or has changed.
      CheckpointError: a newer version of this package wrote it.
    """
    verify(path, "meta")
    meta = _read_json(path / "meta", "config")
    if _version_numbers(meta["version"]) > _version_numbers(__version__):
        raise CheckpointError(
            f"{path} was written by vqrae_jax {meta['version']}, newer than this {__version__}: update the package"
        )
    return meta


def saved_shapes(path: storage.Path, item: str = "model") -> Any:
    """Verifies the `model` or `train` item of the checkpoint at `path`; returns a tree of jax.ShapeDtypeStruct."""
    verify(path, item)
    return _read_shapes(path, item)


def _read_shapes(path: storage.Path, item: str) -> Any:
    tree = _guarded_read(path, lambda: ocp.StandardCheckpointHandler().metadata(path / item).tree)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read_model(path: storage.Path, target: Any, partial: bool = False) -> Any:
    """Reads the `model` item onto the shapes and shardings of `target`; `partial` allows it more leaves than these."""
    saved = saved_shapes(path)
    if not partial:
        check_shapes(saved, target, path)
        return _read_item(path, "model", target)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    return _guarded_read(path, lambda: ocp.PyTreeCheckpointHandler().restore(path / "model", args=args))


def read_checkpoint(path: storage.Path, model: Any, train: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Reads a checkpoint onto the shapes and shardings of `model` and `train`, whatever mesh it was saved on.

    Its items `model`, `train` and `data` must have been verified: several processes share that work.

    Returns:
      model, train and data state; None for train where `train` is None.

    Raises:
      DamagedError: an item cannot be read.
      CheckpointError: the architecture or the trained parts differ, or a newer version of this package wrote it.
    """
    read_meta(path)
    saved = _read_shapes(path, "model")
    ours, theirs = ("generator" if "generator" in tree.get("params", {}) else "tokenizer" for tree in (model, saved))
    if ours != theirs:
        raise CheckpointError(f"{path} is of a {theirs}, but this config trains a {ours}; use another workdir")
    # Compared before anything is read: Orbax reports another tree structure like a truncated file.
    remedy, rest = "use the config it was trained with, or another workdir", None
    parts = only = ""
    if ours == "tokenizer":  # a generator starts from nothing
        remedy += f" with --config.train.start_from={path.parent.parent}, which loads the model"
        parts, only = ", or with train.start_parts the parts that fit", " and nothing else"
    check_shapes(saved, model, path, remedy=remedy + parts)
    if train is not None:
        difference = "has this model, but other optimizers, loss terms or trained parts"
        check_shapes(_read_shapes(path, "train"), train, path, difference, remedy + only)
        rest = _read_item(path, "train", train)
    return _read_item(path, "model", model), rest, _read_json(path / "data", "data state")


def check_shapes(
    saved: Any,
    target: Any,
    path: storage.Path,
    difference: str = "is of another architecture",
    remedy: str = "use the config it was trained with, or another workdir",
) -> None:
    """Raises CheckpointError with the names of the leaves in which the two trees differ."""
    have, want = ({jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in
                   jax.tree_util.tree_leaves_with_path(tree)} for tree in (saved, target))  # fmt: skip
    kinds = {
        "missing": [n for n in want if n not in have],
        "unexpected": [n for n in have if n not in want],
        "of another size": [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]],
    }
    if not any(kinds.values()):
        return
    lines = [f"{path} {difference} than this config:"]
    for kind, names in kinds.items():
        if names:
            more = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"  {kind} ({len(names)}): {', '.join(names[:MAX_NAMES])}{more}")
    raise CheckpointError("\n".join([*lines, remedy]))


def check_writable(workdir: str | os.PathLike) -> storage.Path:
    """Creates the folder of checkpoints in `workdir`, writes a file to both, and returns the folder.

    Raises:
      CheckpointError: no permission, no space, or a file of that name.
      StorageError: no permission for the bucket.
    """
    folder = storage.resolve_path(workdir) / FOLDER
    try:
        with storage.convert_errors(folder, "written"):
            if not storage.is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for probe in (folder.parent / ".writable", folder / ".writable"):  # the same error in every process
                probe.write_bytes(b"may be deleted")
                probe.unlink(missing_ok=True)
    except OSError as error:
        path = error.filename or folder
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); choose another folder", field="--workdir"
        ) from error
    return folder


def check_shared(workdir: str | os.PathLike) -> None:
    """Checks that every process of a run sees what process 0 writes in `workdir`; all of them call it.

    Raises:
      CheckpointError: a process does not.
    """
    if distributed.process_count() == 1:
        return
    probe = storage.resolve_path(workdir) / FOLDER / f".shared-{distributed.exchange(uuid.uuid4().hex)[0]}"
    if distributed.process_index() == 0:
        storage.write_bytes(probe, b"may be deleted")
    distributed.exchange("written")

    def check_exists() -> None:
        if not probe.exists():
            raise CheckpointError(
                f"{probe.parent} is not the folder that process 0 uses; give a folder that all processes share",
                field="--workdir",
            )

    distributed.run_together(check_exists)
    if distributed.process_index() == 0:
        probe.unlink()


def _check_metrics(path: storage.Path) -> None:
    """Raises CheckpointError for damaged metrics, which Orbax reads without a check, to find the best checkpoints."""
    folder = path / "metrics"
    try:
        if folder.is_dir():
            verify(path, "metrics")
    except DamagedError as error:
        remedy = "delete this folder; the checkpoint itself is complete, but no longer counts among the best"
        raise CheckpointError(f"{error.message}: {remedy}", field=str(folder)) from error


def _hash_own_files(item: storage.Path) -> None:
    """Writes the digests of the arrays that this process has written to an item that is not complete yet."""
    process = jax.process_index()
    folder = f"ocdbt.process_{process}"
    if names := [f"{folder}/{name}" for name in storage.file_versions(item / folder)]:
        (item / f"digests.{process}.json").write_text(json.dumps(_hash_files(item, names)))


def _hash_files(folder: storage.Path, names: Iterable[str]) -> dict[str, str]:
    names = sorted(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing and reading release the interpreter
        return dict(zip(names, threads.map(lambda name: storage.hash_file(folder / name), names), strict=True))


@functools.lru_cache(maxsize=64)
def _verify_versions(path: storage.Path, item: str, versions: tuple[tuple[str, Any], ...], share: int, shares: int):
    names = {name for name, _ in versions} - {COMPLETE}
    if DIGESTS not in names:
        if "digests" in _read_json(path / "meta", "config"):
            raise DamagedError(f"{path} cannot be read ({item}/{DIGESTS} is missing); the checkpoint is damaged")
        if item == "model":
            log.warning(
                "%s has no digests, so damage to its arrays cannot be noticed: an earlier version saved it", path
            )
        return
    expected = _guarded_read(path, lambda: dict(json.loads((path / item / DIGESTS).read_text())))
    different = expected.keys() ^ (names - {DIGESTS})
    if not different:
        digests = _guarded_read(path, lambda: _hash_files(path / item, sorted(expected)[share::shares]))
        different = {name for name, digest in digests.items() if digest != expected[name]}
    if different:
        reason = f"{item}/{min(different)} is not the file that was saved"
        raise DamagedError(f"{path} cannot be read ({reason}); the checkpoint is damaged")


def _read_item(path: storage.Path, item: str, target: Any) -> Any:
    args = ocp.args.StandardRestore(target)
    return _guarded_read(path, lambda: ocp.StandardCheckpointHandler().restore(path / item, args=args))


def _guarded_read(path: storage.Path, action: Callable[[], Any]) -> Any:
    runtime.silence_closed_event_loops()
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


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _reason(error: BaseException) -> str:
    if "No space left" in str(error):
        return "no space left: make room or lower train.keep_last, then run the same command again"
    return f"{type(error).__name__}: {first_line(error)}"
