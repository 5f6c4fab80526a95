"""Shards of codes: what is written is read, and damaged or missing shards are named."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import pickle
import unittest.mock

import numpy as np
import pytest

from vqrae_jax import storage
from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import SUFFIXES, Columns, read_shard
from vqrae_jax.errors import DataError


def make_plan(form="npz", **changes):
    fields = {
        "tokenizer": "0" * 64, "source": "test", "images": 10, "views": "one", "code_shape": (2, 2),
        "code_dtype": "int32", "codebook_size": 100_000, "image_size": 32, "format": form, "shard_size": 4,
    }  # fmt: skip
    return codes.Plan(**(fields | changes))


def columns(index):
    index = np.asarray(index, np.int64)
    grids = (index[:, None, None] * 7919 + np.arange(4).reshape(2, 2)).astype(np.int32)
    return Columns(index, [f"a b/ü {i}.png" for i in index], (index % 3).astype(np.int32), grids)


def write_dataset(folder, plan, unreadable=()):
    for shard in codes.start_dataset(folder, plan):
        readable = [i for i in range(*plan.image_range(shard)) if i not in unreadable]
        codes.write_shard(folder, plan, shard, columns(readable))
    return codes.finish_dataset(folder, plan)


@pytest.mark.parametrize(("kind", "form"), [
    *(("local", form) for form in SUFFIXES),
    *(("bucket", form) if form == "npz" else pytest.param("bucket", form, marks=pytest.mark.slow) for form in SUFFIXES),
])  # fmt: skip
def test_datasets_are_read_as_they_are_written(tmp_path, form, kind, request, monkeypatch):
    folder, plan = tmp_path / "codes", make_plan(form)
    if kind == "bucket":
        request.getfixturevalue("buckets")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder = f"gs://bucket/{tmp_path.name}"
    manifest = write_dataset(folder, plan, unreadable=(1, 4, 5, 6, 7))  # the second shard has no rows
    assert manifest["skipped"] == [1, 4, 5, 6, 7]
    assert codes.start_dataset(folder, plan) == []
    dataset, expected = codes.Codes(folder), columns([0, 2, 3, 8, 9])
    dataset.verify()
    assert len(dataset) == 5
    for i, record in enumerate(dataset):
        np.testing.assert_array_equal(record["codes"], expected.codes[i], strict=True)
        row = expected.index[i], expected.id[i], expected.label[i]
        assert (record["index"], record["id"], record["label"]) == row
    np.testing.assert_array_equal(dataset[-1]["codes"], dataset[4]["codes"])
    for loaded, column in zip(dataset.load(), (expected.codes, expected.label), strict=True):
        np.testing.assert_array_equal(loaded, column, strict=True)
    for index in (5, -6):
        with pytest.raises(IndexError):
            dataset[index]
    for index in (slice(0, 2), 1.5, "a"):
        with pytest.raises(TypeError, match="integer"):
            dataset[index]


def test_a_manifest_of_an_earlier_version_has_no_grids_until_it_is_completed_again(tmp_path):
    earlier, plan = make_plan(), make_plan(grids=((2, 2),))
    write_dataset(tmp_path, earlier)
    manifest = json.loads((tmp_path / codes.MANIFEST).read_text())
    del manifest["grids"], manifest["sha256"]
    (tmp_path / codes.MANIFEST).write_text(json.dumps(manifest))
    dataset = codes.Codes(tmp_path)
    assert (dataset.plan.grids, dataset.plan.levels) == ((), None)
    shards = {path: path.stat().st_ino for path in tmp_path.glob("codes-*")}
    assert codes.start_dataset(tmp_path, plan) == []
    assert codes.finish_dataset(tmp_path, plan)["shards"] == manifest["shards"]
    assert {path: path.stat().st_ino for path in tmp_path.glob("codes-*")} == shards
    assert codes.Codes(tmp_path).plan == plan
    assert codes.Codes(tmp_path).digest == dataset.digest  # a run that resumes has the same codes
    with pytest.raises(DataError, match="grids") as error:
        codes.start_dataset(tmp_path, make_plan(grids=((1, 4),)))
    assert error.value.field == "--output"


@pytest.mark.parametrize(("shape", "views", "grids", "levels"), [
    ((4,), "one", ((1, 4),), 1), ((2, 4), "flip", ((2, 2),), 1), ((4, 4), "one", ((1, 4),), 4),
    ((2, 2, 3), "one", ((2, 2),), 3), ((5,), "one", ((1, 1), (2, 2)), 1), ((4,), "one", ((1, 3),), None),
    ((2, 2), "one", ((3, 3),), None),
])  # fmt: skip
def test_grids_have_the_codes_of_one_view(tmp_path, shape, views, grids, levels):
    plan = make_plan(images=0, code_shape=shape, views=views, grids=grids)
    write_dataset(tmp_path, plan)
    if levels is not None:
        assert codes.Codes(tmp_path).plan.levels == levels
        return
    with pytest.raises(DataError, match="grids") as error:
        codes.Codes(tmp_path)
    assert error.value.field == str(tmp_path / codes.MANIFEST)


@pytest.mark.parametrize("form", SUFFIXES)
def test_writing_twice_gives_the_same_bytes(tmp_path, form):
    for name in "ab":
        write_dataset(tmp_path / name, make_plan(form))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("form", SUFFIXES)
def test_no_flipped_bit_is_read(tmp_path, form):
    plan, rng = make_plan(form), np.random.default_rng(0)
    manifest = json.loads(json.dumps(write_dataset(tmp_path, plan)))  # with lists
    for name, tries in ((plan.file_name(0), 60), (codes.MANIFEST, 100)):
        whole = (tmp_path / name).read_bytes()
        for position in rng.integers(0, 8 * len(whole), tries):
            damaged = bytearray(whole)
            damaged[position // 8] ^= 1 << position % 8
            (tmp_path / name).write_bytes(damaged)
            try:
                dataset = codes.Codes(tmp_path)
                dataset[0]
            except DataError:
                continue
            assert name == codes.MANIFEST, f"bit {position}"
            assert {**dataset.manifest, "sha256": manifest["sha256"]}.items() >= manifest.items()  # only its name
        (tmp_path / name).write_bytes(whole)


def test_a_damaged_shard_of_a_complete_dataset_is_written_again(tmp_path):
    plan = make_plan("webdataset")
    manifest = write_dataset(tmp_path, plan)
    file = tmp_path / plan.file_name(1)
    file.write_bytes(file.read_bytes().replace(b"a b/", b"a c/"))  # readable, as tar files have no checksums
    assert codes.start_dataset(tmp_path, plan) == [1]
    assert write_dataset(tmp_path, plan) == manifest
    assert codes.start_dataset(tmp_path, plan) == []


@pytest.mark.parametrize("form", SUFFIXES)
def test_damaged_and_missing_shards_are_named(tmp_path, form):
    plan = make_plan(form)
    write_dataset(tmp_path, plan)
    file = tmp_path / plan.file_name(1)
    file.write_bytes(file.read_bytes()[:40])
    for action in (lambda: codes.Codes(tmp_path)[5], lambda: codes.Codes(tmp_path).verify()):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.field == str(file)
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        codes.Codes(tmp_path)[5]


def test_the_number_of_cached_shards_is_limited_also_with_threads(tmp_path):
    write_dataset(tmp_path, make_plan())
    dataset, order = codes.Codes(tmp_path, cached=1), np.random.default_rng(0).integers(0, 10, (8, 200))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(lambda row: [dataset[i]["index"] for i in row], order))
    np.testing.assert_array_equal(indices, order)
    assert dataset._load_shard.cache_info().currsize == 1


def test_a_pickled_dataset_has_no_cached_shards(tmp_path):
    write_dataset(tmp_path, make_plan())
    dataset = codes.Codes(tmp_path, cached=2)
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) == len(pickle.dumps(codes.Codes(tmp_path, cached=2)))
    assert [pickle.loads(content)[i]["index"] for i in range(10)] == list(range(10))


@pytest.mark.parametrize("kind", ["manifest", "shard"])
def test_two_writers_of_one_file_use_different_temporary_files(tmp_path, monkeypatch, kind):
    plan, sync, nested = make_plan(), storage._sync, []
    codes.start_dataset(tmp_path, plan)

    def write():
        if kind == "manifest":
            storage.write_bytes(tmp_path / codes.MANIFEST, b"{}", durable=True)
        else:
            codes.write_shard(tmp_path, plan, 0, columns(range(4)))

    def write_meanwhile(path):
        if not nested:
            nested.append(path)
            write()
        sync(path)

    monkeypatch.setattr(storage, "_sync", write_meanwhile)
    write()
    assert nested
    shards = {plan.file_name(0)} if kind == "shard" else set()
    assert {path.name for path in tmp_path.iterdir()} == {codes.MANIFEST} | shards


def test_a_dataset_that_replaced_this_one_is_left_unchanged(tmp_path):
    old, new = make_plan(), make_plan(tokenizer="1" * 64)
    codes.start_dataset(tmp_path, old)
    codes.write_shard(tmp_path, old, 0, columns(range(4)))
    for file in tmp_path.iterdir():
        file.unlink()
    codes.start_dataset(tmp_path, new)
    codes.write_shard(tmp_path, new, 0, columns(range(4)))
    before = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
    for function, *args in ((codes.write_shard, 0, columns(range(4))), (codes.finish_dataset,)):
        with pytest.raises(DataError, match=r"tokenizer \('1111.*, now '0000") as error:
            function(tmp_path, old, *args)
        assert error.value.field == "--output"
    assert {file.name: file.stat().st_ino for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("message", "number"), [("write() failed: No space left on device; at byte 9", "28"), ("close() failed: lost", "5")]
)
def test_write_errors_of_array_record_are_os_errors(tmp_path, monkeypatch, message, number):
    writer = unittest.mock.Mock(**{"close.side_effect": RuntimeError(message)})
    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", lambda *_: writer)
    plan = make_plan("array_record")
    codes.start_dataset(tmp_path, plan)
    with pytest.raises(OSError, match=rf"Errno {number}\] .*: '{tmp_path / plan.file_name(0)}'"):
        codes.write_shard(tmp_path, plan, 0, columns(range(4)))
    assert [file.name for file in tmp_path.iterdir()] == [codes.MANIFEST]


def test_other_folders_and_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no manifest") as error:
        codes.Codes(tmp_path)
    assert error.value.field == str(tmp_path)
    for content in ("{}", "{"):
        (tmp_path / codes.MANIFEST).write_text(content)
        with pytest.raises(DataError) as error:
            codes.Codes(tmp_path)
        assert error.value.field == str(tmp_path / codes.MANIFEST)
    with pytest.raises(DataError, match=r"\.npz, "):
        read_shard(tmp_path / "x.bin")
    (tmp_path / codes.MANIFEST).unlink()
    (tmp_path / make_plan().file_name(0)).write_bytes(b"other codes")
    with pytest.raises(DataError) as error:
        codes.start_dataset(tmp_path, make_plan())
    assert error.value.field == "--output"


NESTED = "replaced by deeply nested lists"
EDITS = {
    "deleted": ..., "null": None, "-1": -1, "0": 0, "x": "x", "[]": [], "{}": {}, "1e30": 1e30, "10**40": 10**40,
    "nested": NESTED, "true": True, "../x": "../x",
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_one_error(tmp_path, edit):
    """With the checksum as it was, every edit is refused; with a new one, each that contradicts anything."""
    write_dataset(tmp_path, make_plan(listing="1" * 64, grids=((2, 2),)), unreadable=[3])
    file = tmp_path / codes.MANIFEST
    whole, records = file.read_text(), list(codes.Codes(tmp_path))
    fields = [(name,) for name in json.loads(whole)] + [("shards", 1, name) for name in json.loads(whole)["shards"][0]]
    for path in fields:
        for digest in ("kept", "new"):
            manifest = json.loads(whole)
            target = manifest if len(path) == 1 else manifest["shards"][path[1]]
            before = target.pop(path[-1])
            if EDITS[edit] is not ...:
                target[path[-1]] = EDITS[edit]
            if digest == "new" and path != ("sha256",):
                manifest["sha256"] = codes._digest(manifest)
            for depth in (50, 900, 100_000) if edit == "nested" else (1,):
                text = json.dumps(manifest).replace(json.dumps(NESTED), "[" * depth + "]" * depth)
                file.write_text(text)
                same = EDITS[edit] is before or (path == ("sha256",) and EDITS[edit] in (..., None))
                with contextlib.suppress(DataError) if digest == "new" or same else pytest.raises(DataError) as error:
                    assert list(map(str, codes.Codes(tmp_path))) == list(map(str, records))
                assert error is None or (error.value.field == str(file) and len(str(error.value)) < 1000), path
                with pytest.raises(DataError):
                    codes.start_dataset(tmp_path, make_plan(tokenizer="2" * 64))


def rows(index, **changes):
    return dataclasses.replace(columns(index), **changes)


@pytest.mark.parametrize(
    "shard",
    [
        rows([0, 1, 1, 3]), rows([0, 2, 1, 3]), rows([0, 1, 2, 4]), rows([-1, 0, 1, 2]),
        rows(range(4), codes=np.full((4, 2, 2), 100_000, np.int32)),
        rows(range(4), codes=np.full((4, 2, 2), -1, np.int32)),
        rows(range(4), codes=np.zeros((4, 2, 3), np.int32)), rows(range(4), codes=np.zeros((4, 2, 2), np.uint16)),
        rows(range(4), label=np.zeros(3, np.int32)), rows(range(4), id=["a"]),
    ],
)  # fmt: skip
def test_codes_out_of_range_and_repeated_images_are_refused(tmp_path, shard):
    plan = make_plan()
    write_dataset(tmp_path, plan)
    file = tmp_path / plan.file_name(0)
    codes.write_shard(tmp_path, plan, 0, shard)
    manifest = json.loads((tmp_path / codes.MANIFEST).read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    del manifest["sha256"]
    (tmp_path / codes.MANIFEST).write_text(json.dumps(manifest))
    for action in (lambda: codes.Codes(tmp_path)[0], lambda: codes.finish_dataset(tmp_path, plan)):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.field == str(file)
