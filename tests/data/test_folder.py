"""Folders of images: which files are images, in which order, and with which labels."""

import os
import pickle
import socket
import tracemalloc

import pytest

from vqrae_jax import storage
from vqrae_jax.config import DataConfig
from vqrae_jax.data import pipeline
from vqrae_jax.data.folder import Folder, list_images
from vqrae_jax.data.images import MAX_BYTES
from vqrae_jax.data.readable import Replaced, Skipped
from vqrae_jax.errors import DataError, ImageError


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode(errors="replace"))


def test_images_are_listed_in_a_fixed_order_without_hidden_files(tmp_path):
    write_files(tmp_path, "b/2.JPG", "b/1.png", "a ü/猫.webp", "top.GIF", "notes.txt", ".hidden.png", ".cache/x.png")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # listed once
    files = [os.path.relpath(path, tmp_path).replace(os.sep, "/") for path in list_images(tmp_path)]
    assert files == ["a ü/猫.webp", "b/1.png", "b/2.JPG", "top.GIF"]


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "file.png").touch()
    (tmp_path / "empty").mkdir()
    for name, reason in [("none", "does not exist"), ("file.png", "is a file"), ("empty", "no images")]:
        with pytest.raises(DataError, match=reason) as error:
            Folder(tmp_path / name, "data.eval_path")
        assert error.value.field == "data.eval_path"
        assert error.value.value == str(tmp_path / name)


def test_a_flat_folder_has_no_labels(tmp_path):
    write_files(tmp_path, "b.png", "a b.JPG", "ü.webp")
    source = Folder(tmp_path)
    assert [source[i] for i in range(len(source))] == [
        {"image": name.encode(), "label": -1} for name in ("a b.JPG", "b.png", "ü.webp")
    ]
    assert repr(source) == repr(Folder(tmp_path))


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    write_files(tmp_path, "dög/1.png", "cat/deep/2.png", "cat/1.png", "eel/3.gif", "no images/readme.txt", "loose.png")
    source = Folder(tmp_path)
    assert source.classes == ("cat", "dög", "eel", "no images")
    labels = {record["image"].decode(): record["label"] for record in source}
    assert labels == {"cat/1.png": 0, "cat/deep/2.png": 0, "dög/1.png": 1, "eel/3.gif": 2, "loose.png": -1}


@pytest.mark.parametrize("missing", ["a", "b", "c", "image of b"])
def test_a_class_without_images_moves_no_number(tmp_path, caplog, missing):
    write_files(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val") for name in "abc"))
    (tmp_path / "val" / missing[-1] / "1.png").unlink()
    if not missing.startswith("image"):
        (tmp_path / "val" / missing).rmdir()
    (tmp_path / "train" / "b" / "1.png").unlink()
    data = DataConfig(path=str(tmp_path / "train"), eval_path=str(tmp_path / "val"))
    for source in (pipeline.training_source(data), pipeline.evaluation_source(data)):
        assert source.classes == ("a", "b", "c")
        for i in range(len(source)):
            assert source[i]["label"] == "abc".index(source.key(i)[0])
    assert "train': subfolders without readable images have class numbers as well: b" in caplog.text
    assert ("val': subfolders without" in caplog.text) == missing.startswith("image")


def test_unknown_classes_have_numbers_after_those_of_training(tmp_path, caplog):
    write_files(tmp_path, "train/b/1.png", "train/d/1.png", "val/a/1.png", "val/b/1.png", "val/c/1.png")
    data = DataConfig(path=str(tmp_path / "train"), eval_path=str(tmp_path / "val"))
    source = pipeline.evaluation_source(data)
    assert source.classes == ("b", "d", "a", "c")
    assert [record["label"] for record in source] == [2, 0, 3]
    assert "a, c" in caplog.text
    caplog.clear()
    missing = data.model_copy(update={"path": str(tmp_path / "missing")})  # as on a machine that only evaluates
    assert pipeline.evaluation_source(missing).classes == ("a", "b", "c")
    assert "does not exist" in caplog.text
    write_files(tmp_path, "flat/x.png")
    flat = data.model_copy(update={"path": str(tmp_path / "flat")})
    assert pipeline.evaluation_source(flat).classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("names", "warned"), [("train val", True), ("Test train devkit", True), ("train", True), ("bus train", False)]
)
def test_folders_with_names_of_splits_are_reported(tmp_path, caplog, names, warned):
    write_files(tmp_path, *(f"{name}/1.png" for name in names.split()))
    assert len(Folder(tmp_path).classes) == len(names.split())
    assert ("names of splits" in caplog.text) == warned


