"""Shards of codes: what is written is read, and what is damaged or missing is named."""

import collections
import concurrent.futures
import pickle
import time

import numpy as np
import pytest

from vqrae_jax import storage
from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import SUFFIXES, Columns, read_shard
from vqrae_jax.errors import DataError


def plan(form="npz", **changes):
    fields = {
        "tokenizer": "0" * 64, "source": "made up", "images": 10, "views": "one", "code_shape": (2, 2),
        "code_dtype": "int32", "codebook_size": 100_000, "image_size": 32, "format": form, "shard_size": 4,
    }  # fmt: skip
    return codes.Plan(**(fields | changes))


def columns(index):
    index = np.asarray(index, np.int64)
    grids = (index[:, None, None] * 7919 + np.arange(4).reshape(2, 2)).astype(np.int32)
    return Columns(index, [f"a b/ü {i}.png" for i in index], (index % 3).astype(np.int32), grids)


def write(folder, described, unreadable=()):
    for shard in codes.start_dataset(folder, described):
        there = [i for i in range(*described.image_range(shard)) if i not in unreadable]
        codes.write_shard(folder, described, shard, columns(there))
    return codes.finish_dataset(folder, described)


@pytest.mark.parametrize("form", SUFFIXES)
@pytest.mark.parametrize("where", ["here", "bucket"])
def test_what_is_written_is_read(tmp_path, form, where, request, monkeypatch):
    """A whole shard may be unreadable images."""
    folder = tmp_path / "codes"
    if where == "bucket":
        request.getfixturevalue("buckets")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder = f"gs://bucket/{tmp_path.name}"
    manifest = write(folder, plan(form), unreadable=(1, 4, 5, 6, 7))
    assert manifest["skipped"] == [1, 4, 5, 6, 7]
    assert codes.start_dataset(folder, plan(form)) == []
    read, expected = codes.Codes(folder), columns([0, 2, 3, 8, 9])
    read.verify()
    assert len(read) == 5
    for i, record in enumerate(read):
        np.testing.assert_array_equal(record["codes"], expected.codes[i])
        assert record["codes"].dtype == np.int32
        assert (record["index"], record["id"], record["label"]) == (
            expected.index[i], expected.id[i], expected.label[i],
        )  # fmt: skip
    np.testing.assert_array_equal(read[-1]["codes"], read[4]["codes"])
    with pytest.raises(IndexError):
        read[5]
    for wrong in (slice(0, 2), 1.5, "a"):
        with pytest.raises(TypeError, match=r"codes\[.*\]: expected an integer"):
            read[wrong]


@pytest.mark.parametrize("form", SUFFIXES)
def test_writing_is_the_same_bytes_every_time(tmp_path, form):
    for name in "ab":
        write(tmp_path / name, plan(form))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_damaged_shard_is_named(tmp_path, form):
    write(tmp_path, plan(form))
    file = tmp_path / plan(form).file_name(1)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"codes-00001-of-00003"):
        codes.Codes(tmp_path)[5]
    with pytest.raises(DataError, match=r"codes-00001-of-00003.*manifest"):
        codes.Codes(tmp_path).verify()
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        codes.Codes(tmp_path)[5]


def test_few_shards_are_kept(tmp_path):
    write(tmp_path, plan())
    read = codes.Codes(tmp_path, cached=1)
    assert [read[i]["index"] for i in (9, 0, 5)] == [9, 0, 5]
    assert len(read._cache) == 1


@pytest.mark.parametrize("kind", ["manifest", "shard"])
def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch, kind):
    """On storage that containers share, whose processes all have the same number."""
    described, sync, others = plan(), storage._sync, []
    codes.start_dataset(tmp_path, described)

    def put():
        if kind == "manifest":
            storage.write_bytes(tmp_path / codes.MANIFEST, b"{}", durable=True)
        else:
            codes.write_shard(tmp_path, described, 0, columns(range(4)))

    def meanwhile(path):
        if not others:
            others.append(path)
            put()
        sync(path)

    monkeypatch.setattr(storage, "_sync", meanwhile)
    put()
    assert {p.name for p in tmp_path.iterdir()} == {codes.MANIFEST} | (
        {described.file_name(0)} if kind == "shard" else set()
    )


