"""Tables with encoded images, in the formats of Hugging Face `datasets`: Parquet, or the Arrow files of `save_to_disk`.

Arrow files are mapped into memory, Parquet is read by row groups. `datasets` itself is not used because it writes a
second copy of Parquet files to its Arrow cache, also with keep_in_memory (5.2.0), and its streaming has no length.
"""

import concurrent.futures
import functools
import itertools
import json
import logging
import os
from typing import Any

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data.shards import TRAIN, Split, list_shards
from vqrae_jax.data.source import USUAL, Keys, Source, locate, select_columns
from vqrae_jax.errors import DataError, ImageError, import_extra

_CACHED = 8  # row groups
_THREADS = 8  # files whose footers are read at the same time
_LARGE = 2**25  # mean bytes of row groups above which shuffled reading is slow

_log = logging.getLogger(__name__)


class Tables(Source):
    """The rows of .parquet or .arrow files, file after file.

    The image is the column "image" or the only one that holds bytes, bare or as {"bytes", "path"}; the label is the
    integer column "label" or the only one that has names of classes.
    """

    def __init__(self, path: str | os.PathLike, field: str = "data.path", keys: Keys = USUAL, split: Split = TRAIN):
        with import_extra("train", "reading tables of images"):
            import pyarrow  # noqa: F401
        self.path = os.fspath(path)
        self._files = list_shards(path, (".parquet", ".arrow"), field, split)
        suffixes = {name.rpartition(".")[2] for name in self._files}
        if len(suffixes) > 1:
            problem = "both .parquet and .arrow files; select one kind with a pattern"
            raise DataError(problem, field=field, value=self.path)
        self._reader_class = ParquetReader if suffixes == {"parquet"} else ArrowReader
        self._reader = None
        try:
            reader = self._open()
            self._rows = reader.rows
        except Exception as error:  # Arrow raises its own kinds in addition to OSError
            problem = f"the files cannot be read: {error}; copy them again"
            raise DataError(problem, field=field, value=self.path) from error
        self._ends = np.cumsum(self._rows)
        if not len(self):
            raise DataError("no rows", field=field, value=self.path)
        names = _class_names(reader.schemas[0])
        self._columns = _find_columns(reader.schemas[0], names, repr(self.path), field, keys)
        self.classes = names.get(self._columns[1])
        self._check_files(reader, field)
        if reader.mean_bytes > _LARGE:
            _log.warning(
                "%s=%r: row groups have %.0f MB on average and a shuffled epoch reads one for each image; write "
                "smaller ones (row_group_size=100), or use save_to_disk of `datasets` and its .arrow files",
                field, self.path, reader.mean_bytes / 1e6,
            )  # fmt: skip

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int | np.integer) -> dict:
        group, row = locate(self._ends, index)
        try:
            table = self._open().read(group, tuple(name for name in self._columns if name))
            image, label = (table.column(name)[row].as_py() if name else None for name in self._columns)
        except Exception as error:
            kind = ImageError if _is_damage(error) else OSError
            raise kind(f"{type(error).__name__}: {error}") from error
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise ImageError("the row has no bytes; paths to other files are not followed")
        return {"image": image, "label": -1 if label is None else int(label)}

    def fingerprint(self, count: int) -> bytes:
        """Returns the names of all files and the number of rows in each row group."""
        names = [os.path.basename(name) for name in self._files]
        return json.dumps([names, self._rows.tolist()]).encode()

    def name(self, index: int) -> str:
        return f"row {index} of {self.path!r}"

    def _check_files(self, reader: "ParquetReader | ArrowReader", field: str) -> None:
        """Raises DataError if files differ in their columns, or no row has the bytes of an image."""
        (first, *rest), (image, label) = reader.schemas, self._columns
        for name, other in zip(self._files[1:], rest, strict=True):
            if _differ(first, other, label):
                problem = f"{name!r} has other images, integers or names of classes than {self._files[0]!r}"
                listed = f"{_list_columns(other)}, not {_list_columns(first)}"
                raise DataError(f"{problem}: {listed}", field=field, value=self.path)
        if empty := reader.count_empty(image):
            problem = f"{empty} of {len(self)} rows have no bytes in the column {image}, and paths are not followed"
            if empty == len(self):
                problem += "; save_to_disk of `datasets` embeds the files, and the source 'folder' reads them"
                raise DataError(problem, field=field, value=self.path)
            _log.warning("%r: %s", self.path, problem)

    def _open(self) -> "ParquetReader | ArrowReader":
        if self._reader is None:
            self._reader = self._reader_class(self._files)
        return self._reader

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reader": None}  # a worker process opens the files itself

    def __repr__(self) -> str:
        return f"Tables({self.path!r}, files={len(self._files)}, images={len(self)})"


