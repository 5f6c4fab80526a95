"""WebDataset shards in random access: members of uncompressed tar files are read in place.

Members whose names agree up to the first dot belong together: "n01/7.jpg" and "n01/7.cls" are an image and its label.
An image with another dot in its name, as "b.1.jpg", has the key "b.1", unless "b.jpg" exists: then it is something else
of the same sample, such as a mask. The headers of a shard are read once; the positions of its images are cached.
Nothing is extracted: links, devices and folders are ignored, and names of members are never paths.
"""

import collections
import concurrent.futures
import hashlib
import io
import json
import logging
import os
import tarfile
import zipfile
from typing import Any, NamedTuple

import numpy as np

from vqrae_jax import runtime, storage
from vqrae_jax.data.images import MAX_BYTES, SUFFIXES
from vqrae_jax.data.shards import TRAIN, Split, list_shards
from vqrae_jax.data.source import USUAL, Keys, Source, locate, read_range
from vqrae_jax.errors import DataError, ImageError

_MAX_LABEL_BYTES = 2**16
_THREADS = 8  # shards that are indexed at the same time
_INDEX_VERSION = 3  # increase it when the content of an index changes: cached ones are not used then
_MAX_ENDINGS = 50  # that are counted with all their dots
_DAMAGED = -2  # a label that is not an integer

_log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The images of one shard or of several."""

    starts: np.ndarray  # int64 [images], byte offsets
    sizes: np.ndarray  # int64 [images], bytes
    labels: np.ndarray  # int64 [images], -1 without a label, _DAMAGED if it is not an integer
    lengths: np.ndarray  # int64 [images], bytes of each key
    keys: np.ndarray  # uint8 [sum of lengths], all keys, one after another
    endings: np.ndarray  # uint8, a line of JSON: number of members by what follows their first dot


class TarShards(Source):
    """The images of tar files, shard after shard in the order of the members.

    The image is the member ending in .jpg, .png, .webp etc., the label the integer in the member ending in .cls.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path", keys: Keys = USUAL, split: Split = TRAIN):
        """`keys`: endings as "seg.png" and "cls"; for labels also a field of JSON members, as in "json.label"."""
        self.path = os.fspath(path)
        self._shards = list_shards(path, (".tar",), field, split)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(lambda shard: _load_index(shard, field, keys), self._shards))
        self._ends = np.cumsum([len(index.starts) for index in indices])
        self._index = Index(*(np.concatenate(parts) for parts in zip(*indices, strict=True)))
        self._key_ends = np.cumsum(self._index.lengths)
        self._check_members(field, keys)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | np.integer) -> dict:
        shard = self._shard(index)
        start, size, label = (int(values[index]) for values in self._index[:3])
        if size > MAX_BYTES:
            raise ImageError(f"{size} bytes exceed the limit of {MAX_BYTES} bytes for an encoded image")
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

    def _check_members(self, field: str, keys: Keys) -> None:
        """Logs which members are used; DataError without images, or without the labels that `label_key` names."""
        endings = collections.Counter()
        for line in bytes(self._index.endings).splitlines():
            endings.update(json.loads(line))
        listed = ", ".join(f"{ending} ({number})" for ending, number in endings.most_common(10)) or "none"
        if not len(self):
            expected = f".{keys.image}" if keys.image else ", ".join(SUFFIXES)
            problem = f"no member of these tar files ends in {expected}; the endings are {listed}"
            raise DataError(problem, field="data.image_key" if keys.image else field, value=keys.image or self.path)
        labels = self._index.labels
        used = f"{int((labels >= 0).sum())} of {len(self)} images have an integer label in .{keys.label or 'cls'}"
        if keys.label and ((labels == _DAMAGED).any() or labels.max() < 0):
            raise DataError(f"{used}; the endings are {listed}", field="data.label_key", value=keys.label)
        labels[labels == _DAMAGED] = -1
        images = sum(number for ending, number in endings.items() if f".{ending}".endswith(SUFFIXES))
        warn = labels.min() < 0 and endings.total() > images  # not for images without anything else
        _log.log(logging.WARNING if warn else logging.INFO, "%r: %s; the endings are %s", self.path, used, listed)
        if not keys.image and images > len(self):
            problem = "%r: %d images belong to samples with another image and are not used; see data.image_key"
            _log.warning(problem, self.path, images - len(self))

    def _shard(self, index: int | np.integer) -> str:
        return self._shards[locate(self._ends, index)[0]]

    def __repr__(self) -> str:
        return f"TarShards({self.path!r}, shards={len(self._shards)}, images={len(self)})"


