"""Datasets are read from buckets as from folders, and errors name the field."""

import sys

import numpy as np
import pytest
from PIL import Image

from vqrae_jax import storage
from vqrae_jax.config import DataConfig
from vqrae_jax.data.folder import Folder
from vqrae_jax.data.pipeline import evaluation_batches, train_batches
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
