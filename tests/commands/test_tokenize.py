"""A tokenized dataset is what the tokenizer says of each image, whoever wrote it and however often it was stopped."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vqrae_jax import Tokenizer, storage
from vqrae_jax.commands import tokenize
from vqrae_jax.data import codes, images, readable
from vqrae_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """21 images in two classes, the sixth of them broken; a name with a space and an umlaut."""
    folder = tmp_path_factory.mktemp("a folder ü")
    rng = np.random.default_rng(0)
    for i in range(21):
        name = folder / ("cat ü" if i % 2 else "dog") / f"picture {i:02d}.png"
        images.write_image(name, rng.integers(0, 256, (34 + i, 40, 3), np.uint8))
    (folder / "cat ü" / "picture 11.png").write_bytes(b"")
    return folder


def run(trained, photos, output, *arguments):
    given = [f"--checkpoint={trained}", f"--data={photos}", f"--output={output}", "--batch=8", "--shard-size=8"]
    return tokenize.tokenize(tokenize.parse([*given, *arguments]))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(trained, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    run(trained, photos, folder)
    return folder


def test_codes_labels_and_ids_are_those_of_the_images(trained, photos, whole):
    tokenizer, read = Tokenizer.load(trained, batch_size=8), codes.Codes(whole)
    assert len(read) == 20
    assert read.manifest["skipped"] == [5]
    assert read.manifest["skipped_ids"] == ["cat ü/picture 11.png"]
    assert read.manifest["tokenizer"] == tokenizer.hash
    assert [shard["count"] for shard in read.manifest["shards"]] == [7, 8, 5]
    for record in (read[i] for i in range(len(read))):
        picture = images.center_crop(images.read_image(photos / record["id"]), tokenizer.image_size)
        np.testing.assert_array_equal(record["codes"], tokenizer.encode_to_indices(picture[None])[0])
        assert record["label"] == ["cat ü", "dog"].index(record["id"].split("/")[0])
        assert record["codes"].dtype == np.uint16
    assert [read[i]["index"] for i in range(20)] == [i for i in range(21) if i != 5]
    read.verify()


@pytest.mark.parametrize("form", ["parquet", "webdataset", "array_record"])
def test_all_formats_hold_the_same(trained, photos, whole, tmp_path, form):
    run(trained, photos, tmp_path, f"--format={form}")
    for one, other in zip(codes.Codes(whole), codes.Codes(tmp_path, cached=1), strict=True):
        np.testing.assert_array_equal(one.pop("codes"), other.pop("codes"))
        assert one == other


@pytest.mark.parametrize("form", ["npz", "parquet", "webdataset", "array_record"])
def test_names_that_are_no_utf_8_are_ids_too(trained, tmp_path, form):
    folder, output = tmp_path / "data \udcfc", tmp_path / "codes"
    images.write_image(folder / "caf\udce9.png", np.zeros((32, 32, 3), np.uint8))
    (folder / "bro\udce9ken.png").write_bytes(b"")
    run(trained, folder, output, f"--format={form}")
    read = codes.Codes(output)
    assert [record["id"] for record in read] == [r"caf\xe9.png"]
    assert read.manifest["skipped_ids"] == [r"bro\xe9ken.png"]
    assert read.plan.source == f"source=folder path={folder}"
    run(trained, folder, output, f"--format={form}")  # still the same files


def test_processes_write_what_one_would(trained, photos, whole, tmp_path):
    assert run(trained, photos, tmp_path, "--processes=2", "--process=1") is None
    with pytest.raises(DataError, match="not complete: 1 of 3"):
        codes.Codes(tmp_path)
    assert run(trained, photos, tmp_path, "--processes=2", "--process=0")["complete"]
    assert content(tmp_path) == content(whole)


def renamed(folder):
    """One file takes its place at the end: as many as before, and all after it one earlier."""
    (folder / "00.png").rename(folder / "99.png")


def without_the_hash(manifest):
    """A manifest as an earlier version wrote it."""
    told = json.loads(manifest.read_text())
    del told["listing"]
    manifest.write_text(json.dumps(told))


def test_a_folder_whose_files_have_changed_is_not_gone_on_with(trained, tmp_path):
    rng, photos, output = np.random.default_rng(0), tmp_path / "photos", tmp_path / "codes"
    for i in range(16):
        images.write_image(photos / f"{i:02d}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
    assert run(trained, photos, output, "--processes=2", "--process=0") is None
    renamed(photos)
    with pytest.raises(DataError, match=r"started with other files: .* 16 images"):
        run(trained, photos, output)
    assert len(list(output.glob("codes-*"))) == 1
    without_the_hash(output / codes.MANIFEST)
    assert run(trained, photos, output)["complete"]
    without_the_hash(output / codes.MANIFEST)
    assert len(codes.Codes(output)) == 16


def test_goes_on_where_it_stopped(trained, photos, whole, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        write = codes.write_shard
        calls = []
        patch.setattr(
            codes, "write_shard", lambda *a: write(*a) if not calls.append(0) and len(calls) < 2 else killed()
        )
        with pytest.raises(Killed):
            run(trained, photos, tmp_path)
    (tmp_path / ".codes-00001-of-00003.npz.123").write_bytes(b"half of it")
    first = (tmp_path / "codes-00000-of-00003.npz").stat().st_mtime_ns
    run(trained, photos, tmp_path)
    assert "wrote 2 of 3 shards" in capsys.readouterr().out
    run(trained, photos, tmp_path)
    assert "wrote 0 of 3 shards" in capsys.readouterr().out
    assert (tmp_path / "codes-00000-of-00003.npz").stat().st_mtime_ns == first
    assert content(tmp_path) == content(whole)


def test_an_outage_stops_it_and_it_goes_on_from_there(trained, photos, whole, tmp_path, monkeypatch):
    read, fetched = storage.read_bytes, []

    def failing(path):
        if len(fetched) >= 12:
            raise TimeoutError("the server does not answer")
        fetched.append(path)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", failing)
        patch.setattr(readable.time, "sleep", lambda seconds: None)
        with pytest.raises(DataError, match="the server does not answer"):
            run(trained, photos, tmp_path, "--threads=1")
    assert not json.loads((tmp_path / codes.MANIFEST).read_text())["complete"]
    assert len(list(tmp_path.glob("codes-*"))) < 2
    assert run(trained, photos, tmp_path)["complete"]
    assert content(tmp_path) == content(whole)


def test_any_number_of_devices_writes_the_same(trained, photos, whole, tmp_path, monkeypatch):
    three = jax.local_devices()[:3]
    monkeypatch.setattr(tokenize.jax, "local_devices", lambda: three)
    given = [f"--checkpoint={trained}", f"--data={photos}"]
    assert tokenize.tokenize(tokenize.parse([*given, f"--output={tmp_path / 'default'}"]))["count"] == 20
    monkeypatch.setattr(tokenize, "SHARD", 8)
    monkeypatch.setattr(tokenize, "ROWS", 4)  # 12 images per batch
    tokenize.tokenize(tokenize.parse([*given, f"--output={tmp_path / 'small'}"]))
    assert content(tmp_path / "small") == content(whole)


@pytest.mark.parametrize(("views", "count"), [("flip", 2), ("ten-crop", 10)])
def test_views(trained, photos, tmp_path, views, count):
    run(trained, photos, tmp_path, f"--views={views}", "--limit=4")
    tokenizer, read = Tokenizer.load(trained), codes.Codes(tmp_path)
    assert read[0]["codes"].shape == (count, 4, 4)
    picture = images.read_image(photos / read[3]["id"])
    if views == "flip":
        crop = images.center_crop(picture, 32)
        expected = tokenizer.encode_to_indices(np.stack([crop, crop[:, ::-1]]))
    else:
        expected = tokenizer.encode_to_indices(images.ten_crop(picture, 32))
    np.testing.assert_array_equal(read[3]["codes"], expected)


def test_photographs_are_a_source_too(trained, tmp_path):
    given = [f"--checkpoint={trained}", "--source=photographs", f"--output={tmp_path}", "--limit=3"]
    assert tokenize.tokenize(tokenize.parse(given))["count"] == 3


def test_a_folder_of_other_codes_is_refused(trained, photos, whole):
    with pytest.raises(DataError, match=r"differ in views \('one', now 'flip'\)"):
        run(trained, photos, whole, "--views=flip")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--processes=2", "--process=2"], ConfigError, "--process=2 of --processes=2"),
        (["--processes=2"], ConfigError, "--processes=2: give both or none"),
        (["--shard-size=12"], ConfigError, "--shard-size=12 is no multiple of the batch of 8 images: give 16"),
        (["--source=tape"], ConfigError, "^--source=tape: give one of photographs, folder, "),
        (["--data=/nowhere"], DataError, "^--data='/nowhere': does not exist"),
        (["--source=webdataset", "--data=/nowhere"], DataError, "^--data='/nowhere': does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(trained, photos, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        run(trained, photos, tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_plain_json(whole):
    manifest = json.loads((whole / codes.MANIFEST).read_text())
    assert manifest["count"] == sum(shard["count"] for shard in manifest["shards"])
    assert all(len(shard["sha256"]) == 64 for shard in manifest["shards"])


def start(trained, photos, output, *arguments, **environment):
    """The command in a process of its own."""
    given = [f"--checkpoint={trained}", f"--data={photos}", f"--output={output}", "--batch=8", "--shard-size=8"]
    command = [sys.executable, "-m", "vqrae_jax.commands.tokenize", *given, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npz", "parquet", "webdataset", "array_record"])
def test_killed_ten_times_nothing_is_lost_or_doubled(trained, tmp_path, form):
    rng = np.random.default_rng(0)
    for i in range(640):
        images.write_image(tmp_path / "photos" / f"{i:03d}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
    whole, output = tmp_path / "whole", tmp_path / "killed"
    run(trained, tmp_path / "photos", whole, f"--format={form}")
    for kills in range(10):
        process, seen = (
            start(trained, tmp_path / "photos", output, f"--format={form}"),
            len(list(output.glob("codes-*"))),
        )
        while len(list(output.glob("codes-*"))) == seen and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        assert process.poll() is None, f"it was done after {kills} kills: {process.stderr.read()}"
        process.kill()
        process.wait()
    process = start(trained, tmp_path / "photos", output, f"--format={form}")
    assert process.wait() == 0, process.stderr.read()
    assert content(output) == content(whole)
    assert [record["index"] for record in codes.Codes(output)] == list(range(640))


def slurm(process):
    """What SLURM tells one of two tasks."""
    said = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": process, "LOCALID": process}
    return {f"SLURM_{name}": str(value) for name, value in said.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "form"),
    [("flags", "npz"), ("slurm", "npz"), ("flags", "parquet"), ("flags", "webdataset"), ("flags", "array_record")],
)
def test_two_processes_at_once_write_what_one_would(trained, photos, tmp_path, launcher, form):
    run(trained, photos, tmp_path / "one", f"--format={form}")
    flags = [["--processes=2", f"--process={i}"] if launcher == "flags" else [] for i in range(2)]
    told = [slurm(i) if launcher == "slurm" else {} for i in range(2)]
    form = f"--format={form}"
    processes = [start(trained, photos, tmp_path / "two", form, *flags[i], **told[i]) for i in range(2)]
    for process in processes:
        assert process.wait() == 0, process.stderr.read()
    assert content(tmp_path / "two") == content(tmp_path / "one")
