"""Datasets are read from buckets as from folders, and errors name the field."""

import sys

import fsspec
import numpy as np
import pytest
from PIL import Image

from vqrae_jax import storage
from vqrae_jax.config import DataConfig
from vqrae_jax.data.folder import Folder
from vqrae_jax.data.pipeline import evaluation_batches, train_batches
from vqrae_jax.data.shards import list_shards
from vqrae_jax.data.source import locate, read_range
from vqrae_jax.errors import ConfigError, DataError, ImageError


def write_files(system, folder, *names):
    for name in names:
        system.pipe(f"{folder}/{name}", name.encode())


def test_locate_returns_group_and_row():
    ends = np.array([2, 2, 5])
    assert [locate(ends, i) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            locate(ends, index)


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_shards_are_a_folder_a_file_a_pattern_or_a_range(tmp_path, bucket, kind):
    names = [f"train-{i:02d}.tar" for i in range(11)]
    other = ["train.txt", ".train-00.tar", "deep/train-99.tar"]
    if kind == "local":
        folder = f"{tmp_path}/a [x] ü"
        write_files(fsspec.filesystem("file", auto_mkdir=True), folder, *names, *other)
    else:
        folder = "memory://a b/ü"
        write_files(bucket, "/a b/ü", *names, *other)
    shards = [f"{folder}/{name}" for name in names]
    expected = dict.fromkeys(("", "/", "/train-*.tar"), shards)
    expected |= {"/*-0?.tar": shards[:10], "/train-{03..10}.tar": shards[3:], "/train-07.tar": shards[7:8]}
    for pattern, files in expected.items():
        assert list_shards(folder + pattern, (".tar",), "data.path") == files
    with pytest.raises(DataError, match=r"2 of 4 .*train-11\.tar") as error:
        list_shards(f"{folder}/train-{{09..12}}.tar", (".tar",), "data.path")
    assert error.value.field == "data.path"
    with pytest.raises(DataError, match=r"\.parquet"):
        list_shards(folder, (".parquet",), "data.path")


@pytest.fixture(params=["local", "bucket"])
def tree(request, tmp_path, bucket):
    """Two folders of three shards each, and one with another name."""
    names = [f"{folder}/{name}-{i}.tar" for folder in "abc" for name in ("train", "val") for i in range(3)]
    if request.param == "bucket":
        write_files(bucket, "/data", *names)
        return "memory://data"
    write_files(fsspec.filesystem("file", auto_mkdir=True), tmp_path, *names)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/train-{0,1}.tar", "a0 a1"), ("a/train-[01].tar", "a0 a1"), ("a/train-[!1].tar", "a0 a2"),
        ("a/train-{2..0}.tar", "a2 a1 a0"), ("{a,b}/train-*.tar", "a0 a1 a2 b0 b1 b2"), ("[bc]/train-1.tar", "b1 c1"),
        ("?/train-{1..2}.tar", "a1 b1 c1 a2 b2 c2"), ("{c,{a,b}}/train-0.tar", "c0 a0 b0"),
        ("b/train-2.tar::DATA/a/train-{0..1}.tar::DATA/c/train-*", "b2 a0 a1 c0 c1 c2"),
        ("a/train*::DATA/{b,c}/val-0.tar", "a0 a1 a2 bval0 cval0"),
    ],
)  # fmt: skip
def test_patterns_have_alternatives_in_files_and_folders(tree, pattern, expected):
    pattern = f"{tree}/{pattern}".replace("DATA", tree)
    names = [name if "val" in name else f"{name[0]}train{name[1:]}" for name in expected.split()]
    files = [f"{tree}/{name[0]}/{name[1:-1]}-{name[-1]}.tar" for name in names]
    assert list_shards(pattern, (".tar",), "data.path") == files


@pytest.mark.parametrize(
    "pattern",
    [
        "a/train-{0,3}.tar", "{a,d}/train-*.tar", "[de]/train-0.tar", "a/train-*.tar::DATA/a/train-1.tar",
        "a/train-{0..999999999}.tar", "a/train-{0..99999}{0..99999}.tar", "a/train-*.tar::", "a/*",
    ],
)  # fmt: skip
def test_what_a_pattern_names_must_exist_once(tree, pattern):
    with pytest.raises(DataError) as error:
        list_shards(f"{tree}/{pattern}".replace("DATA", tree), (".tar",), "data.path")
    assert error.value.field == "data.path"


