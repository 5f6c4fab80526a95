"""Folders of images: which files are images, in which order, and with which labels."""

import os
import pickle
import tracemalloc

import pytest

from vqrae_jax import storage
from vqrae_jax.data.folder import Folder, list_images
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
    assert source.classes == ["cat", "dög", "eel"]
    labels = {record["image"].decode(): record["label"] for record in source}
    assert labels == {"cat/1.png": 0, "cat/deep/2.png": 0, "dög/1.png": 1, "eel/3.gif": 2, "loose.png": -1}


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
