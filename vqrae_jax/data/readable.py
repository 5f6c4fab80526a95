"""Decoding of the images of a source; images that cannot be read are skipped, counted and named."""

import json
import logging
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from vqrae_jax.data.images import center_crop, read_pil_image
from vqrae_jax.data.source import Source
from vqrae_jax.errors import DataError, ImageError

_MAX_RUN = 100  # consecutive unreadable images after which the whole source is considered unusable
_PAUSES = (0.3, 1.0, 3.0)  # seconds before reading is tried again when the disk or bucket fails
_MAX_NAMED = 5  # unreadable images with a warning of their own
_MAX_REASON = 200  # characters of a reason

_log = logging.getLogger(__name__)


class Skipped:
    """The unreadable images of one source, each counted once; the first few are logged and listed in `names`."""

    def __init__(self):
        self._names = {}

    @property
    def count(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        return list(self._names.values())[:_MAX_NAMED]

    def __contains__(self, index: int) -> bool:
        return index in self._names

    def add(self, index: int, name: str, reason: Exception | str) -> None:
        """Counts an image, unless it is counted already."""
        if index in self._names:
            return
        self._names[index] = name
        if self.count <= _MAX_NAMED:
            _log.warning("skipped %s: %s", name, reason)
        elif self.count == _MAX_NAMED + 1:
            _log.warning("further unreadable images are skipped and counted without a warning")

    def add_replaced(self, unreadable: Shaped[np.ndarray, " b"], source: Source) -> None:
        """Counts the images that were replaced in a batch, from the records' "unreadable" of `Replaced`."""
        for text in unreadable[unreadable != ""]:
            for index, reason in json.loads(str(text)):
                self.add(index, source.name(index), reason)


class Replaced:
    """Decoded images of a source for training; the next readable image replaces an unreadable one.

    Each index always has the same image, so that batches keep their shape and resumed runs their order. A record lists
    the images that it replaces, so that the process that takes the batches can count them. Failures of the disk or
    bucket are handled as damaged images are.
    """

    def __init__(self, source: Source, min_side: int | None = None):
        """`min_side`: see `images.read_image`."""
        self._source, self._min_side = source, min_side
        self._unreadable = {}  # index -> reason; each process has its own

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """Returns {"image": PIL image or uint8 [H, W, 3], "label": int32, "unreadable": str}.

        "unreadable" is a JSON list of [index, reason] for each replaced image, or "". A hundred unreadable images in a
        row are a DataError.
        """
        tries, replaced = min(_MAX_RUN, len(self)), []
        for i in (number % len(self) for number in range(index, index + tries)):
            if i not in self._unreadable:
                try:
                    record = _decode(self._source, i, self._min_side)
                    return record | {"unreadable": np.str_(json.dumps(replaced) if replaced else "")}
                except (OSError, ImageError) as error:
                    self._unreadable[i] = str(error)[:_MAX_REASON]
            replaced.append([i, self._unreadable[i]])
        raise DataError(
            f"{tries} images in a row cannot be read, the first of them {self._source.name(index)}: "
            f"{self._unreadable[index]}; check {self._source!r}",
            field="data.path",
        )


class Masked:
    """Crops of a source's images in order, for evaluation and tokenizing; unreadable images are masked.

    Records of damaged or missing images, and those after the end of the source, are black and have mask False. A
    hundred such images in a row are a DataError, as are failures of the disk or bucket, so that metrics and codes are
    never those of fewer images.
    """

    def __init__(
        self, source: Source, skipped: Skipped, size: int, count: int, length: int, crop: Callable = center_crop
    ):
        """
        Args:
          size: side of the crops in pixels.
          count: number of images of `source` to use, the first ones.
          length: number of records, at least `count`.
          crop: (PIL image or uint8 [H, W, 3], size) -> uint8 [..., size, size, 3].
        """
        self._source, self._skipped, self._crop, self._size = source, skipped, crop, size
        self._count, self._length = count, length
        self._run = 0  # consecutive unreadable images; an approximation with several threads

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """Returns {"image": uint8 [..., size, size, 3] of `crop`, "label": int32, "mask": bool}."""
        if index < self._count and index not in self._skipped:
            try:
                record = _decode(self._source, index)
                image = np.asarray(self._crop(record["image"], self._size))
                self._run = 0
                return {"image": image, "label": record["label"], "mask": np.bool_(True)}
            except ImageError as error:
                self._skip(index, error)
            except OSError as error:
                raise DataError(
                    f"{self._source.name(index)} cannot be read ({type(error).__name__}: {str(error)[:_MAX_REASON]}) "
                    f"in {len(_PAUSES) + 1} attempts; check the disk or bucket and the permissions, then run the same "
                    "command again",
                    field="data.eval_path",
                ) from error
        black = np.zeros_like(self._crop(np.zeros((self._size, self._size, 3), np.uint8), self._size))
        return {"image": black, "label": np.int32(-1), "mask": np.bool_(False)}

    def _skip(self, index: int, error: ImageError) -> None:
        self._skipped.add(index, self._source.name(index), error)
        self._run += 1
        if self._run >= _MAX_RUN:
            raise DataError(
                f"{self._run} images in a row are damaged or missing, the last of them {self._source.name(index)}: "
                f"{str(error)[:_MAX_REASON]}; check {self._source!r}",
                field="data.eval_path",
            )

    def __repr__(self) -> str:
        return f"Masked({self._source!r}, size={self._size}, count={self._count}, length={self._length})"


def _decode(source: Source, index: int, min_side: int | None = None) -> dict:
    record = _read(source, index)
    image, label = record["image"], record["label"]
    if not -(2**31) <= label < 2**31:
        raise ImageError(f"the class number {label} has more than 32 bits")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"an array {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]")
    else:
        image = read_pil_image(image, min_side, source.max_pixels)
    return {"image": image, "label": np.int32(label)}


def _read(source: Source, index: int) -> dict:
    """Returns a record; reading is tried again when the disk or bucket fails."""
    for pause in _PAUSES:
        try:
            return source[index]
        except OSError as error:
            _log.info("%s: %s; trying again in %s s", source.name(index), error, pause)
            time.sleep(pause)
    return source[index]