def _load_index(shard: str, field: str, keys: Keys) -> Index:
    """Returns the cached index of a shard, or a new one if the shard has changed."""
    try:
        # Not every kind of bucket reports modification times: remote shards are identified by name and size.
        identity = shard if storage.is_remote(shard) else f"{os.path.abspath(shard)} {os.stat(shard).st_mtime_ns}"
        identity = f"{_INDEX_VERSION} {tuple(keys)} {identity} {storage.file_size(shard)}"
    except OSError as error:
        raise DataError(f"a shard cannot be read: {error}", field=field) from error
    file = runtime.cache_folder() / "tar" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Index(**arrays)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        index = _build_index(shard, field, keys)
    try:
        arrays = io.BytesIO()
        np.savez(arrays, **index._asdict())
        storage.write_bytes(file, arrays.getvalue())
    except OSError:  # on a full or read-only disk the next start indexes the shard again
        pass
    return index


def _build_index(shard: str, field: str, keys: Keys) -> Index:
    images, labels, endings = {}, {}, collections.Counter()
    image_ends, label_key = (f".{keys.image.lower()}",) if keys.image else SUFFIXES, keys.label or "cls"
    label_end, json_field = (".json", label_key[5:]) if label_key.startswith("json.") else (f".{label_key}", None)
    try:
        with storage.open_file(shard) as file, tarfile.open(None, "r:", file) as tar:
            while member := tar.next():
                tar.members.clear()  # tarfile keeps all headers otherwise
                name = member.name.rpartition("/")[2]
                if not member.isreg() or member.issparse() or name.startswith("."):  # a hidden file
                    continue
                ending = name.partition(".")[2].lower()
                endings[ending if len(endings) < _MAX_ENDINGS else ending.rpartition(".")[2]] += 1
                if end := next((end for end in image_ends if f".{ending}".endswith(end)), None):
                    images.setdefault(member.name[: -len(end)], (member.offset_data, member.size))
                elif name.endswith(label_end) and member.size <= _MAX_LABEL_BYTES:
                    content = tar.extractfile(member).read()
                    labels[member.name.removesuffix(label_end)] = _parse_label(content, json_field)
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        problem = f"{shard!r} is not a complete, uncompressed tar file ({error}); copy it again or unpack it (gunzip)"
        raise DataError(problem, field=field) from error
    samples = {key: _sample(key) for key in images}
    images = {key: image for key, image in images.items() if samples[key] == key or samples[key] not in images}
    positions = np.array(list(images.values()), np.int64).reshape(-1, 2)
    names = [key.removeprefix("./").lstrip("/").encode(errors="surrogateescape") for key in images]
    return Index(
        positions[:, 0],
        positions[:, 1],
        np.array([labels.get(key, labels.get(samples[key], -1)) for key in images], np.int64),
        np.array([len(name) for name in names], np.int64),
        np.frombuffer(b"".join(names), np.uint8),
        np.frombuffer(json.dumps(endings).encode() + b"\n", np.uint8),
    )


def _sample(key: str) -> str:
    """Returns the key up to the first dot of its last part, which is that of WebDataset."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _check_end(file: Any, offset: int) -> None:
    """Raises ReadError unless zeros end the archive: tarfile also ends it at a cut or damaged header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        problem = "cut short" if len(block) < tarfile.BLOCKSIZE else "damaged"
        raise tarfile.ReadError(f"{problem} at byte {offset}: expected a header or the zeros at the end")


def _parse_label(content: bytes, json_field: str | None) -> int:
    try:
        label = json.loads(content)[json_field] if json_field else int(content)
    except (ValueError, TypeError, KeyError, RecursionError):
        return _DAMAGED
    return label if isinstance(label, int) and -1 <= label < 2**31 else _DAMAGED
