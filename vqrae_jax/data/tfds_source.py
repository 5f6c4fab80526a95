"""Datasets prepared by TensorFlow Datasets as array_record or tfrecord, read without TensorFlow."""

import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.source import USUAL, Keys, Source, locate, read_range, select_columns
from vqrae_jax.errors import ConfigError, DataError, ImageError, import_extra

_LENGTH = struct.Struct("<Q")
_HEADER, _FOOTER = 12, 4  # bytes before and after the data of a TFRecord


class Prepared(Source):
    """A split of a prepared dataset; nothing is downloaded or prepared.

    The image is the feature "image" or the only image feature, the label the feature "label" or the only class label.
    """

    def __init__(
        self, name: str | None, path: str | os.PathLike | None, split: str, field: str = "data.train_split",
        keys: Keys = USUAL,
    ):  # fmt: skip
        """
        Args:
          name: for example "imagenet2012" or "dataset/config:1.2.3"; None if `path` is the prepared folder itself.
          path: the data_dir that contains `name` (None: the default of TFDS), or the prepared folder.
          split: a split expression of TFDS, for example "train[:90%]".
          field: config field or argument that `split` comes from.
          keys: other features of images and labels.
        """
        builder = _builder(name, path)
        self._dataset, self._split = builder.info.full_name, split
        self._image, self._label = _find_features(builder, keys)
        self.classes = tuple(getattr(builder.info.features[self._label], "names", ())) or None if self._label else None
        self._records = _open_records(builder, split, field)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int | np.integer) -> dict:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            serialized = self._records[index]
        except RuntimeError as error:  # the only kind of array_record; a failed system call is named, as in "open()"
            raise (OSError if "() failed" in str(error) else ImageError)(str(error)) from error
        try:
            features = tf_example_pb2.Example.FromString(serialized).features.feature
            image = features[self._image].bytes_list.value[0]
            label = features[self._label].int64_list.value[0] if self._label else -1
        except (DecodeError, IndexError) as error:
            raise ImageError(f"damaged record: {error}") from error
        return {"image": image, "label": label}

    def name(self, index: int) -> str:
        return f"record {index} of {self._dataset}, split {self._split!r}"

    def __repr__(self) -> str:
        return f"Prepared({self._dataset!r}, split={self._split!r}, images={len(self)})"


def _tfds() -> Any:
    with import_extra("train", "the source 'tfds'"):
        import tensorflow_datasets as tfds
    if not hasattr(tfds, "builder_from_directory"):  # after a failed import it logs the reason and is empty
        problem = "needs tensorflow_datasets, whose import failed (see the log); run `pip install 'vqrae-jax[train]'`"
        raise DataError(problem, field="data.source", value="tfds")
    return tfds


def _builder(name: str | None, path: str | os.PathLike | None) -> Any:
    """Returns the reader of a dataset's metadata files; the code that prepared the dataset is not needed."""
    tfds = _tfds()
    path = None if path is None else storage.expand_home(path)
    try:
        if name is None:
            return tfds.builder_from_directory(_prepared_folder(path))
        if path is not None:
            storage.list_files(path, "data.path", recursive=storage.is_remote(path))  # raises if it is not a folder
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=path)
    except (ConfigError, DataError):
        raise
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"is not prepared in {path or 'the default data_dir of TFDS'!r}; run once, on a machine with TensorFlow: "
            f"tfds build {name} --file_format=array_record" + (f" --data_dir={path}" if path else ""),
            field="data.name", value=name,
        ) from error  # fmt: skip
    except Exception as error:  # from JSON, protobuf and the constructors of features
        problem = f"the metadata of the prepared dataset cannot be read: {error}; prepare or copy it again"
        raise DataError(problem, field="data.path", value=path) from error


def _prepared_folder(path: str | None) -> str:
    """Returns `path`, or its subfolder of the newest version, whichever holds the metadata."""
    if path is None:
        raise ConfigError("missing; give the name of a dataset, or the path of a prepared one", field="data.name")
    path, is_version = path.rstrip("/"), _tfds().core.Version.is_valid
    files = storage.list_files(path, "data.path")
    folders = [os.path.dirname(file) for file in files if os.path.basename(file) == "dataset_info.json"]
    if path in folders:
        return path
    versions = [os.path.basename(folder) for folder in folders if os.path.dirname(folder) == path]
    if not versions or not all(map(is_version, versions)):
        raise DataError(
            "no dataset_info.json; expected a prepared folder, which ends in a version as in imagenet2012/5.1.0, or "
            "the data_dir above it together with data.name",
            field="data.path", value=path,
        )  # fmt: skip
    return os.path.join(path, max(versions, key=_tfds().core.Version))