def test_unsupported_formats_are_counted_in_one_warning(tmp_path, caplog):
    write_files(tmp_path, "a.avif", "b.webp", "c.HEIC", "deep/d.heic", "e.jxl", "f.jfif", "notes.txt", "labels.json")
    assert len(Folder(tmp_path)) == 3
    assert len(caplog.messages) == 1
    assert ".heic (2), .jxl (1)" in caplog.text


def test_files_are_read_at_access(tmp_path):
    write_files(tmp_path, "a.png", "b.png")
    source = Folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"later")
    (tmp_path / "b.png").unlink()
    assert source[0]["image"] == b"later"
    with pytest.raises(ImageError, match=r"b\.png"):
        source[1]
    assert "b.png" in source.name(1)


def test_keys_of_names_that_are_not_utf_8_are_escaped(tmp_path):
    write_files(tmp_path, "caf\udce9.png", "café.png")
    source = Folder(tmp_path)
    assert sorted(map(source.key, range(2))) == [r"caf\xe9.png", "café.png"]
    assert {record["image"] for record in source} == {"café.png".encode(), b"caf?.png"}


def test_millions_of_names_fit_in_memory_and_in_pickles(monkeypatch):
    names = [f"/data/n{i // 100:08d}/n{i // 100:08d}_{i:08d}.JPEG" for i in range(20_000)]
    monkeypatch.setattr(storage, "list_files", lambda *_: list(names))
    monkeypatch.setattr(storage, "list_folders", lambda *_: [])
    tracemalloc.start()
    try:
        source = Folder("/data")
        current, peak = (size / len(names) for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    length = len(names[0])
    assert current < length + 20
    assert peak < 6 * length
    assert len(pickle.dumps(source)) / len(names) < length + 20
    assert [source.name(i) for i in (0, 150, 19_999)] == [repr(names[i]) for i in (0, 150, 19_999)]
    with pytest.raises(IndexError):
        source.name(20_000)


@pytest.fixture
def hostile(tmp_path, png, monkeypatch, deadline):
    """A folder with one readable image."""
    (tmp_path / "a good.png").write_bytes(png(7))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "dangling.png").symlink_to("nothing")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link to a folder.png").symlink_to("folder.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    (tmp_path / "forbidden.png").write_bytes(png(7))
    os_open = os.open

    def open_permitted(path, *args, **kwargs):  # root may read every file
        if str(path).endswith("forbidden.png"):
            raise PermissionError(13, "Permission denied", path)
        return os_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_permitted)
    return tmp_path


def test_files_that_cannot_be_opened_are_skipped_and_counted(hostile):
    source, skipped = Folder(hostile), Skipped()
    assert len(source) == 8  # and no folder
    (batch,) = pipeline.ordered_batches(source, [0], len(source), 8, "one", 2, skipped)
    assert batch["mask"].tolist() == [True] + [False] * 7
    assert skipped.count == 7
    record = Replaced(source)[1]
    assert record["image"].getpixel((0, 0)) == (7, 7, 7)
    assert record["unreadable"].count("cannot be opened") == 7


def test_folders_that_cannot_be_listed_are_errors(tmp_path, monkeypatch):
    write_files(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(DataError) as error:
        Folder(tmp_path, "data.eval_path")
    assert error.value.field == "data.eval_path"
