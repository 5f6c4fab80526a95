"""A tokenized dataset holds the codes of each image, whichever processes wrote it and however often they stopped."""

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
from vqrae_jax.config import DataConfig
from vqrae_jax.data import codes, images, pipeline, readable
from vqrae_jax.data.code_shards import SUFFIXES
from vqrae_jax.errors import ConfigError, DataError


def command_line(trained, photos, output, *arguments):
    files = f"--checkpoint={trained}", f"--data={photos}", f"--output={output}"
    return [*files, "--batch=8", "--shard-size=8", *arguments]


def run(*arguments):
    return tokenize.tokenize(tokenize.parser.parse_args(command_line(*arguments)))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_labels_and_ids_are_those_of_the_images(trained, photos, tokenized):
    tokenizer, dataset = Tokenizer.load(trained, batch_size=8), codes.Codes(tokenized)
    records = [dataset[i] for i in range(len(dataset))]
    assert [record["index"] for record in records] == [i for i in range(21) if i != 5]
    manifest = dataset.manifest
    expected = {"skipped": [5], "skipped_ids": ["cat ü/photo 11.png"], "tokenizer": tokenizer.hash, "count": 20}
    assert manifest.items() >= (expected | {"grids": [[4, 4]]}).items()
    assert [(shard["count"], len(shard["sha256"])) for shard in manifest["shards"]] == [(7, 64), (8, 64), (5, 64)]
    for record in records:
        image = images.center_crop(images.read_image(photos / record["id"]), tokenizer.image_size)
        np.testing.assert_array_equal(record["codes"], tokenizer.encode_to_indices(image[None])[0])
        assert record["label"] == ["cat ü", "dog"].index(record["id"].split("/")[0])
        assert record["codes"].dtype == np.uint16
    dataset.verify()


