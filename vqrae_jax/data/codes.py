"""A tokenized dataset on disk or in a bucket: shards of codes with labels and ids, and a manifest; read without JAX.

A shard holds the codes of a fixed range of images, so that its content depends on nothing but the images and the
tokenizer. It appears under its name only when it is complete and on disk. manifest.json says what the codes are, and,
once all shards are there, each one's count and checksum.
"""

import collections
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.code_shards import SUFFIXES, WRITE, Columns, Format, read_shard
from vqrae_jax.errors import DataError

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a tokenized dataset is; everything that decides the content of its shards."""

    tokenizer: str  # hash of the tokenizer
    source: str  # what was tokenized
    images: int  # of the source, those that cannot be read included
    views: str  # how many codes an image has, see `ordered.VIEWS`
    code_shape: tuple[int, ...]  # of one image, with a leading axis of views where there are several
    code_dtype: str
    codebook_size: int
    image_size: int  # pixels, of the pictures that the codes paint
    format: Format
    shard_size: int  # images per shard
    listing: str | None = None  # hash of the names in the source, see `sources.listing`; earlier plans have none

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def file(self, shard: int) -> str:
        """The name of a shard."""
        return f"codes-{shard:05d}-of-{self.shards:05d}{SUFFIXES[self.format]}"

    def range(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.images)


def begin(folder: str | os.PathLike, plan: Plan) -> list[int]:
    """Makes the folder, or checks that what is in it is of the same plan; returns the shards that are missing.

    Raises:
      DataError: the folder holds something else.
    """
    folder = storage.at(folder)
    if not storage.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).is_file():
        _check_same(folder, plan)
    elif any(p.name.startswith("codes-") for p in (folder.iterdir() if folder.is_dir() else ())):
        raise DataError(f"--output={os.fspath(folder)!r} holds codes without a {MANIFEST}: give another folder")
    else:
        _replace(folder / MANIFEST, _json({**dataclasses.asdict(plan), "complete": False}))
    return [shard for shard in range(plan.shards) if not (folder / plan.file(shard)).is_file()]


def write_shard(folder: str | os.PathLike, plan: Plan, shard: int, columns: Columns) -> None:
    """Writes one shard: under a temporary name, to the disk, then under its own; or from here to the bucket.

    Raises:
      DataError: somebody has begun something else in this folder meanwhile.
    """
    path = storage.at(folder) / plan.file(shard)
    _check_same(path.parent, plan)
    if storage.is_remote(path):
        with storage.staged(path) as here:
            WRITE[plan.format](here, columns)
        return
    temporary = _temporary(path)
    with storage.called(path):
        try:
            WRITE[plan.format](temporary, columns)
            _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def finish(folder: str | os.PathLike, plan: Plan, key: Callable[[int], str] | None = None) -> dict[str, Any] | None:
    """Writes the whole manifest once every shard is there; until then None.

    It is read off the shards, so that whichever process comes last writes the same.

    Args:
      key: of the source: the id of an image by its number, to name those that could not be read.

    Raises:
      DataError: as `write_shard`; or a shard cannot be read.
    """
    folder = storage.at(folder)
    _check_same(folder, plan)
    if any(not (folder / plan.file(shard)).is_file() for shard in range(plan.shards)):
        return None
    shards, missing = [], []
    for shard in range(plan.shards):
        path, (start, stop) = folder / plan.file(shard), plan.range(shard)
        index = read_shard(path).index
        missing += sorted(set(range(start, stop)) - set(index.tolist()))
        shards.append({"file": path.name, "first": start, "count": len(index), "sha256": _sha256(path)})
    manifest = {
        **dataclasses.asdict(plan), "complete": True, "count": sum(s["count"] for s in shards), "skipped": missing,
        **({"skipped_ids": [key(index) for index in missing]} if key else {}), "shards": shards,
    }  # fmt: skip
    _replace(folder / MANIFEST, _json(manifest))
    for stale in folder.iterdir():
        if stale.name.startswith(".codes-"):  # of processes that were killed
            stale.unlink(missing_ok=True)
    return manifest


class Codes:
    """A tokenized dataset as a random access source: of grain, of a PyTorch DataLoader, or by itself.

    A record is {"codes": [*code_shape], "label": int32, "id": str, "index": number of the image in its source}.
    Shards are read whole when first asked for, and kept. Threads may share it; a process that it is sent to reads for
    itself.
    """

    def __init__(self, path: str | os.PathLike, cached: int | None = None):
        """
        Args:
          path: the folder that `inference.tokenize` wrote.
          cached: shards that are kept in memory; None: all.

        Raises:
          DataError: no such folder, or not all of its shards are there.
        """
        self.path = storage.at(path)
        self.manifest = _read_manifest(self.path)
        self.plan = _plan(self.manifest, self.path)
        if not self.manifest["complete"]:
            there = sum((self.path / self.plan.file(shard)).is_file() for shard in range(self.plan.shards))
            raise DataError(
                f"{self.path} is not complete: {there} of {self.plan.shards} shards are there; run the same "
                f"`inference.tokenize` again, it goes on where it stopped"
            )
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]], dtype=np.int64)
        self._cached, self._open, self._lock = cached, collections.OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Raises:
          DataError: the shard is missing or damaged.
          TypeError: `index` is no integer; `shards` gives many records at once.
        """
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"codes[{index!r}]: one record at a time, by an integer; shards() gives many") from None
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        columns, row = self._shard(shard), index - int(self._ends[shard])
        return {
            "codes": columns.codes[row], "label": columns.label[row], "id": columns.id[row],
            "index": int(columns.index[row]),
        }  # fmt: skip

    def shards(self) -> Iterator[Columns]:
        """Everything in order, a shard at a time; nothing is kept."""
        for shard in self.manifest["shards"]:
            yield self._read(shard)

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
          DataError: naming the first that differs.
        """
        for shard in self.manifest["shards"]:
            path = self.path / shard["file"]
            if not path.is_file() or _sha256(path) != shard["sha256"]:
                raise DataError(f"{path} is not the file that {MANIFEST} describes: copy or make it again")

    def __repr__(self) -> str:
        return f"Codes({os.fspath(self.path)!r}, images={len(self)}, code_shape={self.plan.code_shape})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_open": collections.OrderedDict(), "_lock": threading.Lock()}

    def _shard(self, number: int) -> Columns:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        columns = self._read(self.manifest["shards"][number])  # unlocked: other threads read other shards meanwhile
        with self._lock:
            self._open[number] = columns
            while self._cached is not None and len(self._open) > max(self._cached, 1):
                self._open.popitem(last=False)
        return columns

    def _read(self, shard: dict[str, Any]) -> Columns:
        columns = read_shard(self.path / shard["file"])
        given = (len(columns), columns.codes.shape[1:], columns.codes.dtype.name)
        expected = (shard["count"], self.plan.code_shape, self.plan.code_dtype)
        if given != expected and shard["count"]:
            raise DataError(f"{self.path / shard['file']} holds {given}, {MANIFEST} says {expected}: make it again")
        return columns


def _check_same(folder: storage.Path, plan: Plan) -> None:
    """Raises DataError unless what is in the folder is of this plan."""
    there = _plan(_read_manifest(folder), folder)
    names = [field.name for field in dataclasses.fields(Plan)]
    differing = [name for name in names if getattr(there, name) != getattr(plan, name)]
    if there.listing is not None and differing == ["listing"]:
        raise DataError(
            f"--output={os.fspath(folder)!r} was begun on other files: {plan.images} images of {plan.source} as "
            "then, but their names or sizes are no longer the same, so that images would be doubled and missing: "
            "put the files back as they were, or give another folder, or delete it"
        )
    differing = [name for name in differing if name != "listing"]  # a hash says nothing beside the others
    if differing:
        told = ", ".join(f"{n} ({getattr(there, n)!r}, now {getattr(plan, n)!r})" for n in differing)
        raise DataError(
            f"--output={os.fspath(folder)!r} holds codes that differ in {told}: give another folder, or delete it"
        )


def _read_manifest(folder: storage.Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}: give a folder that `inference.tokenize` wrote") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _plan(manifest: dict[str, Any], folder: storage.Path) -> Plan:
    try:
        values = {"listing": None} | manifest
        values = {field.name: values[field.name] for field in dataclasses.fields(Plan)}
        return Plan(**{**values, "code_shape": tuple(values["code_shape"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} describes no codes: {error} is missing or wrong") from None


def _json(values: dict[str, Any]) -> bytes:
    # What is no UTF-8 of a path that was given becomes an escape of JSON's own.
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _replace(path: storage.Path, content: bytes) -> None:
    if storage.is_remote(path):
        storage.write(path, content)
        return
    temporary = _temporary(path)
    with storage.called(path):
        try:
            temporary.write_bytes(content)
            _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """A name beside `path` that no other writer has: processes in containers often have the same number."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file its name once its content is on the disk, and the name too."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: storage.Path) -> str:
    with open(storage.fetch(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
