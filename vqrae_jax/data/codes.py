"""A tokenized dataset, local or in a bucket: shards of codes with labels and ids, and a manifest; read without JAX.

A shard holds the codes of a fixed range of images, so that its content depends on the images and the tokenizer only.
manifest.json describes the codes and, once all shards exist, their counts and checksums.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.code_shards import SUFFIXES, WRITERS, Columns, Format, read_shard
from vqrae_jax.data.source import locate
from vqrae_jax.errors import DataError

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The description of a tokenized dataset: everything that determines the content of its shards."""

    tokenizer: str  # hash of the tokenizer
    source: str  # description of the source of images
    images: int  # number of images of the source, including those that cannot be read
    views: str  # crops of an image, a name in `images.VIEWS`
    code_shape: tuple[int, ...]  # of one image, with a leading axis if there are several views
    code_dtype: str
    codebook_size: int
    image_size: int  # side of the decoded images in pixels
    format: Format
    shard_size: int  # images per shard
    listing: str | None = None  # hash of `Source.listing`; older manifests have none

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def file_name(self, shard: int) -> str:
        return f"codes-{shard:05d}-of-{self.shards:05d}{SUFFIXES[self.format]}"

    def image_range(self, shard: int) -> tuple[int, int]:
        """Returns the first image of a shard and the one after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.images)


def start_dataset(folder: str | os.PathLike, plan: Plan) -> list[int]:
    """Creates the folder and its manifest, or checks that existing shards have the same plan.

    Returns:
      The numbers of the shards that are missing.
    """
    folder = storage.resolve_path(folder)
    if (folder / MANIFEST).is_file():
        _check_plan(folder, plan)
    elif any(file.name.startswith("codes-") for file in (folder.iterdir() if folder.is_dir() else ())):
        raise DataError(f"has codes without {MANIFEST}; use another folder", field="--output", value=os.fspath(folder))
    else:
        manifest = {**dataclasses.asdict(plan), "complete": False}
        storage.write_bytes(folder / MANIFEST, _to_json(manifest), durable=True)
    return [shard for shard in range(plan.shards) if not (folder / plan.file_name(shard)).is_file()]


def write_shard(folder: str | os.PathLike, plan: Plan, shard: int, columns: Columns) -> None:
    """Writes a shard, which appears under its name only when it is complete and on the disk or in the bucket.

    A different dataset, which another process has started in this folder meanwhile, is a DataError and unchanged.
    """
    path = storage.resolve_path(folder) / plan.file_name(shard)
    _check_plan(path.parent, plan)
    stage = storage.stage_output(path) if storage.is_remote(path) else storage.replace_file(path, durable=True)
    with stage as local:
        WRITERS[plan.format](local, columns)


def finish_dataset(
    folder: str | os.PathLike, plan: Plan, key: Callable[[int], str] | None = None
) -> dict[str, Any] | None:
    """Writes the complete manifest, which is computed from the shards and the same for each process that writes it.

    Args:
      key: `Source.key`, to record the ids of the images that could not be read.

    Returns:
      The manifest; None if shards are missing.
    """
    folder = storage.resolve_path(folder)
    _check_plan(folder, plan)
    if any(not (folder / plan.file_name(shard)).is_file() for shard in range(plan.shards)):
        return None
    shards, skipped = [], []
    for shard in range(plan.shards):
        path, (start, stop) = folder / plan.file_name(shard), plan.image_range(shard)
        index = read_shard(path).index
        skipped += sorted(set(range(start, stop)) - set(index.tolist()))
        shards.append({"file": path.name, "first": start, "count": len(index), "sha256": _sha256(path)})
    manifest = {
        **dataclasses.asdict(plan), "complete": True, "count": sum(s["count"] for s in shards), "skipped": skipped,
        **({"skipped_ids": [key(index) for index in skipped]} if key else {}), "shards": shards,
    }  # fmt: skip
    storage.write_bytes(folder / MANIFEST, _to_json(manifest), durable=True)
    for file in folder.iterdir():
        if file.name.startswith(".codes-"):  # temporary files of processes that were killed
            file.unlink(missing_ok=True)
    return manifest


class Codes:
    """A tokenized dataset in random access, also for grain and for the DataLoader of PyTorch.

    A record is {"codes": unsigned integers [*code_shape], "label": int32, "id": str, "index": number of the image in
    its source}. Shards are read as a whole at their first record and cached. Threads can share an instance.
    """

    def __init__(self, path: str | os.PathLike, cached: int | None = None):
        """`cached`: number of shards that are kept in memory; None: all."""
        self.path = storage.resolve_path(path)
        self.manifest = _read_manifest(self.path)
        self.plan = _parse_plan(self.manifest, self.path)
        if not self.manifest["complete"]:
            exist = sum((self.path / self.plan.file_name(shard)).is_file() for shard in range(self.plan.shards))
            raise DataError(
                f"not complete: {exist} of {self.plan.shards} shards exist; repeat the command that tokenizes, which "
                "continues where it stopped",
                field=os.fspath(self.path),
            )
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]], dtype=np.int64)
        self._cached = cached
        self._load_shard = functools.lru_cache(None if cached is None else max(cached, 1))(self._read_shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = operator.index(index)  # raises TypeError for slices and arrays; `shards` returns many records at once
        shard, row = locate(self._ends, index + len(self) if index < 0 else index)
        columns = self._load_shard(shard)
        return {
            "codes": columns.codes[row], "label": columns.label[row], "id": columns.id[row],
            "index": int(columns.index[row]),
        }  # fmt: skip

    def shards(self) -> Iterator[Columns]:
        """Iterates over the content of all shards in order, without caching."""
        yield from map(self._read_shard, range(len(self.manifest["shards"])))

    def verify(self) -> None:
        """Compares the shards with their checksums; a DataError names the first that differs."""
        for shard in self.manifest["shards"]:
            path = self.path / shard["file"]
            if not path.is_file() or _sha256(path) != shard["sha256"]:
                problem = f"missing, or not the file that {MANIFEST} describes; copy or create it again"
                raise DataError(problem, field=os.fspath(path))

    def __repr__(self) -> str:
        return f"Codes({os.fspath(self.path)!r}, images={len(self)}, code_shape={self.plan.code_shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Codes, (os.fspath(self.path), self._cached)  # another process reads the shards itself

    def _read_shard(self, number: int) -> Columns:
        shard = self.manifest["shards"][number]
        columns = read_shard(self.path / shard["file"])
        actual = (len(columns), columns.codes.shape[1:], columns.codes.dtype.name)
        expected = (shard["count"], self.plan.code_shape, self.plan.code_dtype)
        if actual != expected and shard["count"]:
            problem = f"has {actual}, but {MANIFEST} has {expected} (count, shape, dtype); create it again"
            raise DataError(problem, field=os.fspath(self.path / shard["file"]))
        return columns


def _check_plan(folder: storage.Path, plan: Plan) -> None:
    """Raises DataError unless the manifest in the folder has this plan."""
    existing = _parse_plan(_read_manifest(folder), folder)
    differing = [name for name, value in vars(plan).items() if getattr(existing, name) != value]
    if existing.listing is not None and differing == ["listing"]:
        raise DataError(
            f"was started with other files: the names or sizes of the {plan.images} images of {plan.source} have "
            "changed, so that images would be missing or repeated; restore the files, use another folder, or delete it",
            field="--output", value=os.fspath(folder),
        )  # fmt: skip
    differing = [name for name in differing if name != "listing"]  # a hash explains nothing
    if differing:
        values = ", ".join(f"{name} ({getattr(existing, name)!r}, now {getattr(plan, name)!r})" for name in differing)
        problem = f"has codes that differ in {values}; use another folder, or delete it"
        raise DataError(problem, field="--output", value=os.fspath(folder))


def _read_manifest(folder: storage.Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no {MANIFEST}; expected the folder of a tokenized dataset", field=os.fspath(folder)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", field=os.fspath(file)) from None


def _parse_plan(manifest: dict[str, Any], folder: storage.Path) -> Plan:
    try:
        values = {"listing": None} | manifest
        values = {field.name: values[field.name] for field in dataclasses.fields(Plan)}
        return Plan(**{**values, "code_shape": tuple(values["code_shape"])})
    except (KeyError, TypeError) as error:
        problem = f"does not describe codes: {error} is missing or wrong"
        raise DataError(problem, field=os.fspath(folder / MANIFEST)) from None


def _to_json(values: dict[str, Any]) -> bytes:
    # Bytes of paths that are not UTF-8 become escapes.
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _sha256(path: storage.Path) -> str:
    with open(storage.download(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