def test_a_writer_whose_folder_somebody_else_has_taken_leaves_it_alone(tmp_path):
    """Two commands at once, or a folder that was deleted and begun again while the first still ran somewhere."""
    old, new = plan(), plan(tokenizer="1" * 64)
    codes.start_dataset(tmp_path, old)
    codes.write_shard(tmp_path, old, 0, columns(range(4)))
    for file in tmp_path.iterdir():
        file.unlink()
    codes.start_dataset(tmp_path, new)
    codes.write_shard(tmp_path, new, 0, columns(range(4)))
    before = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
    for action in (
        lambda: codes.write_shard(tmp_path, old, 0, columns(range(4))),
        lambda: codes.finish_dataset(tmp_path, old),
    ):
        with pytest.raises(DataError, match=r"has codes that differ in tokenizer \('1111.*, now '0000"):
            action()
    assert {file.name: file.stat().st_ino for file in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path):
    codes.start_dataset(tmp_path, plan())
    shard, taken = tmp_path / plan().file_name(0), tmp_path / "taken.json"
    for path, put in (
        (taken, lambda: storage.write_bytes(taken, b"{}", durable=True)),
        (shard, lambda: codes.write_shard(tmp_path, plan(), 0, columns(range(4)))),
    ):
        path.mkdir()
        with pytest.raises(IsADirectoryError) as told:
            put()
        assert told.value.filename == str(path)
        assert told.value.filename2 is None


@pytest.mark.parametrize(
    ("said", "kind"), [("write() failed: No space left on device; at byte 9", "28"), ("close() failed: lost", "5")]
)
def test_what_array_record_cannot_write_is_an_error_of_the_disk(tmp_path, monkeypatch, said, kind):
    class Full:
        def __init__(self, *_): ...

        def write(self, _): ...

        def close(self):
            raise RuntimeError(said)

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Full)
    codes.start_dataset(tmp_path, plan("array_record"))
    path = tmp_path / plan("array_record").file_name(0)
    with pytest.raises(OSError, match=rf"Errno {kind}\] .*: '{path}'"):
        codes.write_shard(tmp_path, plan("array_record"), 0, columns(range(4)))
    assert [file.name for file in tmp_path.iterdir()] == [codes.MANIFEST]


def test_threads_share_it(tmp_path):
    """One thread may drop the shard that another has just put there."""
    write(tmp_path, plan())
    read, order = codes.Codes(tmp_path, cached=1), np.random.default_rng(0).integers(0, 10, (8, 200))

    class Kept(collections.OrderedDict):
        def move_to_end(self, key):
            time.sleep(0)  # gives way to another thread
            super().move_to_end(key)

    read._cache = Kept()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda indices: [read[i]["index"] for i in indices], order))
    np.testing.assert_array_equal(seen, order)
    assert len(read._cache) == 1


def test_a_copy_in_another_process_reads_for_itself(tmp_path):
    write(tmp_path, plan())
    read = codes.Codes(tmp_path, cached=2)
    read[0]
    sent = pickle.dumps(read)
    assert len(sent) == len(pickle.dumps(codes.Codes(tmp_path, cached=2)))  # without what was read
    assert [pickle.loads(sent)[i]["index"] for i in range(10)] == list(range(10))


def test_what_is_no_dataset_of_codes(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json"):
        codes.Codes(tmp_path)
    (tmp_path / codes.MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="does not describe codes"):
        codes.Codes(tmp_path)
    (tmp_path / codes.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        codes.Codes(tmp_path)
    with pytest.raises(DataError, match="not a shard of codes"):
        read_shard(tmp_path / "x.bin")


def test_codes_without_a_manifest_are_not_touched(tmp_path):
    (tmp_path / plan().file_name(0)).write_bytes(b"someone's")
    with pytest.raises(DataError, match=r"has codes without manifest\.json"):
        codes.start_dataset(tmp_path, plan())