class ParquetReader:
    """The row groups of Parquet files: `read` returns one; the last few are cached.

    A shuffled epoch reads a row group for nearly every image, which is fast for row groups of a few megabytes only.
    """

    def __init__(self, names: list[str]):
        self._names = names
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            self._metadata = list(pool.map(_read_footer, names))
        self._groups = [(i, group) for i, data in enumerate(self._metadata) for group in range(data.num_row_groups)]
        self.schemas = [data.schema.to_arrow_schema() for data in self._metadata]
        groups = [self._metadata[i].row_group(group) for i, group in self._groups]
        self.rows = np.array([group.num_rows for group in groups], np.int64)
        self.mean_bytes = float(np.mean([group.total_byte_size for group in groups])) if groups else 0.0
        self.read = functools.lru_cache(_CACHED)(self._read)

    def count_empty(self, column: str) -> int:
        """Returns the number of rows without bytes, by the statistics in the footers; 0 if they have none."""
        total = 0
        for data in self._metadata:
            chunks = [i for i in range(data.num_columns) if data.schema.column(i).path in (column, f"{column}.bytes")]
            for group, i in itertools.product(range(data.num_row_groups), chunks):
                statistics = data.row_group(group).column(i).statistics
                total += (statistics and statistics.null_count) or 0
        return total

    def _read(self, group: int, columns: tuple[str, ...]) -> Any:
        """Returns columns of a row group as a pyarrow.Table."""
        import pyarrow.parquet

        number, group_in_file = self._groups[group]
        with _open_file(self._names[number]) as file:
            reader = pyarrow.parquet.ParquetFile(file, metadata=self._metadata[number])
            return reader.read_row_group(group_in_file, columns=list(columns), use_threads=False)


class ArrowReader:
    """The record batches of Arrow files, in the stream or the random access format, mapped into memory."""

    mean_bytes = 0.0  # of a record batch only the rows that are used are read

    def __init__(self, names: list[str]):
        self.schemas, batches = zip(*map(_read_arrow, names), strict=True)
        self._batches = list(itertools.chain(*batches))
        self.rows = np.array([batch.num_rows for batch in self._batches], np.int64)

    def count_empty(self, column: str) -> int:
        """Returns the number of rows without bytes."""
        arrays = (batch.column(column) for batch in self._batches)
        return sum((array.field("bytes") if hasattr(array, "field") else array).null_count for array in arrays)

    def read(self, group: int, columns: tuple[str, ...]) -> Any:
        """Returns a whole record batch, whatever the columns, which copies nothing."""
        return self._batches[group]


def _is_damage(error: Exception) -> bool:
    """Returns whether the content is damaged: an error of Arrow, or an OSError without a number."""
    import pyarrow

    kinds = pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def _open_file(name: str) -> Any:
    import pyarrow

    if storage.is_remote(name):
        return storage.open_file(name)
    storage.check_regular(name)
    return pyarrow.OSFile(name)


def _read_footer(name: str) -> Any:
    """Returns the metadata of a Parquet file."""
    import pyarrow.parquet

    with _open_file(name) as file:
        try:
            return pyarrow.parquet.read_metadata(file)
        except pyarrow.ArrowInvalid as error:
            raise pyarrow.ArrowInvalid(f"{name!r}: {error}") from error


def _read_arrow(name: str) -> tuple[Any, list[Any]]:
    """Returns the schema and the record batches of an Arrow file."""
    import pyarrow

    if storage.is_remote(name):
        raise OSError(f"{name!r} cannot be mapped into memory: copy it to a local disk, or use Parquet")
    storage.check_regular(name)
    file = pyarrow.memory_map(name)
    try:
        reader = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file)
        return reader.schema, list(reader)
    return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _find_columns(
    schema: Any, classes: dict[str, tuple[str, ...]], source: str, field: str, keys: Keys
) -> tuple[str, str | None]:
    images, integers = _usable_columns(schema)
    labels = [name for name in integers if name in classes]
    kinds = {column.name: str(column.type) for column in schema}
    return select_columns(source, kinds, images, integers, labels, keys, field)


def _usable_columns(schema: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the columns of encoded images and of integers, sorted."""
    import pyarrow

    def holds_images(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = sorted(column.name for column in schema if holds_images(column.type))
    return images, sorted(column.name for column in schema if pyarrow.types.is_integer(column.type))


def _differ(schema: Any, other: Any, label: str | None) -> bool:
    """Returns whether two files differ in the columns that can be used, or in the classes of the column `label`."""
    if schema.equals(other, check_metadata=True):
        return False
    classes = {_class_names(each).get(label) for each in (schema, other)} - {None}
    return len(classes) > 1 or _usable_columns(schema) != _usable_columns(other)


def _list_columns(schema: Any) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes that `datasets` stores, by column."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
        names = {name: feature["names"] for name, feature in features if "names" in feature}
        return {name: tuple(map(str, values)) for name, values in names.items()}
    except (AttributeError, TypeError, KeyError, ValueError, RecursionError):
        return {}
