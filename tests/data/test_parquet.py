"""Parquet and Arrow files, in the layouts of Hugging Face `datasets`, give each row's image and label."""

import io
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vqrae_jax.config import DataConfig
from vqrae_jax.data import parquet
from vqrae_jax.data.parquet import Tables
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.errors import DataError, ImageError


def png(level):
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (level,) * 3).save(stream, "PNG")
    return stream.getvalue()


def table(numbers, name="image"):
    images = [{"bytes": png(20 * i), "path": f"{i}.png"} for i in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({name: pa.array(images, kind), "label": pa.array(list(numbers), pa.int64())})


def write(folder, kind, name="image"):
    """Ten images in two files, as Parquet in groups of two rows, or as Arrow in batches of two."""
    for number, rows in enumerate((range(6), range(6, 10))):
        path, data = folder / f"train-0000{number}-of-00002", table(rows, name)
        if kind == "parquet":
            pq.write_table(data, f"{path}.parquet", row_group_size=2)
            continue
        new = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
        with new(f"{path}.arrow", data.schema) as writer:
            writer.write_table(data, max_chunksize=2)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("name", ["image", "img"])
def test_each_row_has_its_image_and_label(tmp_path, kind, name):
    source = Tables(write(tmp_path, kind, name))
    order = np.random.default_rng(0).permutation(10)
    for copy in (source, pickle.loads(pickle.dumps(source))):  # as a worker process gets it
        assert [copy[i] for i in order] == [{"image": png(20 * i), "label": i} for i in order]
    with pytest.raises(IndexError):
        source[10]


def test_its_listing_tells_other_files(tmp_path):
    before = Tables(write(tmp_path, "parquet")).hash_listing(4)
    assert Tables(tmp_path).hash_listing(4) == before
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "train-00002-of-00002.parquet")
    assert Tables(tmp_path).hash_listing(4) != before


def test_bare_bytes_without_labels(tmp_path):
    pq.write_table(pa.table({"jpg": pa.array([b"a", b"b"]), "caption": ["x", "y"]}), tmp_path / "a.parquet")
    source = Tables(tmp_path / "a.parquet")
    assert [source[i] for i in range(2)] == [{"image": b"a", "label": -1}, {"image": b"b", "label": -1}]


def test_a_row_without_bytes_is_an_unreadable_image(tmp_path):
    rows = pa.array(
        [{"bytes": None, "path": "elsewhere.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match="no bytes"):
        Tables(tmp_path)[0]


def test_damage_is_told_from_what_cannot_be_read_now(tmp_path, monkeypatch):
    write(tmp_path, "parquet")
    source, file = Tables(tmp_path), tmp_path / "train-00000-of-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * (len(whole) - 8) + whole[-4:])
    with pytest.raises(ImageError, match="Error: "):
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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"no column of encoded images; the columns are text: string"),
        ({"a": [b"a"], "b": [b"b"]}, "several columns of bytes"),
        ({"image": pa.array([], pa.binary())}, "no rows"),
    ],
)
def test_tables_without_images_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        Tables(tmp_path)


def test_damaged_files_and_mixed_kinds_are_named(tmp_path):
    write(tmp_path, "parquet")
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"data\.eval_path=.*cannot be read"):
        Tables(tmp_path, "data.eval_path")
    write(tmp_path, "stream")
    with pytest.raises(DataError, match=r"both \.parquet and \.arrow"):
        Tables(tmp_path)


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_LARGE", 10)
    Tables(write(tmp_path, "parquet"))
    assert "write smaller ones (row_group_size=100)" in caplog.text


@pytest.mark.parametrize(("kind", "workers"), [("parquet", 0), ("stream", 0), ("parquet", 1)])
def test_training_reads_them_shuffled(tmp_path, kind, workers):
    data = DataConfig(source="parquet", path=str(write(tmp_path, kind)), image_size=8, batch_size=5, workers=workers)
    batches = train_batches(data, seed=0)
    for _ in range(2):
        pair = [next(batches) for _ in range(2)]
        assert sorted(np.concatenate([batch["label"] for batch in pair])) == list(range(10))
        assert all((batch["image"][:, 0, 0, 0] == 20 * batch["label"]).all() for batch in pair)
    batches.close()


def test_a_bucket_of_tables(tmp_path):
    system = fsspec.filesystem("memory")
    system.put(str(write(tmp_path, "parquet")), "/tables", recursive=True)
    try:
        source = Tables("memory://tables/train-*.parquet")
        assert [source[i] for i in (9, 0)] == [{"image": png(180), "label": 9}, {"image": png(0), "label": 0}]
    finally:
        system.store.clear()
