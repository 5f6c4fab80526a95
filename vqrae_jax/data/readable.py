"""Around a source: decoding, and what happens to records that cannot be decoded."""

import json
import logging
import time
from collections.abc import Callable

import numpy as np

from vqrae_jax.data.images import center_crop, read_picture
from vqrae_jax.errors import DataError, ImageError

_LONGEST_RUN = 100  # unreadable neighbours after which the data, not a file, is at fault
_PAUSES = (0.3, 1.0, 3.0)  # seconds, before what a disk or bucket does not give is asked for again
_NAMED = 5  # unreadable records warned of one by one
_REASON = 200  # characters kept of why

_log = logging.getLogger(__name__)


class Skipped:
    """Counts the unreadable records of one source, each once, and warns of the first few by name."""

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

    def add(self, index: int, name: str, reason: Exception | str) -> None:
        before = self.count
        self._names.setdefault(index, name)
        if before == self.count:
            return
        if before < _NAMED:
            _log.warning("skipped %s: %s", name, reason)
        elif before == _NAMED:
            _log.warning("further unreadable images are skipped and counted without a warning")


class Replaced:
    """Decoded records of `source`; one that cannot be read gives way to the next that can.

    So every index has a picture, and the same one each time: batches keep their shape and a resumed run its order.
    A record tells which it stands in for, so that whoever takes the batches can count them, in whatever process they
    were read. Training goes on without what a disk or bucket does not give, as without what is damaged.
    """

    def __init__(self, source, at_least: int | None = None):
        """`at_least`: pixels of the short side that a JPEG keeps, see `images.read_image`."""
        self._source, self._at_least = source, at_least
        self._unreadable = {}  # index -> reason, of those met in this process

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """{"image": PIL image or uint8 [H, W, 3], "label": int32, "unreadable": JSON [[index, reason], ...] or ""}.

        Raises:
          DataError: no readable record among the next hundred.
        """
        tries, passed = min(_LONGEST_RUN, len(self)), []
        for at in (number % len(self) for number in range(index, index + tries)):
            if at not in self._unreadable:
                try:
                    record = _decoded(self._source, at, self._at_least)
                    return record | {"unreadable": np.str_(json.dumps(passed) if passed else "")}
                except (OSError, ImageError) as error:
                    self._unreadable[at] = str(error)[:_REASON]
            passed.append([at, self._unreadable[at]])
        raise DataError(
            f"data.path: {tries} images in a row cannot be read, the first of them {self._source.name(index)}: "
            f"{self._unreadable[index]}; check {self._source!r}"
        )

    def __repr__(self) -> str:
        return f"Replaced({self._source!r})"


def tell(unreadable: np.ndarray, source, skipped: Skipped) -> None:
    """Adds what the records of a batch stand in for, `unreadable` [b] as `Replaced` gives it, to `skipped`."""
    for text in unreadable[unreadable != ""]:
        for index, reason in json.loads(str(text)):
            skipped.add(index, source.name(index), reason)


class Masked:
    """Crops of `source`, in order, up to a length of your choice.

    What is damaged or missing, or lies beyond the source, is black and has mask False. Figures and codes must not be
    those of fewer images because a disk or bucket failed for a while: that is an error.
    """

    def __init__(self, source, skipped: Skipped, size: int, count: int, length: int, crop: Callable = center_crop):
        """
        Args:
          count: records of `source` that take part.
          length: of this source, at least `count`.
          crop: (uint8 [H, W, 3], size) -> uint8 [..., size, size, 3].
        """
        self._source, self._skipped, self._crop, self._size = source, skipped, crop, size
        self._count, self._length = count, length
        self._run = 0  # images without one that could be read; that threads may lose a count does no harm

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 [size, size, 3] or as `crop` gives it, "label": int32, "mask": bool}.

        Raises:
          DataError: a disk or bucket does not give it, or a hundred in a row are damaged or missing.
        """
        if index < self._count and index not in self._skipped:
            try:
                record = _decoded(self._source, index, None)
                image = self._crop(np.asarray(record["image"]), self._size)
                self._run = 0
                return {"image": image, "label": record["label"], "mask": np.bool_(True)}
            except ImageError as error:
                self._skip(index, error)
            except OSError as error:
                raise DataError(
                    f"data.eval_path: {self._source.name(index)} cannot be read ({type(error).__name__}: "
                    f"{str(error)[:_REASON]}), asked {len(_PAUSES) + 1} times; check the disk or bucket and the rights "
                    "to read it, and run the same command again"
                ) from error
        black = np.zeros_like(self._crop(np.zeros((self._size, self._size, 3), np.uint8), self._size))
        return {"image": black, "label": np.int32(-1), "mask": np.bool_(False)}

    def _skip(self, index: int, error: ImageError) -> None:
        self._skipped.add(index, self._source.name(index), error)
        self._run += 1
        if self._run >= _LONGEST_RUN:
            raise DataError(
                f"data.eval_path: {self._run} images in a row are damaged or missing, the last of them "
                f"{self._source.name(index)}: {str(error)[:_REASON]}; check {self._source!r}"
            )

    def __repr__(self) -> str:
        return f"Masked({self._source!r}, size={self._size}, count={self._count}, length={self._length})"


def _decoded(source, index, at_least):
    record = _fetched(source, index)
    image = record["image"]
    if not isinstance(image, np.ndarray):
        image = read_picture(image, at_least)
    return {"image": image, "label": np.int32(record["label"])}


def _fetched(source, index):
    """The record; what a disk or bucket does not give is asked for a few times."""
    for pause in _PAUSES:
        try:
            return source[index]
        except OSError as error:
            _log.info("%s: %s; asked again in %s s", source.name(index), error, pause)
            time.sleep(pause)
    return source[index]
