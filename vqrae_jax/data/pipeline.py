"""Batches of uint8 images or of codes: endless and shuffled for training, in order for evaluation and tokenizing."""

import functools
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vqrae_jax import storage
from vqrae_jax.data.code_source import CodeSource, FirstViews, choose_view
from vqrae_jax.data.folder import Folder
from vqrae_jax.data.images import VIEWS, adm_center_crop, adm_random_crop, center_crop, flip, random_crop
from vqrae_jax.data.parquet import Tables
from vqrae_jax.data.photographs import training_photographs, validation_photographs
from vqrae_jax.data.readable import Masked, Replaced, Skipped
from vqrae_jax.data.shards import Split
from vqrae_jax.data.source import Keys, Source
from vqrae_jax.data.tar import TarShards
from vqrae_jax.data.tfds_source import Prepared
from vqrae_jax.errors import ConfigError, DataError, UserError, import_extra

log = logging.getLogger(__name__)

SAMPLED_KEYS = 100_000  # of the training images, to notice on resuming that they changed; 0.1 s
SOURCES = {"folder": Folder, "webdataset": TarShards, "parquet": Tables, "codes": CodeSource}


def training_source(data: Any) -> Source:
    """Returns the training images of a `config.DataConfig`; raises DataError or ConfigError without any."""
    if data.source == "photographs":
        return training_photographs()
    if data.source == "tfds":
        split = data.name, data.path, data.train_split, "data.train_split"
        return Prepared(*split, **_keys(data)).limited(data.max_pixels)
    if not data.path:
        raise ConfigError(f"not set; the source {data.source!r} needs the path of training images", field="data.path")
    log.info("listing the images of %s", data.path)
    options = _keys(data) | _split(data, "train_split")
    return SOURCES[data.source](data.path, "data.path", **options).limited(data.max_pixels)


def evaluation_source(data: Any, classes: Sequence[str] | None = None) -> Source | None:
    """Returns the validation images of a `config.DataConfig`, or None.

    Class folders have the numbers that they have in the training images.

    Args:
      classes: names that have the first numbers instead.
    """
    if data.source == "photographs":
        return validation_photographs(data.image_size)
    if not (data.eval_split if data.source == "tfds" else data.eval_path):
        return None
    if data.source == "tfds":
        split = data.name, data.path, data.eval_split, "data.eval_split"
        return Prepared(*split, **_keys(data)).limited(data.max_pixels)
    options = _keys(data) | _split(data, "eval_split")
    if data.source == "folder":
        options["classes"] = classes or _training_classes(data)
    elif classes:
        problem = "has class numbers of its own; only those of folders can be set"
        raise ConfigError(problem, field="data.source", value=data.source)
    log.info("listing the images of %s", data.eval_path)
    source = SOURCES[data.source](data.eval_path, "data.eval_path", **options).limited(data.max_pixels)
    if data.source == "codes" and data.path:
        _compare_codes(data, source)
    return source


def _training_classes(data: Any) -> list[str]:
    if not data.path or data.path == data.eval_path:
        return []
    try:
        return storage.list_folders(data.path, "data.path")
    except UserError as error:  # the machine that evaluates may lack the training images
        log.warning("%s; classes have numbers of their own in data.eval_path", error)
        return []


def _compare_codes(data: Any, validation: CodeSource) -> None:
    try:
        training = training_source(data)
    except UserError as error:  # the machine that evaluates may lack the training codes
        log.warning("%s; data.eval_path is not compared with them", error)
    else:
        validation.check_same(training)


def _keys(data: Any) -> dict[str, Keys]:
    keys = Keys(data.image_key, data.label_key)
    for name, key in zip(("image_key", "label_key"), keys, strict=True):
        if key and data.source == "folder":
            raise ConfigError("is for the sources webdataset, parquet and tfds", field=f"data.{name}", value=key)
    return {"keys": keys} if any(keys) else {}


def _split(data: Any, name: str) -> dict[str, Split]:
    split = Split(getattr(data, name), data.name, f"data.{name}")
    return {"split": split} if data.source in ("webdataset", "parquet") else {}


