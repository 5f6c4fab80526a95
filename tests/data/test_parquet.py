"""Parquet and Arrow files in the layouts of Hugging Face `datasets`."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqrae_jax.config import DataConfig
from vqrae_jax.data import parquet
from vqrae_jax.data.parquet import Tables
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.data.source import Keys
from vqrae_jax.errors import DataError, ImageError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def tables(tmp_path, png):
    """Writes ten images to two files, with two rows in each row group (Parquet) or record batch (Arrow)."""

    def write(kind, name="image"):
        for number, rows in enumerate((range(6), range(6, 10))):
            images = pa.array([{"bytes": png(20 * i), "path": f"{i}.png"} for i in rows], IMAGE)
            table = pa.table({name: images, "label": pa.array(list(rows), pa.int64())})
            path = tmp_path / f"train-0000{number}-of-00002"
            if kind == "parquet":
                pq.write_table(table, f"{path}.parquet", row_group_size=2)
                continue
            new = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
            with new(f"{path}.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("name", ["image", "img"])
def test_records_are_images_with_labels(tables, png, kind, name):
    source = Tables(tables(kind, name))
    order = np.random.default_rng(0).permutation(10)
    for copy in (source, pickle.loads(pickle.dumps(source))):  # as in a worker process
        assert [copy[i] for i in order] == [{"image": png(20 * i), "label": i} for i in order]
    with pytest.raises(IndexError):
        source[10]


@pytest.mark.parametrize("state", [True, False])
def test_caches_next_to_the_files_of_save_to_disk_are_ignored(tables, tmp_path, state):
    names = [f"train-0000{i}-of-00002.arrow" for i in (1, 0)]
    tables("stream")
    for cache in ("cache-0123456789abcdef.arrow", "train-00000-of-00001.arrow"):  # the second is of an earlier call
        (tmp_path / cache).write_bytes((tmp_path / names[0]).read_bytes())
    if not state:
        with pytest.raises(DataError, match="cache"):
            Tables(tmp_path)
        return
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    source = Tables(tmp_path)
    assert [source[i]["label"] for i in range(len(source))] == [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    (tmp_path / names[0]).unlink()
    with pytest.raises(DataError, match=names[0]):
        Tables(tmp_path)


def test_a_folder_of_splits_names_them(tables, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").touch()
    with pytest.raises(DataError, match="train"):
        Tables(tmp_path)


def test_the_listing_depends_on_the_files(tables, tmp_path):
    before = Tables(tables("parquet")).listing(4)
    assert Tables(tmp_path).listing(4) == before
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "train-00002-of-00002.parquet")
    assert Tables(tmp_path).listing(4) != before


def test_bare_bytes_without_labels_and_rows_without_bytes(tmp_path):
    pq.write_table(pa.table({"jpg": pa.array([b"a", b"b"]), "caption": ["x", "y"]}), tmp_path / "a.parquet")
    source = Tables(tmp_path / "a.parquet")
    assert [source[i] for i in range(2)] == [{"image": b"a", "label": -1}, {"image": b"b", "label": -1}]
    rows = pa.array([{"bytes": None, "path": "elsewhere.png"}], IMAGE)
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", write_statistics=False)
    with pytest.raises(ImageError):
        Tables(tmp_path)[0]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("column", ["struct", "null", "bytes", "string"])
def test_paths_without_bytes_are_refused_before_anything_is_read(tables, tmp_path, caplog, kind, column):
    rows = [{"bytes": None, "path": f"{i}.png"} for i in range(6)]
    paths = {
        "struct": pa.array(rows, IMAGE), "null": pa.array(rows),  # of the type null
        "bytes": pa.array([None] * 6, pa.binary()), "string": pa.array(["a.png"] * 6),
    }  # fmt: skip
    file = next(tables(kind).glob("*-00000-*"))
    whole = file.read_bytes()
    table = pa.table({"image": paths[column], "label": pa.array([0] * 6)})
    with pa.OSFile(str(file), "wb") as sink:
        if kind == "parquet":
            pq.write_table(table, sink)
        else:
            with {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind](sink, table.schema) as writer:
                writer.write_table(table)
    with pytest.raises(DataError, match=r"paths are not followed") as error:
        Tables(file)
    assert error.value.field == "data.path"
    if column in ("struct", "bytes"):
        assert len(Tables(tmp_path)) == 10
        assert "6 of 10 rows have no bytes" in caplog.text
        caplog.clear()
    file.write_bytes(whole)
    Tables(tmp_path)
    assert not caplog.text


CLASSES = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}


@pytest.mark.parametrize(
    ("columns", "metadata", "accepted"),
    [
        ({"image": [b"x"], "label": pa.array([1], pa.int16()), "text": [0.5]}, None, True),
        ({"image": pa.array([{"bytes": b"x", "path": ""}], IMAGE), "label": [1]}, CLASSES, True),
        ({"img": [b"x"], "label": [1]}, None, False), ({"image": [b"x"]}, None, False),
        ({"image": [b"x"], "label": ["a"]}, None, False),
        ({"image": [b"x"], "mask": [b"y"], "label": [1]}, None, False),
        ({"image": [b"x"], "label": [1]}, {"huggingface": CLASSES["huggingface"].replace('"b"', '"c"')}, False),
    ],
)  # fmt: skip
def test_files_with_other_columns_are_refused_before_anything_is_read(
    tmp_path, monkeypatch, columns, metadata, accepted
):
    first = pa.table({"image": [b"x"], "label": [0]}).replace_schema_metadata(CLASSES)
    tables = first, first, pa.table(columns).replace_schema_metadata(metadata)
    for order in (tables, tables[::-1]):
        for i, table in enumerate(order):
            pq.write_table(table, tmp_path / f"{i}.parquet")
        with monkeypatch.context() as patch:
            patch.setattr(pq, "ParquetFile", None)  # only footers are read
            if not accepted:
                with pytest.raises(DataError, match=r"\d\.parquet' has other") as error:
                    Tables(tmp_path)
                assert error.value.field == "data.path"
                continue
            source = Tables(tmp_path)
        assert sorted(source[i]["label"] for i in range(3)) == [0, 0, 1]


def test_columns_can_be_named_and_those_in_use_are_logged(tmp_path, caplog):
    names = {"fine": {"names": ["a", "b"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": names}})}
    columns = {"image": [b"i"], "mask": [b"m"], "fine": [1], "coarse": [0], "label": ["cat"]}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    source = Tables(tmp_path)  # "label" holds strings, and one column has names of classes
    assert (source[0], source.classes) == ({"image": b"i", "label": 1}, ("a", "b"))
    source = Tables(tmp_path, "data.path", Keys("mask", "coarse"))
    assert (source[0], source.classes) == ({"image": b"m", "label": 0}, None)
    for field, keys in (("data.label_key", Keys(label="label")), ("data.image_key", Keys("fine"))):
        with pytest.raises(DataError, match="coarse: int64") as error:
            Tables(tmp_path, "data.path", keys)
        assert error.value.field == field
    assert not caplog.text
    for damaged in (
        "[",
        "[]",
        '{"info": {"features": 3}}',
        '{"info": {"features": {"fine": {"names": 3}}}}',
        "[" * 9999,
    ):
        table = pa.table(columns).replace_schema_metadata({"huggingface": damaged})
        pq.write_table(table, tmp_path / "a.parquet")
        assert (Tables(tmp_path)[0]["label"], Tables(tmp_path).classes) == (-1, None)
    assert "labels None" in caplog.text


def test_damage_is_an_image_error_and_failures_are_os_errors(tables, tmp_path, monkeypatch):
    source, file = Tables(tables("parquet")), tmp_path / "train-00000-of-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * (len(whole) - 8) + whole[-4:])
    with pytest.raises(ImageError):
        source[0]
    file.unlink()
    with pytest.raises(OSError, match="FileNotFoundError"):
        source[0]
    file.write_bytes(whole)

    def refuse(name):
        raise ConnectionError(f"{name} timed out")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_open_file", refuse)
        with pytest.raises(OSError, match="timed out"):
            source[0]
    assert source[0]["label"] == 0


@pytest.mark.parametrize("columns", [{"text": ["a"]}, {"a": [b"a"], "b": [b"b"]}, {"image": pa.array([], pa.binary())}])
def test_tables_without_images_are_refused(tmp_path, columns):
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    message = ", ".join(f"{column.name}: {column.type}" for column in table.schema) if len(table) else "no rows"
    with pytest.raises(DataError, match=message) as error:
        Tables(tmp_path)
    assert error.value.field == "data.path"


def test_damaged_files_and_mixed_kinds_are_refused(tables, tmp_path):
    tables("parquet")
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read") as error:
        Tables(tmp_path, "data.eval_path")
    assert error.value.field == "data.eval_path"
    tables("stream")
    with pytest.raises(DataError, match=r"both \.parquet and \.arrow"):
        Tables(tmp_path)


def test_large_row_groups_are_warned_of(tables, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_LARGE", 10)
    Tables(tables("parquet"))
    assert "row_group_size=100" in caplog.text


@pytest.mark.parametrize(
    ("kind", "workers"), [("parquet", 0), ("stream", 0), pytest.param("parquet", 1, marks=pytest.mark.slow)]
)
def test_training_shuffles_all_rows(tables, kind, workers):
    data = DataConfig(source="parquet", path=str(tables(kind)), image_size=8, batch_size=5, workers=workers)
    batches = train_batches(data, seed=0)
    for _ in range(2):
        pair = [next(batches) for _ in range(2)]
        assert sorted(np.concatenate([batch["label"] for batch in pair])) == list(range(10))
        assert all((batch["image"][:, 0, 0, 0] == 20 * batch["label"]).all() for batch in pair)
    batches.close()


def test_tables_in_a_bucket(tables, bucket, png):
    bucket.put(str(tables("parquet")), "/tables", recursive=True)
    source = Tables("memory://tables/train-*.parquet")
    assert [source[i] for i in (9, 0)] == [{"image": png(180), "label": 9}, {"image": png(0), "label": 0}]
