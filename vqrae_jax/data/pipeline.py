"""The data section of a config -> batches of uint8 images, for training without end and for evaluation in order."""

import functools
import math

import numpy as np

from vqrae_jax.data import sources
from vqrae_jax.data.images import adm_center_crop, adm_random_crop, center_crop, flip, random_crop
from vqrae_jax.data.readable import Masked, Replaced, Skipped, tell
from vqrae_jax.errors import ConfigError, DataError


def train_batches(data, *, seed: int, process_index: int = 0, process_count: int = 1, skipped: Skipped | None = None):
    """This process's part of the training batches, without end.

    Epochs are shuffled anew, each image once in each. Which images make up global batch k, in which order, and how
    each is cropped and flipped, depends on `seed` and k alone: neither the number of processes, threads or workers nor
    a restart changes it. Process i has images [i * b, (i + 1) * b) of every global batch, b = batch_size /
    process_count, so that the processes' parts one after another are the batch of a single process.

    Args:
      data: a `config.DataConfig`.
      seed: of the order and the crops.
      skipped: counts the images that cannot be read; each is replaced by the next readable one.

    Returns:
      `TrainBatches`: an iterator over {"image": uint8 [b, S, S, 3], "label": int32 [b]} with S = image_size; label -1
      where there is none.

    Raises:
      DataError: here for a config that cannot run, while iterating for data of which a long run cannot be read.
    """
    import grain

    _local("batch_size", data.batch_size, process_count)
    _check_crop(data)
    source = sources.training_source(data)
    if len(source) < data.batch_size:
        raise DataError(
            f"data.batch_size={data.batch_size} exceeds the {len(source)} training images of {source!r}: "
            "lower it or give more images"
        )
    images = (
        grain.MapDataset.source(Replaced(source, _at_least(data)))
        .seed(seed % 2**32)
        .shuffle()
        .random_map(functools.partial(_augment, data=data))
        .repeat()
    )
    skipped = Skipped() if skipped is None else skipped
    return TrainBatches(images, source, skipped, data, process_index, process_count)


def count_training_images(data) -> int:
    """How many there are, those that cannot be read included."""
    return len(sources.training_source(data))


class TrainBatches:
    """An iterator whose whole state is one number, the images that all processes together have been given.

    `get_state()` gives it, JSON-able, and `set_state` takes it back, under any number of processes, threads and workers
    and any batch size. Threads and workers start with the first batch; `close()` ends them.
    """

    def __init__(self, images, source, skipped: Skipped, data, process_index: int, process_count: int):
        self._images, self._source, self._skipped, self._data = images, source, skipped, data
        self._place = slice(process_index, None, process_count)
        self._position, self._iterator = 0, None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._iterator = iter(self._from_position())
        batch = next(self._iterator)
        tell(batch.pop("unreadable"), self._source, self._skipped)
        self._position += self._data.batch_size
        return batch

    def get_state(self) -> dict:
        return {"images": self._position}

    def set_state(self, state: dict) -> None:
        """
        Raises:
          DataError: a state that `get_state` has not given.
        """
        position = state.get("images") if isinstance(state, dict) else None
        if not isinstance(position, int) or position < 0:
            raise DataError(
                f"the checkpoint says of its input {state!r}, expected the number of images seen, as in "
                "{'images': 25600}: it was written by another version; resume with that one"
            )
        self.close()
        self._position = position

    def listing(self) -> dict[str, int | str]:
        """How many images there are and a hash of their names: two processes with the same have the same images."""
        return _listing(self._source, len(self._source))

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _from_position(self):
        import grain
        from absl import flags

        local = self._data.batch_size // self._place.step
        batches = self._images[self._position :].batch(local, drop_remainder=True)[self._place]
        # Whole batches are what workers deal in, or else their number would decide what a batch holds.
        batches = batches.to_iter_dataset(_read_options(grain, self._data))
        if not self._data.workers:
            return batches
        if not flags.FLAGS.is_parsed():  # grain's workers read flags, which nobody parses in a notebook
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._data.workers))


class EvaluationBatches:
    """Batches of the validation images in order, as often as they are asked for.

    Each is {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": bool [b]}. The mask is False where there is no
    image: past the end of the data, and in place of an image that cannot be read (`skipped` counts those met so far).
    Process i has images [i * b, (i + 1) * b) of each global batch, and every process has the same number of batches.
    """

    def __init__(self, images: Masked, source, skipped: Skipped, count: int, local: int, place: slice, data):
        self.skipped = skipped
        self.count = count  # images over all processes, those that cannot be read included
        self._images, self._source, self._local, self._place, self._data = images, source, local, place, data

    def __len__(self) -> int:
        return len(self._images) // (self._local * self._place.step)

    def __repr__(self) -> str:
        return repr(self._images)

    def picture(self, index: int):
        """Image `index` of the data as the batches have it, uint8 [S, S, 3]; on any process."""
        return self._images[index]["image"]

    def listing(self) -> dict[str, int | str]:
        """As that of `TrainBatches`."""
        return _listing(self._source, self.count)

    def __iter__(self):
        import grain

        batches = grain.MapDataset.source(self._images).batch(self._local, drop_remainder=True)[self._place]
        return iter(batches.to_iter_dataset(_read_options(grain, self._data)))


def evaluation_batches(
    data, *, process_index: int = 0, process_count: int = 1, limit: int | None = None
) -> EvaluationBatches | None:
    """This process's part of the validation batches; None when the config names no validation images.

    Args:
      data: a `config.DataConfig`.
      limit: how many images to use, the first ones; None: all.

    Raises:
      DataError: a config that cannot run.
    """
    local = _local("eval_batch_size", data.eval_batch_size, process_count)
    source = sources.evaluation_source(data)
    if source is None:
        return None
    count = len(source) if limit is None else min(limit, len(source))
    length = math.ceil(count / data.eval_batch_size) * data.eval_batch_size
    skipped = Skipped()
    crop = {"center": center_crop, "adm": adm_center_crop}[data.eval_crop]
    images = Masked(source, skipped, data.image_size, count, length, crop)
    return EvaluationBatches(images, source, skipped, count, local, slice(process_index, None, process_count), data)


def _listing(source, images):
    return {"images": images, "names": sources.listing(source, images)}


def _augment(record, rng, *, data):
    image, size = record["image"], data.image_size
    if data.crop == "random":
        image = random_crop(image, size, rng, data.resize, data.scale)
    elif data.crop == "adm":
        image = adm_random_crop(image, size, rng)
    else:
        image = center_crop(image, size)
    if data.flip and rng.random() < 0.5:
        image = flip(image)
    return record | {"image": np.asarray(image)}


def _at_least(data):
    """Pixels of the short side that a JPEG has to keep for the crop; None: all of them."""
    if data.crop == "adm" or (data.crop == "random" and tuple(data.scale) != (1.0, 1.0)):
        return None
    return math.ceil(data.image_size * (data.resize if data.crop == "random" else 1))


def _local(field, size, process_count):
    if size % process_count:
        raise ConfigError(
            f"data.{field}={size} is not divisible by the {process_count} processes of this run: "
            f"take {max(1, size // process_count) * process_count}"
        )
    return size // process_count


def _check_crop(data):
    if tuple(data.scale) != (1.0, 1.0) and data.resize != 1.0:
        raise ConfigError(
            f"data.resize={data.resize} and data.scale={tuple(data.scale)} exclude each other: scale cuts "
            "from the source pixels; leave one of them at 1"
        )


def _read_options(grain, data):
    # In batches: one being made by each thread, one waiting.
    return grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads + 1)
