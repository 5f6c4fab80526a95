"""The data section of a config -> its images in random access: a source has a length, records and a name for each.

A record is {"image": encoded bytes or uint8 [H, W, 3], "label": int}, label -1 where there is none. One that is damaged
or missing raises ImageError, one that a disk or bucket does not give OSError.
"""

import hashlib

from vqrae_jax.errors import ConfigError


def training_source(data):
    """The training images that `data`, a `config.DataConfig`, names.

    Raises:
      DataError: nothing readable there, or nothing named; names the field.
    """
    match data.source:
        case "photographs":
            from vqrae_jax.data.photographs import TrainingPhotographs

            return TrainingPhotographs()
        case "tfds":
            from vqrae_jax.data.tfds_source import Prepared

            return Prepared(data.name, data.path, data.train_split, "data.train_split")
    if not data.path:
        raise ConfigError(f"data.path is not set: data.source={data.source!r} needs training images")
    return _files(data.source, data.path, "data.path")


def evaluation_source(data):
    """The validation images of `data`; None when it names none.

    Raises:
      DataError: nothing readable there; names the field.
    """
    match data.source:
        case "photographs":
            from vqrae_jax.data.photographs import ValidationPhotographs

            return ValidationPhotographs(data.image_size)
        case "tfds":
            from vqrae_jax.data.tfds_source import Prepared

            return Prepared(data.name, data.path, data.eval_split, "data.eval_split") if data.eval_split else None
    return _files(data.source, data.eval_path, "data.eval_path") if data.eval_path else None


def listing(source, images: int) -> str:
    """SHA-256 of what the first `images` records of `source` are, as far as it knows that without reading them.

    That is their names in order; of tar files their sizes too, of tables, whose rows have no names, those of the files.
    """
    digest = hashlib.sha256()
    for index in range(images):
        digest.update(f"{source.key(index)}\n".encode())
    if hasattr(source, "known"):
        digest.update(source.known(images))
    return digest.hexdigest()


def _files(source, path, field):
    match source:
        case "folder":
            from vqrae_jax.data.folder import Folder

            return Folder(path, field)
        case "webdataset":
            from vqrae_jax.data.tar import TarShards

            return TarShards(path, field)
        case "parquet":
            from vqrae_jax.data.parquet import Tables

            return Tables(path, field)
    raise ConfigError(f"data.source={source!r} is no source of images")
