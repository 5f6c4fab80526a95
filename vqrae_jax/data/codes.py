"""A tokenized dataset, local or in a bucket: shards of codes with labels and ids, and a manifest; read without JAX.

A shard holds the codes of a fixed range of images, so that its content depends on the images and the tokenizer only.
manifest.json describes the codes and, once all shards exist, their counts and checksums; `Codes` compares each shard
with its checksum before it is read.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pydantic
from jaxtyping import Int32, Integer

from vqrae_jax import storage
from vqrae_jax.data.code_shards import SUFFIXES, WRITERS, Columns, Format, read_shard
from vqrae_jax.data.source import locate
from vqrae_jax.errors import DataError

T = TypeVar("T")

MANIFEST = "manifest.json"

Count = Annotated[int, pydantic.Field(ge=0, lt=2**48, strict=True)]
Positive = Annotated[int, pydantic.Field(ge=1, lt=2**48, strict=True)]
Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
Text = pydantic.InstanceOf[str]  # may have lone surrogates, which `str` rejects: names of files that are not UTF-8


@dataclasses.dataclass(frozen=True)
class Plan:
    """The description of a tokenized dataset: everything that determines the content of its shards."""

    tokenizer: Sha256  # hash of the tokenizer
    source: Text  # description of the source of images
    images: Count  # number of images of the source, including those that cannot be read
    views: Literal["one", "flip", "ten-crop"]  # crops of an image, a name in `images.VIEWS`
    code_shape: tuple[Positive, ...]  # of one image, with a leading axis if there are several views
    code_dtype: Literal["uint16", "int32"]
    codebook_size: Positive
    image_size: Positive  # side of the decoded images in pixels
    format: Format
    shard_size: Positive  # images per shard
    listing: Sha256 | None = None  # hash of `Source.listing`; older manifests have none
    encoding: Text = "float32"  # arithmetic of the encoder, see `Tokenizer.encoding`
    classes: tuple[Text, ...] | None = None  # names of labels 0, 1, ...; None if they are not known
    grids: tuple[tuple[Positive, Positive], ...] = ()  # as in a generator's config; older manifests have none

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape of the codes of one view."""
        return self.code_shape[self.views != "one" :]

    @property
    def levels(self) -> int | None:
        """The number of codes per position of the grids; None without grids."""
        return math.prod(self.view_shape) // sum(h * w for h, w in self.grids) if self.grids else None

    def file_name(self, shard: int) -> str:
        return f"codes-{shard:05d}-of-{self.shards:05d}{SUFFIXES[self.format]}"

    def image_range(self, shard: int) -> tuple[int, int]:
        """Returns the first image of a shard and the one after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.images)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest describes it."""

    file: str
    first: Count  # image of the source
    count: Count  # rows
    sha256: Sha256


@dataclasses.dataclass(frozen=True)
class Contents:
    """The fields that manifest.json has in addition to the plan once the dataset is complete."""

    count: Count  # rows of all shards
    skipped: tuple[Count, ...]  # images that could not be read
    shards: tuple[ShardEntry, ...]


