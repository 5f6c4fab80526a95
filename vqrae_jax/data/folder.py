"""A folder of image files as a random access source."""

import os

from vqrae_jax.data import files
from vqrae_jax.data.errors import ImageError
from vqrae_jax.data.images import image_files


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
        self._files = [file[start:] for file in image_files(self.path, field)]
        first = [file.split(os.sep, 1) for file in self._files]
        self.classes = sorted({parts[0] for parts in first if len(parts) > 1})
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = [numbers[parts[0]] if len(parts) > 1 else -1 for parts in first]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
          ImageError: the file has gone.
          OSError: it may not be read.
        """
        path = os.path.join(self.path, self._files[index])
        try:
            return {"image": files.read(path), "label": self._labels[index]}
        except FileNotFoundError as error:
            raise ImageError(f"{path!r} is not there any more") from error

    def key(self, index: int) -> str:
        """The file, relative to the folder; bytes of its name that are no UTF-8 as in caf\\xe9.png."""
        return os.fsencode(self._files[index].replace(os.sep, "/")).decode(errors="backslashreplace")

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return repr(os.path.join(self.path, self._files[index]))

    def __repr__(self) -> str:
        return f"Folder({self.path!r}, images={len(self)}, classes={len(self.classes)})"
