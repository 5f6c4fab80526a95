"""WebDataset shards: each image once, with its label; damaged or changed shards are noticed."""

import io
import os
import tarfile

import numpy as np
import pytest

from vqrae_jax.config import DataConfig
from vqrae_jax.data import tar
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.data.tar import TarShards
from vqrae_jax.errors import DataError, ImageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vqrae_jax" / "tar"


def write_tar(path, members, mode="w", **options):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode, **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path, png):
    """Ten images, number i of gray level 20 * i and label i, in three shards."""
    for shard, numbers in enumerate((range(4), range(4, 7), range(7, 10))):
        members = [
            (f"./n/{i:03d}.{end}", data) for i in numbers for end, data in (("png", png(20 * i)), ("cls", b"%d\n" % i))
        ]
        write_tar(tmp_path / "shards" / f"train-{shard}.tar", members)
    return tmp_path / "shards"


def test_records_are_images_with_labels(shards, cache, png):
    for _ in range(2):  # the second one uses cached indices
        source = TarShards(shards)
        assert [source[i] for i in range(len(source))] == [{"image": png(20 * i), "label": i} for i in range(10)]
        assert len(list(cache.glob("*.npz"))) == 3
        assert {file.suffix for file in cache.iterdir()} == {".npz"}
    assert [source.key(i) for i in range(10)] == [f"n/{i:03d}" for i in range(10)]
    assert "train-1.tar" in source.name(4)
    assert "n/004" in source.name(4)


def test_members_are_grouped_by_name_and_others_are_ignored(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("x/1.cls", b"7"), ("x/1.JPG", b"first"), ("x/1.png", b"second of this name"), ("x/1.seg.png", b"a mask"),
        ("y/1.webp", b"another folder"), ("../../etc/2.png", b"an unsafe name"), ("a" * 200 + "/ü 猫.png", b"long"),
        ("bad.png", b"bad label"), ("bad.cls", b"seven"), ("._1.png", b"hidden"), ("notes.txt", b"text"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    source = TarShards(path)
    labels = {record["image"]: record["label"] for record in (source[i] for i in range(len(source)))}
    unlabelled = (b"another folder", b"an unsafe name", b"long", b"bad label")
    assert labels == {b"first": 7} | dict.fromkeys(unlabelled, -1)
    keys = {source.key(i) for i in range(len(source))}
    assert keys == {"x/1", "y/1", "../../etc/2", "a" * 200 + "/ü 猫", "bad"}


def test_changed_shards_and_damaged_indices_are_indexed_again(shards, cache):
    TarShards(shards)
    write_tar(shards / "train-1.tar", [("new.png", b"new")])
    assert len(TarShards(shards)) == 8
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert len(TarShards(shards)) == 8


def test_equal_relative_names_in_two_folders_have_two_indices(tmp_path, monkeypatch):
    for name in ("a", "b"):  # with equal times and sizes, as in disk images
        os.utime(write_tar(tmp_path / name / "0.tar", [(f"{name}.png", name.encode())]), (0, 0))
        monkeypatch.chdir(tmp_path / name)
        source = TarShards("0.tar")
        assert (source.key(0), source[0]["image"]) == (name, name.encode())


def test_a_cache_that_is_not_writable_is_not_needed(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(TarShards(shards)) == 10


@pytest.mark.parametrize("kind", ["gz", "text", "cut", "images missing", "shard missing"])
def test_unreadable_shards_are_named(shards, kind):
    path = shards / "train-1.tar"
    if kind == "gz":
        write_tar(path, [("a.png", b"a")], "w:gz")
    elif kind == "text":
        path.write_text("not a tar file" * 100)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "images missing":
        path = write_tar(shards / "val-0.tar", [("a.txt", b"a")])
    else:
        path = shards / "none.tar"
    with pytest.raises(DataError, match=path.name) as error:
        TarShards(path, "data.eval_path")
    assert error.value.field == "data.eval_path"


def headers(path):
    """Returns the byte offsets of the members of a tar file, and of its end."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
        return [member.offset for member in archive], last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize("inside", [0, 100, 511])
def test_a_shard_cut_at_or_inside_a_header_is_an_error(shards, inside):
    path = shards / "train-1.tar"
    offsets, end = headers(path)
    whole = path.read_bytes()
    for start in (*offsets[1:], end):
        path.write_bytes(whole[: start + inside])
        with pytest.raises(DataError, match=rf"train-1\.tar.*cut short at byte {start}"):
            TarShards(shards)


def test_a_damaged_header_is_an_error(shards):
    path = shards / "train-1.tar"
    start, whole = headers(path)[0][2], bytearray(path.read_bytes())
    whole[start + 150] ^= 1  # in the checksum
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"damaged at byte {start}"):
        TarShards(shards)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_padding_after_the_end_is_optional(shards, blocks):
    path = shards / "train-1.tar"
    path.write_bytes(path.read_bytes()[: headers(path)[1] + 512 * blocks])
    assert len(TarShards(shards)) == 10


def test_images_that_are_cut_short_or_too_large_are_image_errors(shards, monkeypatch):
    source = TarShards(shards)
    path = shards / "train-1.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ImageError):
        source[6]
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 20)
    with pytest.raises(ImageError, match="20 bytes"):
        source[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_shuffles_all_shards(shards, workers):
    sizes = {"image_size": 8, "batch_size": 5, "workers": workers}
    data = DataConfig(source="webdataset", path=f"{shards}/train-{{0..2}}.tar", **sizes)
    batches = train_batches(data, seed=0)
    pair = [next(batches) for _ in range(2)]
    batches.close()
    assert sorted(np.concatenate([batch["label"] for batch in pair])) == list(range(10))
    assert all((batch["image"][:, 0, 0, 0] == 20 * batch["label"]).all() for batch in pair)


def test_shards_in_a_bucket(shards, bucket, png):
    bucket.put(str(shards), "/shards", recursive=True)
    source = TarShards("memory://shards/train-*.tar")
    assert [source[i]["label"] for i in range(10)] == list(range(10))
    assert source[9]["image"] == png(180)


def test_the_listing_depends_on_the_first_images(shards, png):
    before = TarShards(shards).listing(4)
    write_tar(shards / "train-2.tar", [("new.png", b"new")])
    assert TarShards(shards).listing(4) == before
    write_tar(shards / "train-0.tar", [(f"n/{i:03d}.png", png(20 * i) + b" ") for i in range(4)])
    assert TarShards(shards).listing(4) != before
