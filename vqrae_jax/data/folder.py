"""A folder of image files as a random access source."""

import os

import numpy as np

from vqrae_jax.data import files
from vqrae_jax.data.images import image_files
from vqrae_jax.errors import ImageError


class Folder:
    """Images below a folder, here or in a bucket, read when asked for.

    A record is {"image": encoded bytes, "label": int}: the label counts the top-level subfolders that hold images, in
    sorted order; an image directly in the folder has -1.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path"):
        """
        Raises:
          DataError: naming `field`, for a folder that is missing, a file, or without images.
        """
        self.path = os.fspath(path)
        start = len(os.path.join(self.path, ""))
        found = [os.fsencode(file[start:]) for file in image_files(self.path, field)]
        self.classes = sorted(map(os.fsdecode, set(map(_top, found)) - {None}))
        numbers = {None: -1} | {os.fsencode(name): number for number, name in enumerate(self.classes)}
        # In one piece each: as objects, ten million names would be gigabytes, in every worker process again.
        self._labels = np.fromiter((numbers[_top(file)] for file in found), np.int32, len(found))
        self._ends = np.cumsum(np.fromiter(map(len, found), np.int64, len(found)))
        self._names = b"".join(found)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
          ImageError: the file has gone.
          OSError: it may not be read.
        """
        path = self._file(index)
        try:
            return {"image": files.read(path), "label": int(self._labels[index])}
        except FileNotFoundError as error:
            raise ImageError(f"{path!r} is not there any more") from error

    def key(self, index: int) -> str:
        """The file, relative to the folder; bytes of its name that are no UTF-8 as in caf\\xe9.png."""
        return self._name(index).replace(os.fsencode(os.sep), b"/").decode(errors="backslashreplace")

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return repr(self._file(index))

    def _file(self, index):
        return os.path.join(self.path, os.fsdecode(self._name(index)))

    def _name(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]]

    def __repr__(self) -> str:
        return f"Folder({self.path!r}, images={len(self)}, classes={len(self.classes)})"


def _top(file):
    """The first folder of a relative path; None of a file that is in none."""
    folder, inside, _ = file.partition(os.fsencode(os.sep))
    return folder if inside else None