@pytest.mark.parametrize(("fields", "shape", "grids", "levels"), [
    ({"resampler_tokens": 16}, (16,), ((1, 16),), 1),
    pytest.param({"quantize_before_reshape": True}, (16,), ((4, 4),), 1, marks=pytest.mark.slow),
    pytest.param(
        {"quantizer": "residual", "quantize_before_reshape": True, "quantizer_params": {"depth": 16}},
        (16, 16), ((4, 4),), 16, marks=pytest.mark.slow,
    ),
    pytest.param(
        {"quantizer": "multiscale", "quantizer_params": {"grids": (3, 4)}}, (25,), ((3, 3), (4, 4)), 1,
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_the_manifest_has_the_grids_that_the_shape_does_not_decide(untrained, tmp_path, fields, shape, grids, levels):
    args = tokenize.parser.parse_args(command_line("x", "y", tmp_path))
    plan = tokenize.build_plan(args, untrained(**fields), 3)
    assert (plan.code_shape, plan.grids, plan.levels) == (shape, grids, levels)


@pytest.mark.parametrize("form", ["parquet", "array_record"])
def test_all_formats_hold_the_same(trained, photos, tokenized, tmp_path, form):
    run(trained, photos, tmp_path, f"--format={form}")
    for expected, record in zip(codes.Codes(tokenized), codes.Codes(tmp_path, cached=1), strict=True):
        np.testing.assert_array_equal(expected.pop("codes"), record.pop("codes"))
        assert expected == record


def test_training_reads_what_was_tokenized(trained, tokenized):
    tokenizer, records = Tokenizer.load(trained, batch_size=8), list(codes.Codes(tokenized))
    fields = {"source": "codes", "path": str(tokenized), "eval_path": str(tokenized)}
    data = DataConfig(**fields, batch_size=20, eval_batch_size=8)
    batches, validation = pipeline.train_batches(data, seed=0), pipeline.evaluation_batches(data)
    plan = batches.source.plan
    assert (plan.tokenizer, plan.view_shape) == (tokenizer.hash, tokenizer.code_shape)
    assert (plan.codebook_size, batches.classes) == (tokenizer.codebook_size, ("cat ü", "dog"))

    def rows(grids, labels):
        return [(grid.astype(int).tolist(), int(label)) for grid, label in zip(grids, labels, strict=True)]

    expected = rows(*([record[name] for record in records] for name in ("codes", "label")))
    ordered = [row for b in validation for row in rows(b["codes"][b["mask"]], b["label"][b["mask"]])]
    assert ordered == expected
    for _ in range(2):
        assert sorted(rows(*(batch := next(batches)).values())) == sorted(expected)
        assert batch.keys() == {"codes", "label"}


def test_classes_keep_the_numbers_of_another_folder_or_dataset(trained, photos, tokenized, tmp_path):
    val = tmp_path / "val"
    images.write_image(val / "dog" / "1.png", np.zeros((32, 32, 3), np.uint8))
    for number, classes in enumerate(([], [f"--classes={photos}"], [f"--classes={tokenized}"])):
        run(trained, val, tmp_path / f"{number}", *classes)
        dataset = codes.Codes(tmp_path / f"{number}")
        assert dataset.plan.classes == (("cat ü", "dog") if classes else ("dog",))
        assert dataset[0]["label"] == len(classes)
    (val / "bat").mkdir()  # moves the numbers
    with pytest.raises(DataError, match="classes"):
        run(trained, val, tmp_path / "0")
    with pytest.raises(DataError, match="bat") as error:
        run(trained, val, tmp_path / "2", f"--classes={tokenized}")
    assert error.value.field == "--classes"
    for arguments, kind, field in (
        ([f"--classes={val / 'dog'}"], DataError, "--classes"), (["--classes=/missing"], DataError, "--classes"),
        (["--source=webdataset", f"--classes={photos}"], ConfigError, "--source"),
        (["--label-key=cls"], ConfigError, "--label-key"),
    ):  # fmt: skip
        with pytest.raises(kind) as error:
            run(trained, val, tmp_path / "3", *arguments)
        assert error.value.field == field


def test_names_that_are_not_utf_8_are_ids_too(trained, tmp_path, capsys):
    folder, output = tmp_path / "data \udcfc", tmp_path / "codes"
    images.write_image(folder / "caf\udce9.png", np.zeros((32, 32, 3), np.uint8))
    (folder / "bro\udce9ken.png").write_bytes(b"")
    run(trained, folder, output, "--format=webdataset")
    assert "skipped 1 unreadable images: bro" in capsys.readouterr().err
    dataset = codes.Codes(output)
    assert [record["id"] for record in dataset] == [r"caf\xe9.png"]
    assert dataset.manifest["skipped_ids"] == [r"bro\xe9ken.png"]
    assert dataset.plan.source == f"source=folder path={folder}"
    run(trained, folder, output, "--format=webdataset")  # the listing of the files is the same


def test_two_processes_write_the_same_as_one(trained, photos, tokenized, tmp_path):
    assert run(trained, photos, tmp_path, "--processes=2", "--process=1") is None
    with pytest.raises(DataError, match="1 of 3"):
        codes.Codes(tmp_path)
    assert run(trained, photos, tmp_path, "--processes=2", "--process=0")["complete"]
    assert content(tmp_path) == content(tokenized)


def test_a_folder_whose_files_have_changed_is_not_continued(trained, tmp_path):
    rng, photos, output = np.random.default_rng(0), tmp_path / "photos", tmp_path / "codes"
    for i in range(16):
        images.write_image(photos / f"{i:02d}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
    assert run(trained, photos, output, "--processes=2", "--process=0") is None
    (photos / "00.png").rename(photos / "99.png")  # another order
    with pytest.raises(DataError, match="16 images"):
        run(trained, photos, output)
    assert len(list(output.glob("codes-*"))) == 1

    def remove_listing():  # as in the manifests of earlier versions
        manifest = json.loads((output / codes.MANIFEST).read_text())
        del manifest["listing"], manifest["sha256"]
        (output / codes.MANIFEST).write_text(json.dumps(manifest))

    remove_listing()
    assert run(trained, photos, output)["complete"]
    remove_listing()
    assert len(codes.Codes(output)) == 16


def test_a_killed_run_continues(trained, photos, tokenized, tmp_path, monkeypatch, capsys):
    write, calls = codes.write_shard, []

    def write_one(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(codes, "write_shard", write_one)
        with pytest.raises(KeyboardInterrupt):
            run(trained, photos, tmp_path)
    (tmp_path / ".codes-00001-of-00003.npz.123").write_bytes(b"half of it")
    first = (tmp_path / "codes-00000-of-00003.npz").stat().st_mtime_ns
    run(trained, photos, tmp_path)
    assert "wrote 2 of 3 shards" in capsys.readouterr().out
    run(trained, photos, tmp_path)
    assert "wrote 0 of 3 shards" in capsys.readouterr().out
    assert (tmp_path / "codes-00000-of-00003.npz").stat().st_mtime_ns == first
    assert content(tmp_path) == content(tokenized)


def test_an_outage_stops_the_run_and_the_next_one_continues(trained, photos, tokenized, tmp_path, monkeypatch):
    read, paths = storage.read_bytes, []

    def failing(path, *arguments, **options):
        if len(paths) >= 12:
            raise TimeoutError("the server does not answer")
        paths.extend([path] * str(path).endswith(".png"))
        return read(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", failing)
        patch.setattr(readable.time, "sleep", lambda seconds: None)
        with pytest.raises(DataError, match="the server does not answer"):
            run(trained, photos, tmp_path, "--threads=1")
    assert not json.loads((tmp_path / codes.MANIFEST).read_text())["complete"]
    assert len(list(tmp_path.glob("codes-*"))) < 2
    assert run(trained, photos, tmp_path)["complete"]
    assert content(tmp_path) == content(tokenized)


def test_any_number_of_devices_writes_the_same(trained, photos, tokenized, tmp_path, monkeypatch):
    devices = jax.local_devices()[:3]
    monkeypatch.setattr(tokenize.jax, "local_devices", lambda: devices)
    monkeypatch.setattr(tokenize, "SHARD", 8)
    monkeypatch.setattr(tokenize, "VIEWS", 4)  # 12 images per batch
    arguments = [f"--checkpoint={trained}", f"--data={photos}", f"--output={tmp_path}", "--shard-size=8"]
    tokenize.tokenize(tokenize.parser.parse_args(arguments))
    assert content(tmp_path) == content(tokenized)


def test_views(trained, photos, tmp_path):
    tokenizer = Tokenizer.load(trained)
    for views, count in (("flip", 2), ("ten-crop", 10)):
        run(trained, photos, tmp_path / views, f"--views={views}", "--limit=4")
        record = codes.Codes(tmp_path / views)[3]
        assert record["codes"].shape == (count, 4, 4)
        image = images.read_image(photos / record["id"])
        crop = images.center_crop(image, 32)
        crops = np.stack([crop, crop[:, ::-1]]) if views == "flip" else images.ten_crop(image, 32)
        np.testing.assert_array_equal(record["codes"], tokenizer.encode_to_indices(crops))
        data = DataConfig(source="codes", path=str(tmp_path / views), batch_size=4)
        batch, dataset = next(pipeline.train_batches(data, seed=0)), codes.Codes(tmp_path / views)
        every = [view.tolist() for record in dataset for view in record["codes"]]
        assert all(view.tolist() in every for view in batch["codes"])


def test_invalid_arguments_are_errors_before_anything_is_written(trained, photos, tokenized, tmp_path):
    for arguments, error, field in (
        (["--processes=2", "--process=2"], ConfigError, "--process"),
        (["--processes=2"], ConfigError, "--process"),
        (["--shard-size=12"], ConfigError, "--shard-size"),
        (["--source=tape"], ConfigError, "--source"),
        (["--data=/missing"], DataError, "--data"),
        (["--source=webdataset", "--data=/missing"], DataError, "--data"),
    ):
        with pytest.raises(error) as raised:
            run(trained, photos, tmp_path, *arguments)
        assert raised.value.field == field
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="views"):
        run(trained, photos, tokenized, "--views=flip")


def start(trained, photos, output, *arguments, **environment):
    """Starts the command in a process of its own."""
    command = [sys.executable, "-m", "vqrae_jax.commands.tokenize"]
    return subprocess.Popen(
        [*command, *command_line(trained, photos, output, *arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", SUFFIXES)
def test_ten_kills_lose_and_double_nothing(trained, tmp_path, form):
    rng = np.random.default_rng(0)
    photos, expected, output = tmp_path / "photos", tmp_path / "expected", tmp_path / "killed"
    for i in range(640):
        images.write_image(photos / f"{i:03d}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
    run(trained, photos, expected, f"--format={form}")
    for kills in range(10):
        process = start(trained, photos, output, f"--format={form}")
        before = len(list(output.glob("codes-*")))
        while len(list(output.glob("codes-*"))) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        assert process.poll() is None, f"it ended after {kills} kills: {process.stderr.read()}"
        process.kill()
        process.wait()
    process = start(trained, photos, output, f"--format={form}")
    assert process.wait() == 0, process.stderr.read()
    assert content(output) == content(expected)
    assert [record["index"] for record in codes.Codes(output)] == list(range(640))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "flags"])
def test_two_processes_at_once_write_the_same_as_one(trained, photos, tokenized, tmp_path, launcher):
    processes, job = [], {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 2}
    for i in range(2):
        flags = ["--processes=2", f"--process={i}"] if launcher == "flags" else []
        task = job | {"PROCID": i, "LOCALID": i} if launcher == "slurm" else {}
        environment = {f"SLURM_{name}": str(value) for name, value in task.items()}
        processes.append(start(trained, photos, tmp_path, *flags, **environment))
    for process in processes:
        assert process.wait() == 0, process.stderr.read()
    assert content(tmp_path) == content(tokenized)
