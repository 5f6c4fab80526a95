"""Files of codes with labels and ids in four common formats; read and written without JAX."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Integer

from vqrae_jax import storage
from vqrae_jax.errors import DataError, InstallError, StorageError, import_extra

Format = Literal["npz", "parquet", "webdataset", "array_record"]
SUFFIXES = {"npz": ".npz", "parquet": ".parquet", "webdataset": ".tar", "array_record": ".array_record"}


@dataclasses.dataclass(frozen=True)
class Columns:
    """The content of a shard, one row for each image that could be read."""

    index: np.ndarray  # int64 [rows], number of the image in the source
    id: list[str]
    label: np.ndarray  # int32 [rows], -1 without a label
    codes: np.ndarray  # unsigned integers [rows, *code_shape]

    def __len__(self) -> int:
        return len(self.index)


def concatenate(parts: list[Columns]) -> Columns:
    """Returns the rows of all parts, one part after another."""
    return Columns(
        np.concatenate([part.index for part in parts]).astype(np.int64),
        [name for part in parts for name in part.id],
        np.concatenate([part.label for part in parts]).astype(np.int32),
        np.concatenate([part.codes for part in parts]),
    )


def read_shard(path: str | os.PathLike) -> Columns:
    """Reads a shard of any format; a remote one is downloaded first."""
    path = storage.resolve_path(path)
    kind = next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    if kind is None:
        problem = f"not a shard of codes; expected a file ending in {', '.join(SUFFIXES.values())}"
        raise DataError(problem, field=os.fspath(path))
    try:
        return READERS[kind](storage.download(path))
    except (StorageError, InstallError):
        raise
    except Exception as error:  # each library raises its own kinds for damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read as a shard of codes ({reason})", field=os.fspath(path)) from error


def _write_npz(path: pathlib.Path, columns: Columns) -> None:
    with open(path, "wb") as file:
        np.savez(file, index=columns.index, id=np.asarray(columns.id, str), label=columns.label, codes=columns.codes)


def _read_npz(path: pathlib.Path) -> Columns:
    with np.load(path, allow_pickle=False) as npz:
        return Columns(npz["index"], npz["id"].tolist(), npz["label"], npz["codes"])


def _write_parquet(path: pathlib.Path, columns: Columns) -> None:
    """Writes codes as flat lists of a fixed length, and their shape in the metadata of the schema."""
    with import_extra("train", "writing Parquet files"):
        import pyarrow as pa
        import pyarrow.parquet

    length = int(np.prod(columns.codes.shape[1:]))
    table = pa.table({
        "index": pa.array(columns.index),
        "id": pa.array(columns.id, pa.string()),
        "label": pa.array(columns.label),
        "codes": pa.FixedSizeListArray.from_arrays(pa.array(columns.codes.reshape(-1)), length),
    })  # fmt: skip
    shape = json.dumps(columns.codes.shape[1:]).encode()
    table = table.replace_schema_metadata({b"code_shape": shape})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)


def _read_parquet(path: pathlib.Path) -> Columns:
    with import_extra("train", "reading Parquet files"):
        import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read()
    shape = json.loads(table.schema.metadata[b"code_shape"])
    codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
    return Columns(table["index"].to_numpy(), table["id"].to_pylist(), table["label"].to_numpy(), codes)


def _write_webdataset(path: pathlib.Path, columns: Columns) -> None:
    """Writes each row as NUMBER.npy (codes), NUMBER.cls (label) and NUMBER.json (id)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, name, label, codes in _rows(columns):
            array = io.BytesIO()
            np.save(array, codes)
            parts = {"npy": array.getvalue(), "cls": str(label).encode(), "json": json.dumps({"id": name}).encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _read_webdataset(path: pathlib.Path) -> Columns:
    samples: dict[int, dict[str, bytes]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            number, _, suffix = member.name.partition(".")
            samples.setdefault(int(number), {})[suffix] = tar.extractfile(member).read()
    rows = list(samples.values())
    return Columns(
        np.asarray(list(samples), np.int64),
        [json.loads(row["json"])["id"] for row in rows],
        np.asarray([int(row["cls"]) for row in rows], np.int32),
        _stack([np.load(io.BytesIO(row["npy"]), allow_pickle=False) for row in rows]),
    )


def _write_array_record(path: pathlib.Path, columns: Columns) -> None:
    """Writes each row as a msgpack map: index, id, label, codes (little-endian bytes), shape, dtype."""
    with import_extra("train", "writing array_record files"):
        import msgpack
        from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        for index, name, label, codes in _rows(columns):
            kind = {"shape": codes.shape, "dtype": codes.dtype.str}
            writer.write(msgpack.packb({"index": index, "id": name, "label": label, "codes": codes.tobytes(), **kind}))
        writer.close()
    except RuntimeError as error:  # its only kind, also for a full disk
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _read_array_record(path: pathlib.Path) -> Columns:
    with import_extra("train", "reading array_record files"):
        import msgpack
        from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():  # the library ends the process for some files that it cannot open
        raise FileNotFoundError(path)
    reader = ArrayRecordReader(os.fspath(path))
    rows = [msgpack.unpackb(record) for record in (reader.read_all() if reader.num_records() else [])]
    reader.close()
    return Columns(
        np.asarray([row["index"] for row in rows], np.int64),
        [row["id"] for row in rows],
        np.asarray([row["label"] for row in rows], np.int32),
        _stack([np.frombuffer(row["codes"], row["dtype"]).reshape(row["shape"]) for row in rows]),
    )


def _rows(columns: Columns) -> Iterator[tuple[int, str, int, np.ndarray]]:
    return zip(columns.index.tolist(), columns.id, columns.label.tolist(), columns.codes, strict=True)


def _stack(rows: list[Integer[np.ndarray, "..."]]) -> Integer[np.ndarray, "..."]:
    return np.stack(rows) if rows else np.zeros((0, 0), np.uint16)


WRITERS = {
    "npz": _write_npz, "parquet": _write_parquet, "webdataset": _write_webdataset, "array_record": _write_array_record,
}  # fmt: skip
READERS = {
    "npz": _read_npz, "parquet": _read_parquet, "webdataset": _read_webdataset, "array_record": _read_array_record,
}  # fmt: skip
