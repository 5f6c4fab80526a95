"""Datasets prepared by TensorFlow Datasets, array_record or tfrecord, read without TensorFlow."""

import os

import numpy as np

from vqrae_jax.data import files
from vqrae_jax.data.tfrecord import Part, TFRecords
from vqrae_jax.errors import ConfigError, DataError, ImageError


class Prepared:
    """A split of a prepared dataset.

    A record is {"image": encoded bytes, "label": int}: the feature "image" or else the only image feature, and the
    feature "label" or else the only class label, -1 when there is none. Nothing is downloaded or prepared here.
    """

    def __init__(self, name: str | None, path: str | os.PathLike | None, split: str, field: str = "data.train_split"):
        """
        Args:
          name: as "imagenet2012" or "dataset/config:1.2.3"; None when `path` is the prepared folder itself.
          path: the data_dir that holds `name` (None: where TFDS keeps its data), or the prepared folder.
          split: a TFDS split expression, as "train[:90%]".
          field: the config field that `split` comes from.

        Raises:
          DataError: no such dataset or split, another file format, or no 8-bit images in it.
        """
        builder = _builder(name, path)
        self._dataset, self._split = builder.info.full_name, split
        self._image, self._label = _image_feature(builder), _label_feature(builder)
        self._records = _records(builder, split, field)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
          ImageError: the record is damaged.
          OSError: it cannot be read.
        """
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            serialized = self._records[index]
        except RuntimeError as error:  # all that array_record raises; of the system's calls it says which failed
            raise (OSError if "() failed" in str(error) else ImageError)(str(error)) from error
        try:
            features = tf_example_pb2.Example.FromString(serialized).features.feature
            image = features[self._image].bytes_list.value[0]
            label = features[self._label].int64_list.value[0] if self._label else -1
        except (DecodeError, IndexError) as error:
            raise ImageError(f"a damaged record: {error}") from error
        return {"image": image, "label": label}

    def key(self, index: int) -> str:
        """The record's number: it has no other name."""
        return str(index)

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return f"record {index} of {self._dataset}, split {self._split!r}"

    def __repr__(self) -> str:
        return f"Prepared({self._dataset!r}, split={self._split!r}, images={len(self)})"


def _tfds():
    import tensorflow_datasets as tfds

    if not hasattr(tfds, "builder_from_directory"):  # it logs why its import failed, and goes on without content
        raise DataError(
            "data.source='tfds' needs a working tensorflow_datasets, and its import failed for the reason "
            "logged above: run `pip install -r requirements.txt`"
        )
    return tfds


def _builder(name, path):
    """The reader of a dataset's metadata, from files alone: the code that prepared it is not asked for."""
    tfds = _tfds()

    path = None if path is None else os.path.expanduser(os.fspath(path))
    if path is not None and not _is_folder(path):
        raise DataError(f"data.path={path!r} is not a folder: give the data_dir of TFDS or a prepared dataset's folder")
    try:
        if name is None:
            return tfds.builder_from_directory(_prepared_folder(path))
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=path)
    except DataError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"data.name={name!r} is not prepared in data.path={path or 'the default data_dir of TFDS'!r}. Prepare it "
            f"once, on a machine with TensorFlow: tfds build {name} --file_format=array_record"
            + (f" --data_dir={path}" if path else "")
        ) from error
    except Exception as error:  # from JSON, protobuf and the features' own constructors
        raise DataError(
            f"data.path={path!r}, data.name={name!r}: the metadata of this prepared dataset cannot be "
            f"read: {error}; prepare or copy it again"
        ) from error


def _is_folder(path):
    return bool(files.below(path, "data.path")) if files.is_remote(path) else os.path.isdir(path)


def _prepared_folder(path):
    if path is None:
        raise ConfigError(
            "data.name and data.path are both missing: data.source='tfds' needs the name of a dataset, "
            "a prepared dataset's folder, or a name and the data_dir that holds it"
        )
    tfds = _tfds()

    from etils import epath

    folder = epath.Path(path)
    if (folder / "dataset_info.json").exists():
        return path
    versions = [entry.name for entry in folder.iterdir() if (entry / "dataset_info.json").exists()]
    if not versions or not all(map(tfds.core.Version.is_valid, versions)):
        raise DataError(
            f"data.path={path!r} has no dataset_info.json: give the prepared folder, which ends in a "
            "version as in imagenet2012/5.1.0, or the data_dir above it together with data.name"
        )
    return os.path.join(path, max(versions, key=tfds.core.Version))


def _records(builder, split, field):
    """Random access to the serialized examples of a split."""
    tfds = _tfds()

    kinds, formats = tfds.core.FileFormat, builder.info.available_file_formats()
    if not {kinds.ARRAY_RECORD, kinds.TFRECORD} & formats:
        raise DataError(
            f"{builder.info.full_name} at {builder.data_dir} is kept as "
            f"{', '.join(sorted(kind.value for kind in formats)) or 'nothing'}: array_record and tfrecord "
            "can be read; prepare it again with `tfds build --file_format=array_record`"
        )
    known = ", ".join(f"{name} ({info.num_examples})" for name, info in sorted(builder.info.splits.items()))
    try:
        records = None
        if kinds.ARRAY_RECORD in formats:
            if files.is_remote(builder.data_dir):
                raise DataError(
                    f"data.path={str(builder.data_dir)!r}: array_record files are read from a disk only: mount the "
                    "bucket (gcsfuse) or copy the folder, or prepare the dataset as tfrecord"
                )
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            records = builder.as_data_source(split, deserialize_method=raw, file_format=kinds.ARRAY_RECORD)
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(
            f"{field}={split!r} is no split of {builder.info.full_name}: it has {known}, and parts of them "
            "as in 'train[:90%]'"
        ) from error
    if sum(file.take for file in parts) < 1:
        raise DataError(f"{field}={split!r} of {builder.info.full_name} is empty: it has {known}")
    names = [os.fspath(file.filename) for file in parts]
    missing = [name for name in names if not files.is_remote(name) and not os.path.isfile(name)]
    if missing:
        raise DataError(
            f"{field}={split!r} of {builder.info.full_name}: {len(missing)} of {len(parts)} files are "
            f"missing, the first is {missing[0]!r}; prepare or copy the dataset again"
        )
    return records or TFRecords([Part(os.fspath(file.filename), file.skip, file.take) for file in parts])


def _image_feature(builder):
    tfds = _tfds()

    name, features = builder.info.full_name, _features(builder)
    found = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    listed = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in features.items())
    if not found:
        raise DataError(f"data.name: {name} has no image feature; its features are {listed}")
    if "image" not in found and len(found) > 1:
        raise DataError(f"data.name: {name} has several image features ({', '.join(found)}) and none is called image")
    key = "image" if "image" in found else found[0]
    kept = np.dtype(features[key].np_dtype).name
    if kept not in ("uint8", "uint16"):
        raise DataError(f"data.name: {name} keeps {key} as {kept}, expected uint8 or uint16")
    return key


def _label_feature(builder):
    tfds = _tfds()

    found = [key for key, feature in _features(builder).items() if isinstance(feature, tfds.features.ClassLabel)]
    return "label" if "label" in found else found[0] if len(found) == 1 else None


def _features(builder):
    features = builder.info.features  # in an order that differs from run to run
    return dict(sorted(features.items())) if hasattr(features, "items") else {}
