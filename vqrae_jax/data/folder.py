"""Folders of image files, local or in buckets."""

import collections
import logging
import os
from collections.abc import Sequence

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.images import MAX_BYTES, SUFFIXES
from vqrae_jax.data.source import Source
from vqrae_jax.errors import DataError, ImageError

# Image formats that are not supported: such files are reported. Text files with notes or captions are not.
_UNSUPPORTED = (
    ".apng", ".arw", ".avifs", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpe",
    ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".psd", ".qoi", ".raw", ".rw2", ".svg", ".tga",
)  # fmt: skip

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

_log = logging.getLogger(__name__)


def list_images(folder: str | os.PathLike, field: str = "data.path") -> list[str]:
    """Lists the image files in a folder and its subfolders, folder by folder, in an order that never changes.

    Suffixes count in any case. Hidden files and folders are left out; links are followed, each folder once. Files in
    unsupported image formats are counted in a warning; a folder without images is a DataError.
    """
    folder = storage.expand_home(folder)
    files = storage.list_files(folder, field)
    ends = (os.path.splitext(path)[1].lower() for path in files if path.lower().endswith(_UNSUPPORTED))
    unsupported = collections.Counter(ends)
    files = [path for path in files if path.lower().endswith(SUFFIXES)]
    if unsupported:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(unsupported.items()))
        _log.warning("%s: skipped files in unsupported formats: %s; convert them to PNG or JPEG", folder, kinds)
    if not files:
        raise DataError(f"no images; expected files ending in {', '.join(SUFFIXES)}", field=field, value=folder)
    return sorted(files, key=lambda path: path.replace(os.sep, "\0"))  # \0 sorts before all other characters


class Folder(Source):
    """The images in a folder and its subfolders.

    The label is the number of the top-level subfolder among all of them, also those without images, in sorted order; an
    image directly in the folder has -1. If no subfolder has images, `classes` has no names.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path", classes: Sequence[str] = ()):
        """`classes`: names that have the first numbers, as those of the training images; unknown subfolders follow."""
        self.path = storage.expand_home(path)
        start = len(os.path.join(self.path, ""))
        files = [os.fsencode(file[start:]) for file in list_images(self.path, field)]
        used = set(map(os.fsdecode, set(map(_top_folder, files)) - {None}))
        names = sorted(used.union(storage.list_folders(self.path or ".", field) if used else ()))
        unknown = sorted(set(names).difference(classes))
        self.classes = (*classes, *unknown)
        _warn_folders(self.path, names, used, unknown if classes else [])
        labels = {None: -1} | {os.fsencode(name): label for label, name in enumerate(self.classes)}
        # Arrays and one bytes object: ten million strings take gigabytes, again in each worker process.
        self._labels = np.fromiter((labels[_top_folder(file)] for file in files), np.int32, len(files))
        self._ends = np.cumsum(np.fromiter(map(len, files), np.int64, len(files)))
        self._names = b"".join(files)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | np.integer) -> dict:
        path = self._file(index)
        try:
            return {"image": storage.read_bytes(path, limit=MAX_BYTES), "label": int(self._labels[index])}
        except OSError as error:
            if not storage.is_unusable(error):
                raise
            raise ImageError(f"{path!r} cannot be opened: {error.strerror or error}") from error

    def key(self, index: int) -> str:
        """Returns the relative path; bytes of it that are not UTF-8 are escaped, as in caf\\xe9.png."""
        return self._relative(index).replace(os.fsencode(os.sep), b"/").decode(errors="backslashreplace")

    def name(self, index: int) -> str:
        return repr(self._file(index))

    def _file(self, index: int | np.integer) -> str:
        return os.path.join(self.path, os.fsdecode(self._relative(index)))

    def _relative(self, index: int | np.integer) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]]

    def __repr__(self) -> str:
        return f"Folder({self.path!r}, images={len(self)}, classes={len(self.classes)})"


def _warn_folders(path: str, names: list[str], used: set[str], unknown: list[str]) -> None:
    """Warns of subfolders that may not be the classes that the user has in mind."""
    splits = [name for name in names if name.lower() in _SPLITS]
    warnings = {
        "subfolders without readable images have class numbers as well": [name for name in names if name not in used],
        "subfolders that are not among the known classes have the numbers after them": unknown,
        "subfolders are classes, but these have names of splits; give the path of one of them":
            splits if len(splits) > 1 or splits == names else [],
    }  # fmt: skip
    for text, affected in warnings.items():
        if affected:
            more = f" and {len(affected) - 5} more" if len(affected) > 5 else ""
            _log.warning("%r: %s: %s%s", path, text, ", ".join(affected[:5]), more)


def _top_folder(file: bytes) -> bytes | None:
    folder, separator, _ = file.partition(os.fsencode(os.sep))
    return folder if separator else None
