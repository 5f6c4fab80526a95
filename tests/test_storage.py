"""A run lives in a bucket as it does in a folder, and what a bucket refuses is a sentence.

The libraries are real (gcsfs, tensorstore, Orbax, Google's client); they talk to the buckets of bucket.py. Checkpoints
alone, and several processes, are in the tests of those.
"""

import json
import os

import numpy as np
import pytest

from vqrae_jax import checkpoint, storage
from vqrae_jax.commands import plot
from vqrae_jax.errors import CheckpointError, StorageError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.pretrained import sources
from vqrae_jax.storage import Mirror
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run


@pytest.fixture(autouse=True)
def _copies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_files_are_written_whole_and_read_back(where, buckets, tmp_path):
    folder = storage.resolve_path(tmp_path / "deep" if where == "here" else "gs://bucket/deep")
    for content in (b"one\r\n", b"two"):
        storage.write_bytes(folder / "file.json", content)
        assert (folder / "file.json").read_bytes() == content
    assert [p.name for p in folder.iterdir()] == ["file.json"]


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(IsADirectoryError) as told:
        storage.write_bytes(tmp_path / "taken.png", b"")
    assert str(told.value) == f"[Errno 21] Is a directory: '{tmp_path / 'taken.png'}'"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_gives(umask, expected, tmp_path):
    before = os.umask(umask)
    try:
        storage.write_bytes(tmp_path / "written", b"")
        (tmp_path / "of a library").touch(0o600)
        storage.apply_umask(tmp_path / "of a library")
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {"written": expected, "of a library": expected}


def test_fetched_files_are_copied_when_they_change(buckets):
    for name in ("a.npz", "b.npz"):
        storage.write_bytes(f"gs://bucket/weights/{name}", name.encode())
    folder = storage.download("gs://bucket/weights")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a.npz": b"a.npz", "b.npz": b"b.npz"}
    storage.write_bytes("gs://bucket/weights/a.npz", b"changed")
    assert (storage.download("gs://bucket/weights") / "a.npz").read_bytes() == b"changed"
    assert sources.fetch_file("gs://bucket/weights/b.npz", "field").read_bytes() == b"b.npz"
    with pytest.raises(sources.WeightsError, match="neither a file on this machine"):
        sources.fetch_file("gs://bucket/weights/absent.npz", "field")


def test_a_copy_is_its_original_whatever_the_clock_here_says(buckets):
    """A retrained model has files of the same size, and fewer of them where weights were in several."""
    for name in ("model-1-of-2.npz", "model.index", "config"):
        storage.write_bytes(f"gs://bucket/exported/{name}", b"before")
    storage.download("gs://bucket/exported")
    storage.resolve_path("gs://bucket/exported/model-1-of-2.npz").unlink()
    storage.resolve_path("gs://bucket/exported/model.index").unlink()
    storage.write_bytes("gs://bucket/exported/config", b"latter")
    folder = storage.download("gs://bucket/exported")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"config": b"latter"}


def test_what_is_replaced_while_it_is_copied_is_copied_again(buckets, monkeypatch):
    storage.write_bytes("gs://bucket/weights/c.npz", b"before")
    write = storage.write_bytes

    def slow(path, content):
        if not storage.is_remote(path):
            write("gs://bucket/weights/c.npz", b"latter")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", slow)
        storage.download("gs://bucket/weights/c.npz")
    assert storage.download("gs://bucket/weights/c.npz").read_bytes() == b"latter"


def test_unchanged_files_are_not_copied_again(buckets, monkeypatch):
    storage.write_bytes("gs://bucket/weights/d.npz", b"d")
    copy = storage.download("gs://bucket/weights/d.npz")
    monkeypatch.setattr(storage, "write_bytes", None)
    assert storage.download("gs://bucket/weights/d.npz") == copy


def test_a_mirror_copies_what_is_added(buckets, tmp_path):
    mirror = Mirror(storage.resolve_path("gs://bucket/logs"))
    for lines in ("1\n", "2\n"):
        with (mirror.folder / "log").open("a") as log:
            log.write(lines)
        mirror.upload()
    assert storage.resolve_path("gs://bucket/logs/log").read_text() == "1\n2\n"
    mirror.close()
    assert not mirror.folder.exists()
    later = Mirror(storage.resolve_path("gs://bucket/logs"))
    later.restore("log")
    assert (later.folder / "log").read_text() == "1\n2\n"
    later.close()
    assert Mirror(tmp_path).folder == tmp_path


