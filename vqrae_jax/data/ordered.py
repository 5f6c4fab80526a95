"""Every image of a source once, in order, in one or several views: for tokenizing."""

import numpy as np

from vqrae_jax.data.images import center_crop, flip, ten_crop
from vqrae_jax.data.readable import Masked, Skipped

VIEWS = {
    "one": lambda image, size: center_crop(image, size)[None],
    "flip": lambda image, size: np.stack([center_crop(image, size), flip(center_crop(image, size))]),
    "ten-crop": ten_crop,
}


class _Batches:
    """Batches of consecutive records, as a random access source."""

    def __init__(self, records, starts: list[int], size: int):
        self._records, self._starts, self._size = records, starts, size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        start = self._starts[index]
        records = [self._records[start + i] for i in range(self._size)]
        return {name: np.stack([record[name] for record in records]) for name in records[0]} | {"first": start}


def ordered_batches(source, starts: list[int], size: int, image_size: int, views: str, threads: int, skipped: Skipped):
    """Batches of the images [start, start + size) of a source for each of `starts`, read ahead by threads.

    Args:
      source: of `sources.evaluation_source`.
      views: a name in VIEWS: the central crop, also mirrored, or the ten of `images.ten_crop`.
      skipped: counts the images that cannot be read.

    Returns:
      An iterator over {"image": uint8 [size, views, S, S, 3], "label": int32 [size], "mask": bool [size], "first":
      start}; the mask is False, and the image black, where there is none or it cannot be read.
    """
    import grain

    records = Masked(source, skipped, image_size, len(source), len(source) + size, VIEWS[views])
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(grain.MapDataset.source(_Batches(records, starts, size)).to_iter_dataset(options))
