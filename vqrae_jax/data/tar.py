"""WebDataset shards in random access: uncompressed tar files whose members are read where they lie, never extracted.

Members with the same name up to the first dot of the file name belong together: "n01/7.jpg" and "n01/7.cls" are one
image and its label. Where the images lie is found once, by walking over the headers, and kept in a cache folder.
"""

import concurrent.futures
import hashlib
import io
import os
import pathlib
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import files
from vqrae_jax.data.images import SUFFIXES
from vqrae_jax.errors import DataError, ImageError

LARGEST = 2**28  # bytes of an encoded image; a larger one is not read into memory
_LABEL = 32  # bytes of a .cls member at most
_READERS = 8  # shards indexed at once
_INDEXED = 2  # changes with what is indexed of a shard, so that indices of earlier versions are not used


class Index(NamedTuple):
    """The images of a shard, or of several."""

    starts: np.ndarray  # int64 [images], byte offsets
    sizes: np.ndarray  # int64 [images]
    labels: np.ndarray  # int64 [images], -1 without
    lengths: np.ndarray  # int64 [images], bytes of each key
    keys: np.ndarray  # uint8 [sum of lengths], one after another


class TarShards:
    """The images of some tar files, shard after shard, each in its order.

    A record is {"image": encoded bytes, "label": int}: the member ending in .jpg, .png, .webp and so on, and the whole
    number in the member ending in .cls, -1 when there is none.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path", cache: str | os.PathLike | None = None):
        """
        Args:
          path: a folder, a file or a pattern, see `files.shards`.
          field: the config field that `path` comes from.
          cache: folder of the indices; None: $XDG_CACHE_HOME/vqrae_jax/tar or ~/.cache/vqrae_jax/tar.

        Raises:
          DataError: naming `field`: no shards, a compressed or damaged one, or no images in any.
        """
        self.path = os.fspath(path)
        self._shards = files.shards(path, (".tar",), field)
        cache = pathlib.Path(cache) if cache else _cache_folder()
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda shard: _index(shard, field, cache), self._shards))
        self._ends = np.cumsum([len(index.starts) for index in found])
        self._index = Index(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
        self._key_ends = np.cumsum(self._index.lengths)
        if not len(self):
            raise DataError(f"{field}={self.path!r}: no member of these tar files ends in {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
          ImageError: the shard is cut short, or the image too large to be one.
          OSError: the shard is gone or may not be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start, size, label = (int(values[index]) for values in self._index[:3])
        if size > LARGEST:
            raise ImageError(f"{size} bytes are more than the {LARGEST} that an encoded image may have")
        return {"image": files.read(self._shard(index), start, start + size), "label": label}

    def key(self, index: int) -> str:
        """The name that the image and its label share, folders included: WebDataset's __key__."""
        end = int(self._key_ends[index])
        return bytes(self._index.keys[end - int(self._index.lengths[index]) : end]).decode(errors="replace")

    def known(self, images: int) -> bytes:
        """Of the first images, beside their names: their sizes."""
        return self._index.sizes[:images].tobytes()

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return f"{self.key(index)!r} of {self._shard(index)!r}"

    def _shard(self, index):
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def __repr__(self) -> str:
        return f"TarShards({self.path!r}, shards={len(self._shards)}, images={len(self)})"


def _cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "vqrae_jax" / "tar"


def _index(shard, field, cache):
    """The index of a shard, from the cache if the shard has not changed since."""
    try:
        # A bucket gives no time that every kind of it knows; there a shard is known by name and size.
        there = shard if files.is_remote(shard) else f"{os.path.abspath(shard)} {os.stat(shard).st_mtime_ns}"
        state = f"{_INDEXED} {there} {files.size(shard)}"
    except OSError as error:
        raise DataError(f"{field}: a shard cannot be read: {error}") from error
    kept = cache / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return Index(**arrays)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        index = _walk(shard, field)
    try:
        arrays = io.BytesIO()
        np.savez(arrays, **index._asdict())
        storage.write(kept, arrays.getvalue())
    except OSError:  # a full or read-only disk costs time at the next start, nothing else
        pass
    return index


def _walk(shard, field):
    images, labels = {}, {}
    try:
        with files.opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                archive.members.clear()  # tarfile keeps every header it has met
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if not member.isreg() or member.issparse() or not key:  # a hidden file has no key
                    continue
                key = f"{folder}/{key}"
                if f".{suffix.lower()}" in SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix == "cls" and member.size <= _LABEL:
                    labels[key] = archive.extractfile(member).read()
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{field}: {shard!r} is no whole, uncompressed tar file ({error}): copy it again, or unpack a .tar.gz to "
            ".tar (gunzip), as a compressed one cannot be read at random"
        ) from error
    places = np.array(list(images.values()), np.int64).reshape(-1, 2)
    numbers = np.array([_number(labels.get(key)) for key in images], np.int64)
    keys = [key.removeprefix("./").lstrip("/").encode(errors="surrogateescape") for key in images]
    lengths = np.array([len(key) for key in keys], np.int64)
    return Index(places[:, 0], places[:, 1], numbers, lengths, np.frombuffer(b"".join(keys), np.uint8))


def _check_end(file, offset):
    """To tarfile a header that is cut, damaged or not there ends the archive as well as the zeros that should."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        what = "cut short" if len(block) < tarfile.BLOCKSIZE else "damaged"
        raise tarfile.ReadError(f"{what} at byte {offset}, where neither a member begins nor the zeros of the end")


def _number(text):
    try:
        return int(text) if text else -1
    except ValueError:
        return -1
