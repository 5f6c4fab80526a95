"""Random access to TFRecord files without TensorFlow.

A file is a sequence of records, each framed as: length (uint64, little-endian), checksum of the length (4 bytes), the
data, checksum of the data (4 bytes). There is no index, so one is made by walking over the lengths when a file is first
read. Checksums are not verified: a damaged picture shows when it is decoded.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vqrae_jax.data import files
from vqrae_jax.errors import ImageError

_LENGTH = struct.Struct("<Q")
_HEADER, _FOOTER = 12, 4  # bytes around the data


class Part(NamedTuple):
    """Records [skip, skip + take) of a file."""

    path: str
    skip: int
    take: int


class TFRecords:
    """The records of several file parts, one after another, as bytes."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([part.take for part in self._parts])
        self._offsets = {}  # of a file: where its records start, and its end; filled as files are first read

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, index: int) -> bytes:
        """
        Raises:
          ImageError: the file is cut short or not a TFRecord file.
          OSError: it is missing or may not be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        record = part.skip + index - (int(self._ends[number]) - part.take)
        if part.path not in self._offsets:
            self._offsets[part.path] = _record_offsets(part.path)
        offsets = self._offsets[part.path]
        if record >= len(offsets) - 1:
            raise ImageError(
                f"{part.path!r} is cut short: it has {len(offsets) - 1} whole records, not number {record}"
            )
        start, end = int(offsets[record]), int(offsets[record + 1])
        return files.read(part.path, start + _HEADER, end - _FOOTER)


def _record_offsets(path):
    """Byte offsets of the whole records of a file, then where the last one ends: int64 [records + 1]."""
    size = files.size(path)
    offsets = [0]
    with files.opened(path) as file:
        while offsets[-1] + _HEADER + _FOOTER <= size:
            file.seek(offsets[-1])
            end = offsets[-1] + _HEADER + _LENGTH.unpack(file.read(_LENGTH.size))[0] + _FOOTER
            if end > size:
                break
            offsets.append(end)
    return np.array(offsets, np.int64)