def test_what_a_bucket_refuses_is_a_sentence(buckets):
    for action in (
        lambda: checkpoint.check_writable("gs://forbidden/run"),
        lambda: Tokenizer.load("gs://forbidden/run"),
        lambda: storage.write_bytes("gs://forbidden/file", b""),
        lambda: storage.download("gs://forbidden/file"),
    ):
        with pytest.raises(StorageError, match=r"gs://forbidden.* cannot be (read|written) .*Storage Object Admin"):
            action()
    with pytest.raises(StorageError, match="gs:// buckets"):
        storage.resolve_path("ftp://host/run")
    with pytest.raises(CheckpointError, match="gs://bucket/absent is not a folder"):
        checkpoint.find_checkpoint("gs://bucket/absent")


def test_staged_files_are_copied_at_the_end(buckets, tmp_path):
    with storage.stage_output("gs://bucket/staged") as place:
        (place / "inner").mkdir(parents=True)
        (place / "inner" / "a.txt").write_bytes(b"a")
        assert not any(name.startswith("staged") for name in buckets.names("bucket"))
    assert storage.resolve_path("gs://bucket/staged/inner/a.txt").read_bytes() == b"a"
    with storage.stage_output("gs://bucket/one.npz") as place:
        place.write_bytes(b"one")
    assert storage.resolve_path("gs://bucket/one.npz").read_bytes() == b"one"

    def fail():
        with storage.stage_output("gs://bucket/none.npz") as place:
            place.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "none.npz" not in buckets.names("bucket")
    with storage.stage_output(tmp_path / "here") as place:
        assert place == tmp_path / "here"


@pytest.mark.slow
def test_a_run_in_a_bucket(buckets, tiny, one_device):
    def until(steps):
        return tiny(train={"steps": steps, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 1, "keep_last": 2})

    workdir = storage.resolve_path("gs://bucket/runs/one")
    loop.train(until(2), workdir, one_device)
    loop.train(until(4), os.fspath(workdir), one_device)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2, 3, 4]
    assert [int(p.name) for p in checkpoint.find_checkpoint(workdir).parent.iterdir()] == [3, 4]
    names = "\n".join(buckets.names("bucket"))
    for name in ("reconstructions.png", "heartbeat/0.json", "tensorboard/events.out", "4/model/", "4/train/"):
        assert f"runs/one/{name}" in names.replace("checkpoints/", "")
    assert plot.read_metrics(workdir)["loss/total"][0] == [1, 2, 3, 4]
    figures = loop.evaluate(until(4), workdir, one_device)
    assert json.loads((workdir / "evaluation.json").read_text())["metrics"]["eval/psnr"] == figures["eval/psnr"]
    assert (workdir / "evaluation" / "index.html").is_file()

    # The tokenizer, and what it is saved as.
    tokenizer = Tokenizer.load(os.fspath(workdir))
    assert tokenizer.provenance["metrics"]["eval/psnr"] == figures["eval/psnr"]

    # A damaged newest checkpoint gives way to the one before.
    for name in buckets.names("bucket"):
        if name.startswith("runs/one/checkpoints/4/model/"):
            storage.resolve_path(f"gs://bucket/{name}").unlink()
    with open_run(until(5), workdir, one_device) as (run, state):
        assert int(state.step) == 3
        assert checkpoint.completed_steps(run.checkpoints.folder) == [3]
        assert any(".damaged-" in name for name in buckets.names("bucket"))


@pytest.mark.slow
def test_a_folder_of_a_tokenizer_in_a_bucket(buckets, tiny, one_device, tmp_path):
    loop.train(tiny(train={"steps": 1, "evaluate_every": 1}), tmp_path / "run", one_device)
    here = Tokenizer.load(tmp_path / "run")
    here.save_pretrained("gs://bucket/saved")
    there = Tokenizer.load("gs://bucket/saved")
    assert there.hash == here.hash
    image = np.zeros((1, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(there.encode_to_indices(image), here.encode_to_indices(image))
