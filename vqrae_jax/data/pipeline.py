"""The data section of a config -> batches of uint8 images, for training without end and for evaluation in order."""

import functools
import math

from vqrae_jax.data.errors import DataError
from vqrae_jax.data.images import center_crop, flip, random_crop
from vqrae_jax.data.readable import Masked, Replaced, Skipped


def train_batches(data, *, seed: int, process_index: int = 0, process_count: int = 1, skipped: Skipped | None = None):
    """This process's part of the training batches, without end.

    Epochs are shuffled anew. Which images make up global batch k, and how each is cropped and flipped, depends on
    `seed` and k alone, their order too: neither the number of processes, threads or workers nor a restart changes it.
    Process i has the i-th of process_count equal parts of each batch.

    Args:
      data: a `config.DataConfig`.
      seed: of the order and the crops.
      skipped: counts the images that cannot be read; each is replaced by the next readable one.

    Returns:
      An iterator over {"image": uint8 [b, S, S, 3], "label": int32 [b]} with b = batch_size / process_count and
      S = image_size; label -1 where there is none. `get_state()` gives a JSON-able state, `set_state` takes it back in
      an iterator with the same number of workers. Call `close()` when workers are used.

    Raises:
      DataError: here for a config that cannot run, while iterating for data of which a long run cannot be read.
    """
    import grain
    from absl import flags

    local = _local("batch_size", data.batch_size, process_count)
    _check_crop(data)
    source = _training_source(data)
    if len(source) < data.batch_size:
        raise DataError(
            f"data.batch_size={data.batch_size} exceeds the {len(source)} training images of {source!r}: "
            "lower it or give more images"
        )
    sampled = data.crop == "random" and tuple(data.scale) != (1.0, 1.0)
    side = math.ceil(data.image_size * (data.resize if data.crop == "random" else 1))
    images = Replaced(source, Skipped() if skipped is None else skipped, at_least=None if sampled else side)
    transform = functools.partial(
        _augment, size=data.image_size, crop=data.crop, resize=data.resize, scale=data.scale, mirror=data.flip
    )
    batches = (
        grain.MapDataset.source(images)
        .seed(seed % 2**32)
        .shuffle()
        .random_map(transform)
        .repeat()
        .batch(local, drop_remainder=True)[process_index::process_count]
    )
    # Whole batches are what workers deal in, or else their number would decide what a batch holds.
    batches = batches.to_iter_dataset(_read_options(grain, data))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read flags, which nobody parses in a notebook
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    return iter(batches)


class EvaluationBatches:
    """Batches of the validation images in order, as often as they are asked for.

    Each is {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": bool [b]}. The mask is False where there is no
    image: past the end of the data, and in place of an image that cannot be read (`skipped` counts those met so far).
    Process i has the i-th of process_count equal parts of each batch, and every process has the same number of batches.
    """

    def __init__(self, images: Masked, skipped: Skipped, count: int, local: int, place: slice, data):
        self.skipped = skipped
        self.count = count  # images over all processes, those that cannot be read included
        self._images, self._local, self._place, self._data = images, local, place, data

    def __len__(self) -> int:
        return len(self._images) // (self._local * self._place.step)

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
    source = _evaluation_source(data)
    if source is None:
        return None
    count = len(source) if limit is None else min(limit, len(source))
    length = math.ceil(count / data.eval_batch_size) * data.eval_batch_size
    skipped = Skipped()
    images = Masked(source, skipped, data.image_size, count, length)
    return EvaluationBatches(images, skipped, count, local, slice(process_index, None, process_count), data)


def _augment(record, rng, *, size, crop, resize, scale, mirror):
    image = record["image"]
    image = random_crop(image, size, rng, resize, scale) if crop == "random" else center_crop(image, size)
    if mirror and rng.random() < 0.5:
        image = flip(image)
    return {"image": image, "label": record["label"]}


def _training_source(data):
    if data.source == "photographs":
        from vqrae_jax.data.photographs import TrainingPhotographs

        return TrainingPhotographs()
    if data.source == "folder":
        from vqrae_jax.data.folder import Folder

        if not data.path:
            raise DataError("data.path is not set: data.source='folder' needs a folder of training images")
        return Folder(data.path)
    from vqrae_jax.data.tfds_source import Prepared

    return Prepared(data.name, data.path, data.train_split, "data.train_split")


def _evaluation_source(data):
    if data.source == "photographs":
        from vqrae_jax.data.photographs import ValidationPhotographs

        return ValidationPhotographs(data.image_size)
    if data.source == "folder":
        from vqrae_jax.data.folder import Folder

        return Folder(data.eval_path, "data.eval_path") if data.eval_path else None
    from vqrae_jax.data.tfds_source import Prepared

    return Prepared(data.name, data.path, data.eval_split, "data.eval_split") if data.eval_split else None


def _local(field, size, process_count):
    if size % process_count:
        raise DataError(
            f"data.{field}={size} is not divisible by the {process_count} processes of this run: "
            f"take {max(1, size // process_count) * process_count}"
        )
    return size // process_count


def _check_crop(data):
    if tuple(data.scale) != (1.0, 1.0) and data.resize != 1.0:
        raise DataError(
            f"data.resize={data.resize} and data.scale={tuple(data.scale)} exclude each other: scale cuts "
            "from the source pixels; leave one of them at 1"
        )


def _read_options(grain, data):
    # In batches: one being made by each thread, one waiting.
    return grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads + 1)
