"""Runs are stored in buckets as in folders, and errors of buckets become StorageErrors.

The libraries are real (gcsfs, tensorstore, Orbax, Google's client); the buckets are those of bucket.py. Checkpoints and
runs of several processes in buckets are tested with checkpoints and processes.
"""

import contextlib
import json
import os

import numpy as np
import pytest

from vqrae_jax import checkpoint, config, storage
from vqrae_jax.commands import detokenize, plot
from vqrae_jax.data.codes import Codes
from vqrae_jax.data.folder import Folder, list_images
from vqrae_jax.data.parquet import Tables
from vqrae_jax.data.shards import list_shards
from vqrae_jax.data.tar import TarShards
from vqrae_jax.errors import CheckpointError, ConfigError, DataError, StorageError, UserError, WeightsError
from vqrae_jax.evaluation import reference
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.pretrained import readers, sources
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_files_are_written_and_replaced(kind, buckets, tmp_path):
    folder = storage.resolve_path(tmp_path / "deep" if kind == "local" else "gs://bucket/deep")
    for content in (b"one\r\n", b"two"):
        storage.write_bytes(folder / "file.json", content, durable=True)
        assert (folder / "file.json").read_bytes() == content
    assert [path.name for path in folder.iterdir()] == ["file.json"]


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/a/1.png", b"image")
    assert storage.read_bytes("~/a/1.png") == (tmp_path / "a" / "1.png").read_bytes() == b"image"
    assert Folder("~/a")[0]["image"] == b"image"
    assert list_images("~/a") == list_shards("~/a/*.png", (".png",), "data.path") == [f"{tmp_path}/a/1.png"]
    for name in ("~/a", tmp_path / "a"):
        assert os.fspath(storage.resolve_path(name)) == f"{tmp_path}/a"
    assert storage.resolve_path("a/~").name == "~"


def test_write_errors_name_the_file_and_leave_nothing(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        storage.write_bytes(tmp_path / "folder.png", b"")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "folder.png"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        storage.write_bytes(tmp_path / "written", b"")
        (tmp_path / "private").touch(0o600)
        storage.apply_umask(tmp_path / "private")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"written": mode, "private": mode}


@pytest.fixture(params=["pipe", "/dev/zero", "/dev/fd"])
def irregular(request, tmp_path, deadline):
    """A function that makes a path of the name of a file that is a pipe, a device or a folder."""

    def make(name):
        if request.param == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to(request.param)
        return tmp_path / name

    return make


def test_only_regular_files_are_read(irregular, monkeypatch):
    for action in (storage.read_bytes, storage.file_size, storage.check_regular):
        with pytest.raises(OSError, match="regular") as error:
            action(str(irregular(action.__name__)))
        assert storage.is_unusable(error.value)
    monkeypatch.setattr(storage, "check_regular", lambda *_: None)  # a pipe replaces the file after this check
    with pytest.raises(OSError, match=r"regular|directory"):
        storage.open_file(irregular("later"))


def test_files_that_users_name_are_regular(irregular):
    for name, read, kind in (
        ("a.parquet", Tables, DataError), ("a.arrow", Tables, DataError), ("a.tar", TarShards, DataError),
        ("a.npy", detokenize._read_array, DataError), ("config.json", lambda p: Tokenizer.load(p.parent), UserError),
        ("a.json", lambda path: readers.read_json(path, "field"), WeightsError),
        ("a.npz", lambda path: readers.read_tensors(path, "field"), WeightsError),
        ("b.npz", lambda path: reference.read_reference(path, {"encoder": 3}, "field", {}), WeightsError),
        ("a.py", config.load_config_file, ConfigError), ("manifest.json", lambda path: Codes(path.parent), DataError),
    ):  # fmt: skip
        path = irregular(name)
        with pytest.raises(kind):
            read(path if read not in (Tables, TarShards, config.load_config_file) else str(path))
        path.unlink()


def test_files_over_the_limit_are_not_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(9))
    assert storage.read_bytes(str(tmp_path / "file"), limit=9) == bytes(9)
    with pytest.raises(OSError, match="9 bytes"):
        storage.read_bytes(str(tmp_path / "file"), limit=8)


def test_downloads_follow_changes(buckets):
    for name in ("a.npz", "b.npz"):
        storage.write_bytes(f"gs://bucket/changing/{name}", name.encode())
    folder = storage.download("gs://bucket/changing")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.npz": b"a.npz", "b.npz": b"b.npz"}
    storage.write_bytes("gs://bucket/changing/a.npz", b"other")  # of the same size
    storage.resolve_path("gs://bucket/changing/b.npz").unlink()
    folder = storage.download("gs://bucket/changing")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.npz": b"other"}
    assert sources.fetch_file("gs://bucket/changing/a.npz", "field").read_bytes() == b"other"
    with pytest.raises(sources.WeightsError):
        sources.fetch_file("gs://bucket/changing/absent.npz", "field")


