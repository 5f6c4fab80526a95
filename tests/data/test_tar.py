"""WebDataset shards: each image once, with its label; damaged or changed shards are noticed."""

import io
import os
import tarfile

import numpy as np
import pytest

from vqrae_jax.config import DataConfig
from vqrae_jax.data import tar
from vqrae_jax.data.pipeline import train_batches
from vqrae_jax.data.source import Keys
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


def read(path, *keys):
    source = TarShards(path, "data.path", Keys(*keys))
    return {source.key(i): (source[i]["image"].decode(), source[i]["label"]) for i in range(len(source))}


def test_images_with_further_dots_in_their_names_are_loaded(tmp_path, caplog):
    names = ["b.1.jpg", "b.1.cls", "n/b.2.JPG", "c.seg.png", "c.jpg", "2.left.jpg", "2.right.jpg", "2.cls", "c.cls"]
    path = write_tar(tmp_path / "a.tar", [(name, b"7" if name.endswith("cls") else name.encode()) for name in names])
    expected = {
        "b.1": ("b.1.jpg", 7), "n/b.2": ("n/b.2.JPG", -1), "c": ("c.jpg", 7), "2.left": ("2.left.jpg", 7),
        "2.right": ("2.right.jpg", 7),
    }  # fmt: skip
    for _ in range(2):  # the second time from the cached index
        caplog.clear()
        assert read(path) == expected
        assert "4 of 5 images have an integer label in .cls" in caplog.text
        assert "1 images belong to samples with another image" in caplog.text
    assert read(path, "seg.png") == {"c": ("c.seg.png", 7)}
    assert read(path, "LEFT.jpg") == {"2": ("2.left.jpg", 7)}


def test_members_of_images_and_labels_can_be_named(tmp_path, caplog):
    members = [("1.jpg", b"a"), ("1.json", b'{"label": 3, "fine": {}}'), ("1.lab.txt", b" 4\n"), ("1.txt", b"a cat")]
    path = write_tar(tmp_path / "a.tar", members)
    assert read(path) == {"1": ("a", -1)}
    assert "jpg (1), json (1), lab.txt (1), txt (1)" in caplog.text
    assert read(path, None, "json.label") == {"1": ("a", 3)}
    assert read(path, None, "lab.txt") == {"1": ("a", 4)}
    for field, *keys in (
        ("data.label_key", None, "txt"), ("data.label_key", None, "json.fine"), ("data.label_key", None, "json.coarse"),
        ("data.label_key", None, "cls"), ("data.image_key", "png", None),
    ):  # fmt: skip
        with pytest.raises(DataError, match="json \\(1\\)") as error:
            read(path, *keys)
        assert error.value.field == field
    for damaged in (b"1" * 5000, b"99999999999", b"-2", b"[" * 50_000):
        path = write_tar(tmp_path / "a.tar", [("1.jpg", b"a"), ("1.cls", damaged), ("1.json", damaged)])
        assert read(path) == {"1": ("a", -1)}
        with pytest.raises(DataError):
            read(path, None, "json.label")


def test_no_member_leaves_the_archive(tmp_path):
    """Members are read in place: nothing is extracted, and links and devices are not followed."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    path = write_tar(tmp_path / "shards" / "a.tar", [("../x.png", b"x"), ("/tmp/y.png", b"y"), ("n/../../z.png", b"z")])
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "dev": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    with tarfile.open(path, "a") as archive:
        for name, kind in kinds.items():
            for ending in ("png", "cls"):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.type, member.linkname = kind, "../secret.png"
                archive.addfile(member)
    assert read(path) == {"../x": ("x", -1), "tmp/y": ("y", -1), "n/../../z": ("z", -1)}
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert {name for name in files if not name.startswith("cache/")} == {"secret.png", "shards/a.tar"}


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
    monkeypatch.setattr(tar, "MAX_BYTES", 20)
    with pytest.raises(ImageError, match="20 bytes"):
        source[0]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
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