def start_dataset(folder: str | os.PathLike, plan: Plan) -> list[int]:
    """Creates the folder and its manifest, or checks that existing shards have the same plan.

    Returns:
      The numbers of the shards that are missing or, once the dataset was complete, differ from their checksums.
    """
    folder = storage.resolve_path(folder)
    if (folder / MANIFEST).is_file():
        _check_plan(folder, plan)
    elif any(file.name.startswith("codes-") for file in (folder.iterdir() if folder.is_dir() else ())):
        raise DataError(f"has codes without {MANIFEST}; use another folder", field="--output", value=os.fspath(folder))
    else:
        _write_manifest(folder, {**dataclasses.asdict(plan), "complete": False})
    manifest = _read_manifest(folder)
    entries = _parse(Contents, manifest, folder).shards if manifest["complete"] else ()
    digests, missing = {entry.file: entry.sha256 for entry in entries}, []
    for shard, file in enumerate(folder / plan.file_name(shard) for shard in range(plan.shards)):
        if not file.is_file() or (file.name in digests and _hash_shard(file) != digests[file.name]):
            missing.append(shard)
    return missing


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
        columns = read_shard(path)
        _check_columns(columns, plan, shard, path)
        index = columns.index
        skipped += sorted(set(range(start, stop)) - set(index.tolist()))
        shards.append({"file": path.name, "first": start, "count": len(index), "sha256": _hash_shard(path)})
    manifest = {
        **dataclasses.asdict(plan), "complete": True, "count": sum(s["count"] for s in shards), "skipped": skipped,
        **({"skipped_ids": [key(index) for index in skipped]} if key else {}), "shards": shards,
    }  # fmt: skip
    manifest = _write_manifest(folder, manifest)
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
        self.plan = _parse(Plan, self.manifest, self.path)
        if not self.manifest["complete"]:
            exist = sum(file.name.startswith("codes-") for file in self.path.iterdir())
            raise DataError(
                f"not complete: {exist} of {self.plan.shards} shards exist; repeat the command that tokenizes, which "
                "continues where it stopped",
                field=os.fspath(self.path),
            )
        contents = _parse(Contents, self.manifest, self.path)
        _check_contents(contents, self.plan, self.path)
        self._entries, self._verified = contents.shards, set()
        self._ends = np.cumsum([entry.count for entry in self._entries], dtype=np.int64)
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

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, and so of all codes; not of the grids, which may be added later."""
        return _digest({name: value for name, value in self.manifest.items() if name != "grids"})

    def shards(self) -> Iterator[Columns]:
        """Iterates over the content of all shards in order, without caching."""
        yield from map(self._read_shard, range(len(self._entries)))

    def load(self, threads: int = 4) -> tuple[Integer[np.ndarray, " images *code_shape"], Int32[np.ndarray, " images"]]:
        """Reads the codes and labels of all shards with a number of threads, without caching."""
        codes = np.empty((len(self), *self.plan.code_shape), self.plan.code_dtype)
        labels = np.empty(len(self), np.int32)

        def fill(number: int) -> None:
            columns, end = self._read_shard(number), self._ends[number]
            if len(columns):  # those of a shard without rows may lack the shape
                codes[end - len(columns) : end], labels[end - len(columns) : end] = columns.codes, columns.label

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            collections.deque(pool.map(fill, range(len(self._entries))), maxlen=0)
        return codes, labels

    def verify(self) -> None:
        """Compares all shards with their checksums; a DataError names the first that differs."""
        for number in range(len(self._entries)):
            self._verify_shard(number)

    def __repr__(self) -> str:
        return f"Codes({os.fspath(self.path)!r}, images={len(self)}, code_shape={self.plan.code_shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Codes, (os.fspath(self.path), self._cached)  # another process reads the shards itself

    def _read_shard(self, number: int) -> Columns:
        path, count = self.path / self._entries[number].file, self._entries[number].count
        if number not in self._verified:  # once in each process, as reading a file again is not free
            self._verify_shard(number)
            self._verified.add(number)
        columns = read_shard(path)
        if len(columns) != count:
            problem = f"has {len(columns)} rows, but {MANIFEST} has {count}; create it again"
            raise DataError(problem, field=os.fspath(path))
        _check_columns(columns, self.plan, number, path)
        return columns

    def _verify_shard(self, number: int) -> None:
        path = self.path / self._entries[number].file
        local = storage.download(path)
        if not local.is_file():
            raise DataError("no such file; copy the shard again", field=os.fspath(path))
        if storage.hash_file(local) != self._entries[number].sha256:
            if storage.is_remote(path):
                local.unlink()  # the copy may be damaged, not the original: another attempt downloads it again
            problem = f"damaged, or not the file that {MANIFEST} describes; copy or create it again"
            raise DataError(problem, field=os.fspath(path))


def is_complete(folder: storage.Path) -> bool:
    """Returns whether all shards of a dataset exist."""
    return _read_manifest(folder)["complete"]


def read_plan(folder: storage.Path) -> Plan:
    """Reads the plan of a dataset, complete or not."""
    return _parse(Plan, _read_manifest(folder), folder)


def _check_contents(contents: Contents, plan: Plan, folder: storage.Path) -> None:
    """Raises DataError if fields of the manifest contradict each other; names of shards do not leave the folder."""
    expected = [(plan.file_name(i), *plan.image_range(i)) for i in range(min(len(contents.shards), plan.shards))]
    rows = zip(contents.shards, expected, strict=False)
    matching = sum((e.file, e.first) == (name, start) and e.count <= stop - start for e, (name, start, stop) in rows)
    conditions = {
        "grids": not plan.grids or not math.prod(plan.view_shape) % sum(h * w for h, w in plan.grids),
        "shards": len(contents.shards) == plan.shards == matching,
        "count": contents.count == sum(entry.count for entry in contents.shards),
        "skipped": len({i for i in contents.skipped if i < plan.images}) == plan.images - contents.count,
    }
    if wrong := [name for name, holds in conditions.items() if not holds]:
        problem = f"{wrong[0]} contradicts the other fields; restore the file that was written"
        raise DataError(problem, field=os.fspath(folder / MANIFEST))


def _check_columns(columns: Columns, plan: Plan, shard: int, path: storage.Path) -> None:
    """Raises DataError unless a shard has codes of the plan's kind for images of its range, each once."""
    if not len(columns):
        return
    index, codes, (start, stop) = columns.index, columns.codes, plan.image_range(shard)
    actual = codes.shape[1:], codes.dtype.name
    if actual != (expected := (plan.code_shape, plan.code_dtype)):
        problem = f"has codes of shape and dtype {actual}, but {MANIFEST} has {expected}"
    elif not len(index) == len(columns.id) == len(columns.label) == len(codes):
        problem = "has columns of different lengths"
    elif (np.diff(index) <= 0).any() or index[0] < start or index[-1] >= stop:
        problem = f"has images that are repeated, not in order, or not in [{start}, {stop})"
    elif codes.min(initial=0) < 0 or codes.max(initial=0) >= plan.codebook_size:
        problem = f"has codes that are not in [0, {plan.codebook_size})"
    else:
        return
    raise DataError(f"{problem}; delete it and tokenize again", field=os.fspath(path))


