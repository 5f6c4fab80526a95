"""Tables with encoded images, as Hugging Face `datasets` keeps them: Parquet files, or Arrow files of `save_to_disk`.

Both are read in random access. Arrow files are mapped into memory, so a record costs what it holds. Parquet gives whole
row groups, of which the last few are kept: a shuffled epoch reads a group for nearly every image, which is cheap for
groups of some megabytes and not for larger ones.
"""

import collections
import json
import logging
import os
import threading

import numpy as np

from vqrae_jax.data import files
from vqrae_jax.errors import DataError, ImageError

_log = logging.getLogger(__name__)

_KEPT = 8  # row groups
_LARGE = 2**25  # bytes of a row group, on average, from which on shuffled reading is slow


class Tables:
    """The rows of some .parquet or .arrow files, file after file.

    A record is {"image": encoded bytes, "label": int}. The image is the column "image" or else the only one that holds
    bytes, bare or as {"bytes", "path"}; the label is the whole number in "label", -1 without such a column.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path"):
        """
        Args:
          path: a folder, a file or a pattern, see `files.shards`.
          field: the config field that `path` comes from.

        Raises:
          DataError: naming `field`: no such files, damaged ones, or no column of images in them.
        """
        self.path = os.fspath(path)
        self._files = files.shards(path, (".parquet", ".arrow"), field)
        kinds = {name.rpartition(".")[2] for name in self._files}
        if len(kinds) > 1:
            raise DataError(f"{field}={self.path!r} holds both .parquet and .arrow files: name one kind by a pattern")
        self._kind = ParquetFiles if kinds == {"parquet"} else ArrowFiles
        self._groups = None
        try:
            groups = self._open()
            self._rows = groups.rows
        except Exception as error:  # Arrow has errors of its own beside OSError
            raise DataError(f"{field}={self.path!r}: the files cannot be read: {error}; copy them again") from error
        self._ends = np.cumsum(self._rows)
        if not len(self):
            raise DataError(f"{field}={self.path!r} has no rows")
        self._image, self._label = _columns(groups.schema, self.path, field)
        if groups.mean_bytes > _LARGE:
            _log.warning(
                "%s=%r: a row group has %.0f MB, and every image of a shuffled epoch reads one: write smaller ones "
                "(row_group_size=100), or use `datasets`' save_to_disk and its .arrow files",
                field, self.path, groups.mean_bytes / 1e6,
            )  # fmt: skip

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
          ImageError: the row is damaged, or has no bytes.
          OSError: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group]) - int(self._rows[group]))
        names = [self._image] + ([self._label] if self._label else [])
        try:
            table = self._open().read(group, names)
            image, label = (table.column(name)[row].as_py() if name else None for name in (self._image, self._label))
        except Exception as error:
            kind = ImageError if _is_damage(error) else OSError
            raise kind(f"{type(error).__name__}: {error}") from error
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise ImageError("the row has no bytes; a path to a file elsewhere is not followed")
        return {"image": image, "label": -1 if label is None else int(label)}

    def key(self, index: int) -> str:
        """The row's number: it has no other name."""
        return str(index)

    def known(self, images: int) -> bytes:
        """Of the first images, beside their numbers: the files, by their own names, and the rows of their groups."""
        del images  # all files count: which of them hold the first is not asked
        names = [os.path.basename(name) for name in self._files]
        return json.dumps([names, self._rows.tolist()]).encode()

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return f"row {index} of {self.path!r}"

    def _open(self):
        if self._groups is None:
            self._groups = self._kind(self._files)
        return self._groups

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_groups": None}  # a worker process opens the files itself

    def __repr__(self) -> str:
        return f"Tables({self.path!r}, files={len(self._files)}, images={len(self)})"


class ParquetFiles:
    """Row groups of Parquet files; the last few that were read are kept."""

    def __init__(self, names: list[str]):
        import pyarrow.parquet

        self._names, self._metadata = names, []
        for name in names:
            with _opened(name) as file:
                self._metadata.append(pyarrow.parquet.read_metadata(file))
        self._groups = [
            (number, group) for number, data in enumerate(self._metadata) for group in range(data.num_row_groups)
        ]
        self.schema = self._metadata[0].schema.to_arrow_schema()
        self.rows = np.array([self._metadata[n].row_group(group).num_rows for n, group in self._groups], np.int64)
        sizes = [self._metadata[n].row_group(group).total_byte_size for n, group in self._groups]
        self.mean_bytes = float(np.mean(sizes)) if sizes else 0.0
        self._kept, self._lock = collections.OrderedDict(), threading.Lock()

    def read(self, group: int, columns: list[str]):
        """The columns of a group as a table."""
        import pyarrow.parquet

        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        number, place = self._groups[group]
        with _opened(self._names[number]) as file:
            reader = pyarrow.parquet.ParquetFile(file, metadata=self._metadata[number])
            table = reader.read_row_group(place, columns=columns, use_threads=False)
        with self._lock:
            self._kept[group] = table
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return table


class ArrowFiles:
    """Record batches of Arrow files, stream or random access format, mapped into memory."""

    def __init__(self, names: list[str]):
        self._batches = [batch for name in names for batch in _arrow_batches(name)]
        self.schema = self._batches[0].schema
        self.rows = np.array([batch.num_rows for batch in self._batches], np.int64)
        self.mean_bytes = 0.0

    def read(self, group: int, columns: list[str]):
        """The batch itself: nothing is copied."""
        return self._batches[group]


def _is_damage(error):
    """Whether Arrow complains of a file's content: by errors of its own, or by an OSError without kind and number."""
    import pyarrow

    kinds = pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def _opened(name):
    import pyarrow

    return files.opened(name) if files.is_remote(name) else pyarrow.OSFile(name)


def _arrow_batches(name):
    import pyarrow

    if files.is_remote(name):
        raise OSError(f"{name!r} would have to be mapped into memory: copy it to a disk here, or use Parquet")
    source = pyarrow.memory_map(name)
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return list(pyarrow.ipc.open_stream(source))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _columns(schema, path, field):
    """Names of the columns of images and of labels (None without)."""
    import pyarrow

    def holds_images(kind):
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    found = [column.name for column in schema if holds_images(column.type)]
    listed = ", ".join(f"{column.name}: {column.type}" for column in schema)
    if "image" not in found and len(found) != 1:
        what = "several columns of bytes and none is called image" if found else "no column of encoded images"
        raise DataError(f"{field}={path!r} has {what}; its columns are {listed}")
    labelled = "label" in schema.names and pyarrow.types.is_integer(schema.field("label").type)
    return "image" if "image" in found else found[0], "label" if labelled else None
