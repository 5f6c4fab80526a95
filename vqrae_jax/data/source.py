"""The interface of image sources."""

import copy
import hashlib
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vqrae_jax import storage
from vqrae_jax.errors import DataError, ImageError

MAX_PIXELS = 64_000_000  # of an image, by default; decoding and converting take up to 8 bytes for each, see docs

_log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """The members, columns or features that hold images and labels; None: the usual ones of the format."""

    image: str | None = None
    label: str | None = None


USUAL = Keys()


class Source:
    """Images in random access.

    Subclasses are built from a path (see `list_shards`) and the config field or argument that it comes from. Without
    images, or with damaged files, they raise a DataError that names the field.

    `source[index]` returns {"image": encoded bytes or uint8 [H, W, 3], "label": int}, with label -1 without one.
    It raises ImageError for a damaged or missing image and OSError if the disk or bucket fails. `len(source)` includes
    those images; `source.name(index)` describes one in messages.

    Attributes:
      classes: the names of labels 0, 1, ...; None if they are not known.
      max_pixels: larger images are refused when they are decoded.
    """

    classes: tuple[str, ...] | None = None
    max_pixels = MAX_PIXELS

    def limited(self, max_pixels: int) -> "Source":
        """Returns the same source with another `max_pixels`."""
        source = copy.copy(self)
        source.max_pixels = max_pixels
        return source

    def key(self, index: int) -> str:
        """Returns the id of a record: its number if it has no name."""
        return str(index)

    def fingerprint(self, count: int) -> bytes:
        """Returns what identifies the first `count` records apart from their keys, without reading them."""
        return b""

    def listing(self, count: int, samples: int | None = None) -> dict[str, int | str]:
        """Returns the number of the first records and the SHA-256 of their keys, in order, and their fingerprint.

        With `samples`, at most that number of keys enter the hash, evenly spaced.
        """
        digest, samples = hashlib.sha256(), count if samples is None else min(samples, count)
        for index in np.linspace(0, count - 1, samples, dtype=int).tolist():
            digest.update(f"{self.key(index)}\n".encode())
        digest.update(self.fingerprint(count))
        return {"images": count, "names": digest.hexdigest()}


def select_columns(
    source: str, kinds: Mapping[str, str], images: list[str], integers: list[str], labels: list[str], keys: Keys,
    field: str,
) -> tuple[str, str | None]:  # fmt: skip
    """Returns the names of the columns of images and of labels (None if there are no labels), and logs them.

    The image is the column "image" or the only one of `images`; the label is "label" or the only one of `labels`.

    Args:
      source: what has the columns, for messages.
      kinds: the types of all columns by their names, for messages.
      images, integers, labels: names of the columns that hold images, integers, and numbers of classes.
      keys: other columns to use.
      field: config field or argument that `source` comes from.
    """
    listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    for kind, key, accepted in (("image", keys.image, images), ("label", keys.label, integers)):
        if key and key not in accepted:
            problem = f"not among the {kind}s ({', '.join(accepted)}) of {source}; all columns are {listed}"
            raise DataError(problem, field=f"data.{kind}_key", value=key)
    if not keys.image and "image" not in images and len(images) != 1:
        none = "no column of encoded images (paths are not followed)"
        problem = "several columns of images, none of them called image" if images else none
        raise DataError(f"{source} has {problem}; its columns are {listed}", field=field)
    image = keys.image or ("image" if "image" in images else images[0])
    label = keys.label or ("label" if "label" in integers else labels[0] if len(labels) == 1 else None)
    level = logging.INFO if label or len(kinds) == 1 else logging.WARNING
    _log.log(level, "%s: images are %s, labels %s; the columns are %s", source, image, label, listed)
    return image, label


def locate(ends: Int[np.ndarray, " groups"], index: int | np.integer) -> tuple[int, int]:
    """Returns the group (file or row group) of a record and its row there; group i ends before record `ends[i]`."""
    total = int(ends[-1]) if len(ends) else 0
    if not 0 <= index < total:
        raise IndexError(f"record {index} of {total}")
    group = int(np.searchsorted(ends, index, side="right"))
    return group, int(index) - (int(ends[group - 1]) if group else 0)


def read_range(path: str, start: int, end: int) -> bytes:
    """Reads bytes [start, end) of a file; ImageError if it ends earlier."""
    data = storage.read_bytes(path, start, end)
    if len(data) != end - start:
        raise ImageError(f"{path!r} is cut short: it ends before byte {end}")
    return data
