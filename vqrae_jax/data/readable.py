"""Around a source: decoding, and what happens to records that cannot be decoded."""

import logging

import numpy as np

from vqrae_jax.data.errors import DataError, ImageError
from vqrae_jax.data.images import center_crop, read_image

_LONGEST_RUN = 100  # unreadable neighbours after which the data, not a file, is at fault
_NAMED = 5  # unreadable records warned of one by one

_log = logging.getLogger(__name__)


class Skipped:
    """Counts the unreadable records of one source, each once, and warns of the first few by name.

    A worker process counts in a copy of its own; its warnings reach the same standard error.
    """

    def __init__(self):
        self._names = {}

    @property
    def count(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """The first few."""
        return list(self._names.values())[:_NAMED]

    def __contains__(self, index: int) -> bool:
        return index in self._names

    def add(self, index: int, name: str, error: Exception) -> None:
        before = self.count
        self._names.setdefault(index, name)
        if before == self.count:
            return
        if before < _NAMED:
            _log.warning("skipped %s: %s", name, error)
        elif before == _NAMED:
            _log.warning("further unreadable images are skipped and counted without a warning")


class Replaced:
    """Decoded records of `source`; one that cannot be read gives way to the next that can.

    So every index has a picture, and the same one each time: batches keep their shape and a resumed run its order.
    """

    def __init__(self, source, skipped: Skipped, at_least: int | None = None):
        """`at_least`: pixels of the short side that a JPEG keeps, see `images.read_image`."""
        self._source, self._skipped, self._at_least = source, skipped, at_least

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 [H, W, 3], "label": int32}.

        Raises:
          DataError: no readable record among the next hundred.
        """
        tries = min(_LONGEST_RUN, len(self))
        for step in range(tries):
            record = _decoded(self._source, (index + step) % len(self), self._skipped, self._at_least)
            if record is not None:
                return record
        raise DataError(
            f"data.path: {tries} images in a row cannot be read, the first of them "
            f"{self._source.name(index)}; check {self._source!r}"
        )

    def __repr__(self) -> str:
        return f"Replaced({self._source!r})"


class Masked:
    """Centre crops of `source`, in order, up to a length of your choice.

    What is missing, because it cannot be read or lies beyond the source, is black and has mask False.
    """

    def __init__(self, source, skipped: Skipped, size: int, count: int, length: int, crop=center_crop):
        """
        Args:
          count: records of `source` that take part.
          length: of this source, at least `count`.
          crop: (uint8 [H, W, 3], size) -> uint8 [..., size, size, 3].
        """
        self._source, self._skipped, self._size, self._count, self._length = source, skipped, size, count, length
        self._crop = crop

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 [size, size, 3] or as `crop` gives it, "label": int32, "mask": bool}."""
        record = _decoded(self._source, index, self._skipped, None) if index < self._count else None
        if record is None:
            black = np.zeros_like(self._crop(np.zeros((self._size, self._size, 3), np.uint8), self._size))
            return {"image": black, "label": np.int32(-1), "mask": np.bool_(False)}
        return {"image": self._crop(record["image"], self._size), "label": record["label"], "mask": np.bool_(True)}

    def __repr__(self) -> str:
        return f"Masked({self._source!r}, size={self._size}, count={self._count}, length={self._length})"


def _decoded(source, index, skipped, at_least):
    """The record with its image as an array, or None when it cannot be read."""
    if index in skipped:
        return None
    try:
        record = source[index]
        image = record["image"]
        if not isinstance(image, np.ndarray):
            image = read_image(image, at_least)
    except (OSError, ImageError) as error:
        skipped.add(index, source.name(index), error)
        return None
    return {"image": image, "label": np.int32(record["label"])}
