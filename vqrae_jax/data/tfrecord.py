"""Random access to TFRecord files without TensorFlow.

A record is its length (uint64, little-endian), a checksum of the length (4 bytes), the data, and a checksum of the data
(4 bytes). The lengths of a file are read once, at its first record. Checksums are not verified, because a damaged image
fails to decode.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.source import locate, read_range
from vqrae_jax.errors import ImageError

_LENGTH = struct.Struct("<Q")
_HEADER, _FOOTER = 12, 4  # bytes before and after the data


class Part(NamedTuple):
    """Records [skip, skip + take) of a file."""

    path: str
    skip: int
    take: int


class TFRecords:
    """The records of several parts of files, one after another, as bytes."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([part.take for part in self._parts], dtype=np.int64)
        self._offsets = {}  # path -> byte offset of each record, and the end of the last one

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, index: int | np.integer) -> bytes:
        """
        Raises:
          ImageError: the file is cut short or not a TFRecord file.
          OSError: the file is missing or not readable.
        """
        number, record = locate(self._ends, index)
        path, record = self._parts[number].path, record + self._parts[number].skip
        if path not in self._offsets:
            self._offsets[path] = _record_offsets(path)
        offsets = self._offsets[path]
        if record >= len(offsets) - 1:
            raise ImageError(f"{path!r} is cut short: it has {len(offsets) - 1} whole records, not number {record}")
        return read_range(path, int(offsets[record]) + _HEADER, int(offsets[record + 1]) - _FOOTER)


def _record_offsets(path: str) -> np.ndarray:
    """Returns the byte offset of each whole record, and the end of the last one: int64 [records + 1]."""
    size, offsets = storage.file_size(path), [0]
    with storage.open_file(path) as file:
        while offsets[-1] + _HEADER + _FOOTER <= size:
            file.seek(offsets[-1])
            end = offsets[-1] + _HEADER + _LENGTH.unpack(file.read(_LENGTH.size))[0] + _FOOTER
            if end > size:
                break
            offsets.append(end)
    return np.array(offsets, np.int64)