def test_a_file_replaced_during_its_download_is_downloaded_again(buckets, monkeypatch):
    storage.write_bytes("gs://bucket/weights/c.npz", b"before")
    write_bytes = storage.write_bytes

    def replace_before_writing(path, content):
        if not storage.is_remote(path):
            write_bytes("gs://bucket/weights/c.npz", b"latter")
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", replace_before_writing)
        storage.download("gs://bucket/weights/c.npz")
    copy = storage.download("gs://bucket/weights/c.npz")
    assert copy.read_bytes() == b"latter"
    monkeypatch.setattr(storage, "write_bytes", None)  # an unchanged file is not downloaded again
    assert storage.download("gs://bucket/weights/c.npz") == copy


def test_a_mirror_uploads_changes(buckets, tmp_path):
    mirror = storage.Mirror(storage.resolve_path("gs://bucket/logs"))
    for lines in ("1\n", "2\n"):
        with (mirror.folder / "log").open("a") as log:
            log.write(lines)
        mirror.upload()
    assert storage.resolve_path("gs://bucket/logs/log").read_text() == "1\n2\n"
    mirror.close()
    assert not mirror.folder.exists()
    later = storage.Mirror(storage.resolve_path("gs://bucket/logs"))
    later.restore("log")
    assert (later.folder / "log").read_text() == "1\n2\n"
    later.close()
    assert storage.Mirror(tmp_path).folder == tmp_path


def test_errors_of_buckets_are_storage_errors(buckets):
    for action in (
        lambda: checkpoint.check_writable("gs://forbidden/run"),
        lambda: Tokenizer.load("gs://forbidden/run"),
        lambda: storage.write_bytes("gs://forbidden/file", b""),
        lambda: storage.download("gs://forbidden/file"),
        lambda: storage.resolve_path("ftp://host/run"),
    ):
        with pytest.raises(StorageError) as error:
            action()
        assert error.value.field.startswith(("gs://forbidden/", "ftp://host/run"))
    with pytest.raises(CheckpointError, match="gs://bucket/absent"):
        checkpoint.find_checkpoint("gs://bucket/absent")


def test_staged_output_is_uploaded_at_the_end(buckets, tmp_path):
    with storage.stage_output("gs://bucket/staged") as path:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "a.txt").write_bytes(b"a")
        assert not any(name.startswith("staged") for name in buckets.names("bucket"))
    assert storage.resolve_path("gs://bucket/staged/inner/a.txt").read_bytes() == b"a"
    with storage.stage_output("gs://bucket/one.npz") as path:
        path.write_bytes(b"one")
    assert storage.resolve_path("gs://bucket/one.npz").read_bytes() == b"one"

    with contextlib.suppress(KeyError), storage.stage_output("gs://bucket/none.npz") as path:
        path.write_bytes(b"half")
        raise KeyError
    assert "none.npz" not in buckets.names("bucket")
    with storage.stage_output(tmp_path / "local") as path:
        assert path == tmp_path / "local"


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
    metrics = loop.evaluate(until(4), workdir, one_device)
    assert json.loads((workdir / "evaluation.json").read_text())["metrics"]["eval/psnr"] == metrics["eval/psnr"]
    assert (workdir / "evaluation" / "index.html").is_file()

    tokenizer = Tokenizer.load(os.fspath(workdir))
    assert tokenizer.provenance["metrics"]["eval/psnr"] == metrics["eval/psnr"]

    # A damaged checkpoint is replaced by the previous one.
    for name in buckets.names("bucket"):
        if name.startswith("runs/one/checkpoints/4/model/"):
            storage.resolve_path(f"gs://bucket/{name}").unlink()
    with open_run(until(5), workdir, one_device) as (run, state):
        assert int(state.step) == 3
        assert checkpoint.completed_steps(run.checkpoints.folder) == [3]
        assert any(".damaged-" in name for name in buckets.names("bucket"))


@pytest.mark.slow
def test_a_saved_tokenizer_in_a_bucket(buckets, tiny, one_device, tmp_path):
    loop.train(tiny(train={"steps": 1, "evaluate_every": 1}), tmp_path / "run", one_device)
    local = Tokenizer.load(tmp_path / "run")
    local.save_pretrained("gs://bucket/saved")
    remote = Tokenizer.load("gs://bucket/saved")
    assert remote.hash == local.hash
    image = np.zeros((1, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(remote.encode_to_indices(image), local.encode_to_indices(image))