def _check_plan(folder: storage.Path, plan: Plan) -> None:
    """Raises DataError unless the manifest in the folder has this plan."""
    existing = read_plan(folder)
    differing = [name for name, value in vars(plan).items() if getattr(existing, name) != value]
    differing = [name for name in differing if name != "grids" or existing.grids]  # the tokenizer decides them
    if existing.listing is not None and differing == ["listing"]:
        raise DataError(
            f"was started with other files: the names or sizes of the {plan.images} images of {plan.source} have "
            "changed, so that images would be missing or repeated; restore the files, use another folder, or delete it",
            field="--output", value=os.fspath(folder),
        )  # fmt: skip
    differing = [name for name in differing if name != "listing"]  # a hash explains nothing
    if differing:
        values = {name: [reprlib.repr(getattr(plan, name)) for plan in (existing, plan)] for name in differing}
        values = ", ".join(f"{name} ({old}, now {new})" for name, (old, new) in values.items())
        problem = f"has codes that differ in {values}; use another folder, or delete it"
        raise DataError(problem, field="--output", value=os.fspath(folder))


def _read_manifest(folder: storage.Path) -> dict[str, Any]:
    """Reads manifest.json and compares it with its checksum; older manifests have none."""
    file = folder / MANIFEST
    try:
        if not storage.is_remote(file):
            storage.check_regular(file)
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no {MANIFEST}; expected the folder of a tokenized dataset", field=os.fspath(folder)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON: {error}", field=os.fspath(file)) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("complete"), bool):
        raise DataError("complete is missing or not true or false", field=os.fspath(file))
    _parse(Plan, manifest, folder)  # names a field that is wrong, which the checksum cannot
    if manifest.get("sha256", digest := _digest(manifest)) != digest:
        problem = "was edited or damaged: it differs from its own checksum; restore the file that was written"
        raise DataError(problem, field=os.fspath(file))
    return manifest


def _write_manifest(folder: storage.Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes manifest.json with its checksum; returns its content."""
    manifest |= {"sha256": _digest(manifest)}
    # Bytes of paths that are not UTF-8 become escapes.
    content = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    storage.write_bytes(folder / MANIFEST, content, durable=True)
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of all fields but "sha256", whatever their order."""
    fields = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _parse(kind: type[T], manifest: dict[str, Any], folder: storage.Path) -> T:
    try:
        return _adapter(kind).validate_python(manifest)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        problem = f"{name} is missing or wrong ({first['msg'].lower()}); restore the file that was written"
        raise DataError(problem, field=os.fspath(folder / MANIFEST)) from None


@functools.cache
def _adapter(kind: type) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _hash_shard(path: storage.Path) -> str:
    return storage.hash_file(storage.download(path))
