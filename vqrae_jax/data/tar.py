"""WebDataset shards in random access: members of uncompressed tar files are read in place.

Members whose names agree up to the first dot belong together: "n01/7.jpg" and "n01/7.cls" are an image and its label.
The headers of a shard are read once; the positions of its images are cached.
"""

import concurrent.futures
import hashlib
import io
import os
import tarfile
import zipfile
from typing import Any, NamedTuple

import numpy as np

from vqrae_jax import runtime, storage
from vqrae_jax.data.images import SUFFIXES
from vqrae_jax.data.source import Source, list_shards, locate, read_range
from vqrae_jax.errors import DataError, ImageError

MAX_IMAGE_BYTES = 2**28  # larger members are not read into memory
_MAX_LABEL_BYTES = 32
_THREADS = 8  # shards that are indexed at the same time
_INDEX_VERSION = 2  # increase it when the content of an index changes: cached ones are not used then


class Index(NamedTuple):
    """The images of one shard or of several."""

    starts: np.ndarray  # int64 [images], byte offsets
    sizes: np.ndarray  # int64 [images], bytes
    labels: np.ndarray  # int64 [images], -1 without a label
    lengths: np.ndarray  # int64 [images], bytes of each key
    keys: np.ndarray  # uint8 [sum of lengths], all keys, one after another


class TarShards(Source):
    """The images of tar files, shard after shard in the order of the members.

    The image is the member ending in .jpg, .png, .webp etc., the label the integer in the member ending in .cls.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path"):
        self.path = os.fspath(path)
        self._shards = list_shards(path, (".tar",), field)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(lambda shard: _load_index(shard, field), self._shards))
        self._ends = np.cumsum([len(index.starts) for index in indices])
        self._index = Index(*(np.concatenate(parts) for parts in zip(*indices, strict=True)))
        self._key_ends = np.cumsum(self._index.lengths)
        if not len(self):
            raise DataError(f"no member of these tar files ends in {', '.join(SUFFIXES)}", field=field, value=self.path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | np.integer) -> dict:
        shard = self._shard(index)
        start, size, label = (int(values[index]) for values in self._index[:3])
        if size > MAX_IMAGE_BYTES:
            raise ImageError(f"{size} bytes exceed the limit of {MAX_IMAGE_BYTES} bytes for an encoded image")
        return {"image": read_range(shard, start, start + size), "label": label}

    def key(self, index: int) -> str:
        """Returns the name that the image and its label share, folders included: WebDataset's __key__."""
        end, length = int(self._key_ends[index]), int(self._index.lengths[index])
        return bytes(self._index.keys[end - length : end]).decode(errors="replace")

    def fingerprint(self, count: int) -> bytes:
        """Returns the sizes of the first `count` images."""
        return self._index.sizes[:count].tobytes()

    def name(self, index: int) -> str:
        return f"{self.key(index)!r} of {self._shard(index)!r}"

    def _shard(self, index: int | np.integer) -> str:
        return self._shards[locate(self._ends, index)[0]]

    def __repr__(self) -> str:
        return f"TarShards({self.path!r}, shards={len(self._shards)}, images={len(self)})"


def _load_index(shard: str, field: str) -> Index:
    """Returns the cached index of a shard, or a new one if the shard has changed."""
    try:
        # Not every kind of bucket reports modification times: remote shards are identified by name and size.
        identity = shard if storage.is_remote(shard) else f"{os.path.abspath(shard)} {os.stat(shard).st_mtime_ns}"
        identity = f"{_INDEX_VERSION} {identity} {storage.file_size(shard)}"
    except OSError as error:
        raise DataError(f"a shard cannot be read: {error}", field=field) from error
    file = runtime.cache_folder() / "tar" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Index(**arrays)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        index = _build_index(shard, field)
    try:
        arrays = io.BytesIO()
        np.savez(arrays, **index._asdict())
        storage.write_bytes(file, arrays.getvalue())
    except OSError:  # on a full or read-only disk the next start indexes the shard again
        pass
    return index


def _build_index(shard: str, field: str) -> Index:
    images, labels = {}, {}
    try:
        with storage.open_file(shard) as file, tarfile.open(None, "r:", file) as tar:
            while member := tar.next():
                tar.members.clear()  # tarfile keeps all headers otherwise
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if not member.isreg() or member.issparse() or not key:  # a hidden file has no key
                    continue
                key = f"{folder}/{key}"
                if f".{suffix.lower()}" in SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix == "cls" and member.size <= _MAX_LABEL_BYTES:
                    labels[key] = tar.extractfile(member).read()
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = f"{shard!r} is not a complete, uncompressed tar file ({error}); copy it again or unpack it (gunzip)"
        raise DataError(problem, field=field) from error
    positions = np.array(list(images.values()), np.int64).reshape(-1, 2)
    keys = [key.removeprefix("./").lstrip("/").encode(errors="surrogateescape") for key in images]
    return Index(
        positions[:, 0],
        positions[:, 1],
        np.array([_parse_label(labels.get(key)) for key in images], np.int64),
        np.array([len(key) for key in keys], np.int64),
        np.frombuffer(b"".join(keys), np.uint8),
    )


def _check_end(file: Any, offset: int) -> None:
    """Raises ReadError unless zeros end the archive: tarfile also ends it at a cut or damaged header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        problem = "cut short" if len(block) < tarfile.BLOCKSIZE else "damaged"
        raise tarfile.ReadError(f"{problem} at byte {offset}: expected a header or the zeros at the end")


def _parse_label(text: bytes | None) -> int:
    try:
        return int(text) if text else -1
    except ValueError:
        return -1