def train_batches(
    data: Any, *, seed: int, process_index: int = 0, process_count: int = 1, skipped: Skipped | None = None
) -> "TrainBatches":
    """Returns this process's part of the training batches.

    Each epoch has a new order, with each image once. The images of global batch k, their order, crops and flips, or
    the views of their codes, depend on `seed` and k only, not on the number of processes, threads or workers, nor on
    restarts. Process i has images [i * b, (i + 1) * b) of each global batch, with b = batch_size / process_count.

    Args:
      data: a `config.DataConfig`.
      skipped: counts the images that cannot be read; each is replaced by the next readable one.
    """
    grain = _grain()
    _local_batch("batch_size", data.batch_size, process_count)
    if tuple(data.scale) != (1.0, 1.0) and data.resize != 1.0:
        problem = f"cannot be combined with scale={tuple(data.scale)}, which cuts original pixels; set one of them to 1"
        raise ConfigError(problem, field="data.resize", value=data.resize)
    source = training_source(data)
    if len(source) < data.batch_size:
        problem = f"exceeds the {len(source)} training images of {source!r}"
        raise DataError(problem, field="data.batch_size", value=data.batch_size)
    if data.source == "codes":
        records, transform = source.load(data.threads), choose_view
    else:
        records, transform = Replaced(source, _min_side(data)), functools.partial(_augment, data=data)
    images = grain.MapDataset.source(records).seed(seed % 2**32).shuffle().random_map(transform).repeat()
    return TrainBatches(images, source, skipped or Skipped(), data, process_index, process_count)


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator over {"image": uint8 [b, S, S, 3], "label": int32 [b]}, label -1 without one.

    With the source "codes", "codes", int32 [b, *view_shape], replaces "image". The state is the number of images that
    all processes together have used. It can be restored with any number of processes, threads and workers and any batch
    size. Threads and workers start with the first batch.

    Attributes:
      source: the training images or codes.
    """

    def __init__(
        self, images: Any, source: Source, skipped: Skipped, data: Any, process_index: int, process_count: int
    ):
        self._images, self.source, self._skipped, self._data = images, source, skipped, data
        self._share = slice(process_index, None, process_count)
        self._position, self._iterator = 0, None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = iter(self._from_position())
        try:
            batch = next(self._iterator)
        except RuntimeError as error:  # the only kind of grain, also for a process that was killed
            if "terminated unexpectedly" not in str(error):
                raise
            problem = "a worker process was killed, perhaps for lack of memory; run again, or use fewer workers"
            raise DataError(problem, field="data.workers", value=self._data.workers) from error
        if "unreadable" in batch:
            self._skipped.add_replaced(batch.pop("unreadable"), self.source)
        self._position += self._data.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the state, which JSON can represent, with a description of the images to compare on resuming."""
        return {"images": self._position, "listing": self._sampled_listing}

    def set_state(self, state: Any) -> None:
        """Continues from a state of `get_state`, with a warning if the images changed.

        Raises:
          DataError: it is another object.
        """
        position = state.get("images") if isinstance(state, dict) else None
        if not isinstance(position, int) or position < 0:
            raise DataError(
                f"the checkpoint has the input state {state!r}, expected one such as {{'images': 25600}}; resume with "
                "the version that wrote it"
            )
        before, now = state.get("listing"), self._sampled_listing
        if before not in (None, now):
            log.warning(
                "the training images changed: the checkpoint was saved with %s, and there are %d%s; as their order "
                "changes with them, the rest of this epoch repeats some images and leaves out others",
                before.get("images"), now["images"], " of other names" if before.get("images") == now["images"] else "",
            )  # fmt: skip
        self.close()
        self._position = position

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the labels, see `Source`."""
        return self.source.classes

    @functools.cached_property
    def _sampled_listing(self) -> dict[str, int | str]:
        return self.source.listing(len(self.source), SAMPLED_KEYS)

    def listing(self) -> dict[str, int | str]:
        """Returns the number of images and a hash of their names, to compare the images of processes."""
        return self.source.listing(len(self.source))

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _from_position(self) -> Any:
        from absl import flags

        local = self._data.batch_size // self._share.step
        batches = self._images[self._position :].batch(local, drop_remainder=True)[self._share]
        # Workers receive whole batches: otherwise their number would change which images a batch has.
        batches = batches.to_iter_dataset(_read_options(self._data.threads))
        if not self._data.workers:
            return batches
        if not flags.FLAGS.is_parsed():  # grain's workers read flags, which are not parsed in a notebook
            flags.FLAGS.mark_as_parsed()
        options = _grain().MultiprocessingOptions(num_workers=self._data.workers)
        return batches.mp_prefetch(options, worker_init_fn=_ignore_interrupts)


def _ignore_interrupts(*_: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to workers as well, to the run, which needs batches until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class EvaluationBatches:
    """Batches of the validation images in order; they can be iterated any number of times.

    A batch is {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": bool [b]}; with the source "codes", those of
    the first views, "codes", int32 [b, *view_shape], replace "image". The mask is False after the end of the data and
    for images that cannot be read. Process i has images [i * b, (i + 1) * b) of each global batch, and every process
    has the same number of batches.

    Attributes:
      source: the validation images or codes.
      skipped: counts the images that could not be read so far.
      count: number of images of all processes, including those that cannot be read.
    """

    def __init__(self, data: Any, source: Source, limit: int | None, local: int, share: slice):
        self.skipped, self.count = Skipped(), len(source) if limit is None else min(limit, len(source))
        self.source, self._local, self._share, self._threads = source, local, share, data.threads
        length = math.ceil(self.count / data.eval_batch_size) * data.eval_batch_size
        if data.source == "codes":
            self._images = FirstViews(source.load(data.threads), self.count, length)
        else:
            crop = {"center": center_crop, "adm": adm_center_crop}[data.eval_crop]
            self._images = Masked(source, self.skipped, data.image_size, self.count, length, crop)

    def __len__(self) -> int:
        return len(self._images) // (self._local * self._share.step)

    def __repr__(self) -> str:
        return repr(self._images)

    def image(self, index: int) -> UInt8[np.ndarray, "S S 3"]:
        """Returns image `index` of the data as it is in the batches, on any process."""
        return self._images[index]["image"]

    def listing(self) -> dict[str, int | str]:
        """Returns the same as `TrainBatches.listing`."""
        return self.source.listing(self.count)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        batches = _grain().MapDataset.source(self._images).batch(self._local, drop_remainder=True)[self._share]
        return iter(batches.to_iter_dataset(_read_options(self._threads)))


def evaluation_batches(
    data: Any, *, process_index: int = 0, process_count: int = 1, limit: int | None = None
) -> EvaluationBatches | None:
    """Returns this process's part of the validation batches; None if the config names no validation images.

    Args:
      data: a `config.DataConfig`.
      limit: number of images to use, the first ones; None: all.
    """
    local, source = _local_batch("eval_batch_size", data.eval_batch_size, process_count), evaluation_source(data)
    share = slice(process_index, None, process_count)
    return None if source is None else EvaluationBatches(data, source, limit, local, share)


def ordered_batches(
    source: Source, starts: list[int], size: int, image_size: int, views: str, threads: int, skipped: Skipped
) -> Iterator[dict[str, Any]]:
    """Iterates over batches of the images [start, start + size) of a source, one for each of `starts`.

    Args:
      image_size: side S of the crops in pixels.
      views: a name in `images.VIEWS`.
      threads: number of threads that read ahead.
      skipped: counts the images that cannot be read.

    Returns:
      An iterator over {"image": uint8 [size, views, S, S, 3], "label": int32 [size], "mask": bool [size], "first":
      start}. The mask is False, and the image black, after the end of the source and for images that cannot be read.
    """
    grain = _grain()
    images = Masked(source, skipped, image_size, len(source), len(source) + size, VIEWS[views])

    def read_batch(start: int) -> dict[str, Any]:
        records = [images[start + i] for i in range(size)]
        return {name: np.stack([record[name] for record in records]) for name in records[0]} | {"first": start}

    return iter(grain.MapDataset.source(starts).map(read_batch).to_iter_dataset(_read_options(threads)))


def _augment(record: dict, rng: np.random.Generator, *, data: Any) -> dict:
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


def _min_side(data: Any) -> int | None:
    """Returns the length of the short side that the crop needs of a JPEG; None: that of the file."""
    if data.crop == "adm" or (data.crop == "random" and tuple(data.scale) != (1.0, 1.0)):
        return None
    return math.ceil(data.image_size * (data.resize if data.crop == "random" else 1))


def _local_batch(field: str, size: int, process_count: int) -> int:
    if size % process_count:
        nearest = max(1, size // process_count) * process_count
        problem = f"must be a multiple of the number of processes ({process_count}), for example {nearest}"
        raise ConfigError(problem, field=f"data.{field}", value=size)
    return size // process_count


def _grain() -> Any:
    with import_extra("train", "reading datasets"):
        import grain
    return grain


def _read_options(threads: int) -> Any:
    return _grain().ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)  # in batches