def _open_records(builder: Any, split: str, field: str) -> Any:
    """Returns the serialized examples of a split in random access; they have `len` and integer indices."""
    tfds = _tfds()
    kinds, formats, dataset = tfds.core.FileFormat, builder.info.available_file_formats(), builder.info.full_name
    if not {kinds.ARRAY_RECORD, kinds.TFRECORD} & formats:
        stored = ", ".join(sorted(kind.value for kind in formats)) or "?"
        problem = f"{dataset} at {builder.data_dir} is stored as {stored}; supported are array_record and tfrecord"
        raise DataError(f"{problem} (`tfds build --file_format=array_record`)", field="data.name")
    if kinds.ARRAY_RECORD in formats and storage.is_remote(builder.data_dir):
        problem = "array_record files must be on a local disk; copy them, mount the bucket (gcsfuse), or use tfrecord"
        raise DataError(problem, field="data.path", value=str(builder.data_dir))
    splits = ", ".join(f"{name} ({info.num_examples})" for name, info in sorted(builder.info.splits.items()))
    try:
        records = None
        if kinds.ARRAY_RECORD in formats:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            records = builder.as_data_source(split, deserialize_method=raw, file_format=kinds.ARRAY_RECORD)
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        problem = f"not a split of {dataset}; it has {splits}, and parts of them as in 'train[:90%]'"
        raise DataError(problem, field=field, value=split) from error
    if sum(part.take for part in parts) < 1:
        raise DataError(f"no records of {dataset}; it has {splits}", field=field, value=split)
    names = [os.fspath(part.filename) for part in parts]
    if missing := [name for name in names if not storage.is_remote(name) and not os.path.isfile(name)]:
        raise DataError(
            f"{len(missing)} of {len(parts)} files of {dataset} are missing, the first is {missing[0]!r}; prepare or "
            "copy the dataset again",
            field=field, value=split,
        )  # fmt: skip
    return records or TFRecords([Part(name, part.skip, part.take) for name, part in zip(names, parts, strict=True)])


def _find_features(builder: Any, keys: Keys) -> tuple[str, str | None]:
    tfds = _tfds()
    dataset, features = builder.info.full_name, builder.info.features
    features = dict(sorted(features.items())) if hasattr(features, "items") else {}  # their order is not fixed

    def names(kind: type) -> list[str]:
        return [name for name, feature in features.items() if isinstance(feature, kind)]

    kinds, labels = (
        {name: type(feature).__name__ for name, feature in features.items()},
        names(tfds.features.ClassLabel),
    )
    integers = labels + [name for name in names(tfds.features.Scalar) if np.dtype(features[name].np_dtype).kind in "iu"]
    image, label = select_columns(dataset, kinds, names(tfds.features.Image), integers, labels, keys, "data.name")
    dtype = np.dtype(features[image].np_dtype).name
    if dtype not in ("uint8", "uint16"):
        raise DataError(f"{dataset} has {image} as {dtype}; expected uint8 or uint16", field="data.name")
    return image, label


class Part(NamedTuple):
    """Records [skip, skip + take) of a file."""

    path: str
    skip: int
    take: int


class TFRecords:
    """The records of several parts of TFRecord files, one after another, as bytes; read without TensorFlow.

    A record is its length (uint64, little-endian), a checksum of the length (4 bytes), the data, and a checksum of the
    data (4 bytes). The lengths of a file are read once, at its first record. Checksums are not verified, because a
    damaged image fails to decode.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([part.take for part in self._parts], dtype=np.int64)
        self._offsets = {}  # path -> byte offset of each record, and the end of the last one

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, index: int | np.integer) -> bytes:
        number, record = locate(self._ends, index)
        path, record = self._parts[number].path, record + self._parts[number].skip
        if path not in self._offsets:
            self._offsets[path] = _record_offsets(path)
        offsets = self._offsets[path]
        if record >= len(offsets) - 1:
            raise ImageError(f"{path!r} is cut short: it has {len(offsets) - 1} whole records, not number {record}")
        return read_range(path, int(offsets[record]) + _HEADER, int(offsets[record + 1]) - _FOOTER)


def _record_offsets(path: str) -> np.ndarray:
    """Returns the byte offset of each whole record, and the end of the last one: int64 [records + 1]."""
    size, offsets = storage.file_size(path), [0]
    with storage.open_file(path) as file:
        while offsets[-1] + _HEADER + _FOOTER <= size:
            file.seek(offsets[-1])
            end = offsets[-1] + _HEADER + _LENGTH.unpack(file.read(_LENGTH.size))[0] + _FOOTER
            if end > size:
                break
            offsets.append(end)
    return np.array(offsets, np.int64)
