"""A folder becomes records with labels, whatever its names."""

import pickle
import tracemalloc

import pytest

from vqrae_jax import storage
from vqrae_jax.data.folder import Folder
from vqrae_jax.errors import DataError, ImageError


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode(errors="replace"))


def test_a_flat_folder_has_no_labels(tmp_path):
    make(tmp_path, "b.png", "a b.JPG", "ü.webp")
    source = Folder(tmp_path)
    assert [source[i] for i in range(len(source))] == [
        {"image": name.encode(), "label": -1} for name in ("a b.JPG", "b.png", "ü.webp")
    ]


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    make(tmp_path, "dög/1.png", "cat/deep/er/2.png", "cat/1.png", "eel/3.gif", "no images/readme.txt", "loose.png")
    source = Folder(tmp_path)
    assert source.classes == ["cat", "dög", "eel"]
    labels = {record["image"].decode(): record["label"] for record in source}
    assert labels == {"cat/1.png": 0, "cat/deep/er/2.png": 0, "dög/1.png": 1, "eel/3.gif": 2, "loose.png": -1}


def test_pictures_of_other_kinds_are_told_once_and_notes_are_not(tmp_path, caplog):
    make(tmp_path, "a.avif", "b.webp", "c.HEIC", "deep/d.heic", "e.jxl", "f.jfif", "notes.txt", "labels.json")
    assert len(Folder(tmp_path)) == 3
    assert len(caplog.messages) == 1
    assert f"{tmp_path}: skipped files" in caplog.text  # of whatever field or argument it is
    assert ".heic (2), .jxl (1); convert" in caplog.text


def test_files_are_read_when_asked_for(tmp_path):
    make(tmp_path, "a.png", "b.png")
    source = Folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"later")
    (tmp_path / "b.png").unlink()
    assert source[0]["image"] == b"later"
    with pytest.raises(ImageError, match=r"b\.png' does not exist any more"):
        source[1]
    assert "b.png" in source.name(1)


def test_a_name_that_is_no_utf_8_has_a_key_that_is(tmp_path):
    make(tmp_path, "caf\udce9.png", "café.png")
    source = Folder(tmp_path)
    assert sorted(map(source.key, range(2))) == [r"caf\xe9.png", "café.png"]
    assert {record["image"] for record in source} == {"café.png".encode(), b"caf?.png"}


def test_equal_folders_have_equal_descriptions(tmp_path):
    make(tmp_path, "a.png", "b.png")
    assert repr(Folder(tmp_path)) == repr(Folder(tmp_path))


def test_names_by_the_million_fit_in_memory_and_in_what_workers_are_sent(monkeypatch):
    names = [f"/data/n{i // 100:08d}/n{i // 100:08d}_{i:08d}.JPEG" for i in range(20_000)]
    monkeypatch.setattr(storage, "list_files", lambda *_: list(names))
    tracemalloc.start()
    try:
        source = Folder("/data")
        kept, most = (size / len(names) for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    length = len(names[0])
    assert kept < length + 20
    assert most < 6 * length
    assert len(pickle.dumps(source)) / len(names) < length + 20
    assert [source.name(i) for i in (0, 150, 19_999)] == [repr(names[i]) for i in (0, 150, 19_999)]
    with pytest.raises(IndexError, match="image 20000 of 20000"):
        source.name(20_000)


def test_an_empty_folder_names_its_field(tmp_path):
    with pytest.raises(DataError, match=r"data\.eval_path"):
        Folder(tmp_path, "data.eval_path")
