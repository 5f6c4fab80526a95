"""Buckets are read as folders are, and what is missing or forbidden there is a sentence."""

import fsspec
import pytest
from PIL import Image

from vqrae_jax import storage
from vqrae_jax.config import DataConfig
from vqrae_jax.data import source
from vqrae_jax.data.folder import Folder
from vqrae_jax.data.pipeline import evaluation_batches, train_batches
from vqrae_jax.errors import ConfigError, DataError, ImageError


@pytest.fixture
def bucket(tmp_path):
    """fsspec's filesystem in memory stands in for a bucket; empty before and after."""
    system = fsspec.filesystem("memory")
    system.rm("/", recursive=True) if system.find("/") else None
    yield system
    system.store.clear()


def fill(system, place, *names):
    for name in names:
        system.pipe(f"{place}/{name}", name.encode())


@pytest.mark.parametrize("kind", ["here", "bucket"])
def test_shards_are_a_folder_a_file_a_pattern_or_a_range(tmp_path, bucket, kind):
    names = [f"train-{i:02d}.tar" for i in range(11)]
    if kind == "here":
        where = f"{tmp_path}/a [x] ü"
        fill(
            fsspec.filesystem("file", auto_mkdir=True), where, *names, "train.txt", ".train-00.tar", "deep/train-99.tar"
        )
    else:
        where = "memory://a b/ü"
        fill(bucket, "/a b/ü", *names, "train.txt", ".train-00.tar", "deep/train-99.tar")
    everything = [f"{where}/{name}" for name in names]
    assert source.list_shards(where, (".tar",), "data.path") == everything
    assert source.list_shards(f"{where}/", (".tar",), "data.path") == everything
    assert source.list_shards(f"{where}/train-*.tar", (".tar",), "data.path") == everything
    assert source.list_shards(f"{where}/*-0?.tar", (".tar",), "data.path") == everything[:10]
    assert source.list_shards(f"{where}/train-{{03..10}}.tar", (".tar",), "data.path") == everything[3:]
    assert source.list_shards(f"{where}/train-07.tar", (".tar",), "data.path") == everything[7:8]
    with pytest.raises(DataError, match=r"data\.path=.*2 of 4 shards are missing, the first is .*train-11\.tar"):
        source.list_shards(f"{where}/train-{{09..12}}.tar", (".tar",), "data.path")
    with pytest.raises(DataError, match=r"no \.parquet files"):
        source.list_shards(where, (".parquet",), "data.path")


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar.zst"])
def test_compressed_shards_are_told_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path / name, tmp_path, f"{tmp_path}/train-*"):
        with pytest.raises(DataError, match=rf"^--data=.*{name}' is compressed"):
            source.list_shards(path, (".tar",), "--data")


def test_several_splits_are_not_mixed(tmp_path):
    fill(fsspec.filesystem("file"), tmp_path, "train-00000-of-00002.parquet", "validation-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"several splits \(train, validation\).*train\*\.parquet"):
        source.list_shards(tmp_path, (".parquet",), "data.path")


def test_bytes_are_read_in_part_and_a_short_file_is_noticed(tmp_path, bucket):
    (tmp_path / "a").write_bytes(b"0123456789")
    bucket.pipe("/a", b"0123456789")
    for path in (str(tmp_path / "a"), "memory://a"):
        assert storage.file_size(path) == 10
        assert storage.read_bytes(path) == b"0123456789"
        assert source.read_range(path, 3, 6) == b"345"
        with storage.open_file(path) as file:
            file.seek(8)
            assert file.read() == b"89"
        with pytest.raises(ImageError, match="cut short"):
            source.read_range(path, 8, 12)
    for path in (str(tmp_path / "none"), "memory://none"):
        for action in (storage.file_size, storage.read_bytes, storage.open_file):
            with pytest.raises(FileNotFoundError, match="none"):
                action(path)


def test_what_a_bucket_refuses_later_is_an_os_error_too(bucket, monkeypatch):
    """Every kind of bucket has errors of its own, of which nobody else knows."""
    bucket.pipe("/a", b"0123456789")
    file = storage.open_file("memory://a")

    def refuse(*_, **__):
        raise LookupError("the token has expired")

    monkeypatch.setattr(type(file._file), "read", refuse)
    monkeypatch.setattr(type(bucket), "cat_file", refuse)
    for action in (lambda: file.read(4), lambda: storage.read_bytes("memory://a")):
        with pytest.raises(OSError, match=r"'memory://a': LookupError: the token has expired"):
            action()


def test_a_bucket_trains_and_evaluates_as_its_copy_here(tmp_path, bucket):
    for i in range(8):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), (20 * i,) * 3).save(tmp_path / f"{i % 2}" / f"{i}.png")
    bucket.put(str(tmp_path), "/data", recursive=True)
    bucket.pipe("/data/.cache/x.png", b"hidden")
    plain = {"source": "folder", "image_size": 8, "batch_size": 4, "eval_batch_size": 4}
    here, there = (DataConfig(**plain, path=path, eval_path=path) for path in (str(tmp_path), "memory://data"))
    mine, theirs = (train_batches(config, seed=0) for config in (here, there))
    for _ in range(3):
        one, other = next(mine), next(theirs)
        assert (one["image"] == other["image"]).all()
        assert (one["label"] == other["label"]).all()
    one, other = (list(evaluation_batches(config)) for config in (here, there))
    assert all((a["image"] == b["image"]).all() and b["mask"].all() for a, b in zip(one, other, strict=True))


def test_what_is_wrong_with_a_bucket_is_a_sentence(bucket, monkeypatch):
    with pytest.raises(DataError, match=r"data\.path='memory://none': does not exist or is empty"):
        Folder("memory://none")
    with pytest.raises(ConfigError, match=r"data\.path='nonsense://x'"):
        Folder("nonsense://x")
    fill(bucket, "/text", "a.txt")
    with pytest.raises(DataError, match="no images"):
        Folder("memory://text")

    def forbidden(self, *args, **kwargs):
        raise PermissionError("403: no storage.objects.list access")

    monkeypatch.setattr(type(bucket), "find", forbidden)
    with pytest.raises(DataError, match=r"data\.eval_path='memory://text'.*cannot be listed .*403"):
        Folder("memory://text", "data.eval_path")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"data\.path='gs://bucket/x': .*gcsfs"):
        Folder("gs://bucket/x")