def test_the_name_of_a_folder_may_look_like_a_file_or_a_pattern(tmp_path):
    for name in ("a.tar", "{a,b}", "c::d", "[ab]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "{0,1}.tar").touch()
        for path in (name, f"{name}/{{0,1}}.tar"):
            assert list_shards(tmp_path / path, (".tar",), "data.path") == [f"{tmp_path}/{name}/{{0,1}}.tar"]


def test_relative_patterns_name_files_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "train-0.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert list_shards("train-*.tar", (".tar",), "data.path") == ["train-0.tar"]


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar.zst"])
def test_compressed_shards_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path / name, tmp_path, f"{tmp_path}/train-*"):
        with pytest.raises(DataError, match=rf"{name}' is compressed") as error:
            list_shards(path, (".tar",), "--data")
        assert error.value.field == "--data"


def test_several_splits_are_refused(tmp_path):
    for name in ("train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"\(train, validation\).*train\*\.parquet"):
        list_shards(tmp_path, (".parquet",), "data.path")


def test_parts_of_files_are_read_and_short_files_are_errors(tmp_path, bucket):
    (tmp_path / "a").write_bytes(b"0123456789")
    bucket.pipe("/a", b"0123456789")
    for path in (str(tmp_path / "a"), "memory://a"):
        assert storage.file_size(path) == 10
        assert storage.read_bytes(path) == b"0123456789"
        assert read_range(path, 3, 6) == b"345"
        with storage.open_file(path) as file:
            file.seek(8)
            assert (file.tell(), file.read()) == (8, b"89")
        with pytest.raises(ImageError):
            read_range(path, 8, 12)
    for path in (str(tmp_path / "none"), "memory://none"):
        for action in (storage.file_size, storage.read_bytes, storage.open_file):
            with pytest.raises(FileNotFoundError, match="none"):
                action(path)


def test_later_errors_of_a_bucket_are_os_errors(bucket, monkeypatch):
    bucket.pipe("/a", b"0123456789")
    file = storage.open_file("memory://a")

    def refuse(*_, **__):
        raise LookupError("the token has expired")

    monkeypatch.setattr(type(file._file), "read", refuse)
    monkeypatch.setattr(type(bucket), "cat_file", refuse)
    for action in (lambda: file.read(4), lambda: storage.read_bytes("memory://a")):
        with pytest.raises(ConnectionError, match=r"'memory://a': LookupError: the token has expired"):
            action()


def test_a_bucket_trains_and_evaluates_as_a_local_copy(tmp_path, bucket):
    for i in range(8):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), (20 * i,) * 3).save(tmp_path / f"{i % 2}" / f"{i}.png")
    bucket.put(str(tmp_path), "/data", recursive=True)
    bucket.pipe("/data/.cache/x.png", b"hidden")
    settings = {"source": "folder", "image_size": 8, "batch_size": 4, "eval_batch_size": 4}
    configs = [DataConfig(**settings, path=path, eval_path=path) for path in (str(tmp_path), "memory://data")]
    iterators = [train_batches(config, seed=0) for config in configs]
    for _ in range(3):
        local, remote = map(next, iterators)
        assert (local["image"] == remote["image"]).all()
        assert (local["label"] == remote["label"]).all()
    for local, remote in zip(*map(evaluation_batches, configs), strict=True):
        assert (local["image"] == remote["image"]).all()
        assert remote["mask"].all()


def test_errors_of_buckets_name_the_field(bucket, monkeypatch):
    write_files(bucket, "/text", "a.txt")

    def forbid(self, *args, **kwargs):
        raise PermissionError("403: no storage.objects.list access")

    def check(path, kind, message=None):
        with pytest.raises(kind, match=message) as error:
            Folder(path, "data.eval_path")
        assert (error.value.field, error.value.value) == ("data.eval_path", path)

    check("memory://none", DataError)
    check("memory://text", DataError, "no images")
    check("nonsense://x", ConfigError, "nonsense")
    monkeypatch.setattr(type(bucket), "find", forbid)
    check("memory://text", DataError, "403")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)  # other tests may have used it
    check("gs://bucket/x", ConfigError, "gcsfs")
