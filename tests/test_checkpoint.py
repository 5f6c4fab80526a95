import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1

import vqrae_jax
from vqrae_jax import checkpoint
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.errors import CheckpointError, DamagedError

ROOT = pathlib.Path(__file__).parents[1]


def trees(value):
    model = {"params": {"kernel": jnp.full((4, 4), value)}, "batch_stats": {"codebook": jnp.full((8, 2), value)}}
    return model, {"step": jnp.asarray(int(value))}


def save(folder, scores, **options):
    checkpoints = Checkpoints(folder, **options)
    for step, score in scores.items():
        model, train = trees(float(step))
        checkpoints.save(
            step,
            model,
            train,
            {"next_index": step},
            {"config": {}, "version": vqrae_jax.__version__},
            score and {"psnr": score},
        )
    checkpoints.wait()
    return checkpoints


def shapes(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_round_trip(workdir):
    checkpoints = save(workdir, {1: None})
    model, train = trees(1.0)
    checkpoints.close()
    path = checkpoint.find_checkpoint(workdir)
    restored = checkpoint.read_checkpoint(path, shapes(model), shapes(train))
    jax.tree.map(np.testing.assert_array_equal, restored, (model, train, {"next_index": 1}))
    assert "vqrae_jax" not in (path / "_CHECKPOINT_METADATA").read_text()  # other programs can read it


def test_the_api_of_orbax_1_reads_checkpoints(tmp_path):
    """`orbax.checkpoint.v1` becomes `orbax.checkpoint` in Orbax 1.0."""
    save(tmp_path, {1: None}).close()
    model, _ = trees(1.0)
    restored = v1.load(tmp_path / "checkpoints" / "1", shapes(model), checkpointable_name="model")
    jax.tree.map(np.testing.assert_array_equal, restored, model)


def test_the_last_and_the_best_are_kept(tmp_path):
    for scores in ({1: 10.0, 2: 30.0, 3: 20.0}, {4: None, 5: 15.0}):  # the second run knows the best of the first
        save(tmp_path, scores, keep_last=2, keep_best=1).close()
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [2, 4, 5]


def test_a_checkpoint_set_aside_is_not_a_step(workdir):
    checkpoints = save(workdir, {1: None, 2: None})
    checkpoints.set_aside(2)
    assert checkpoints.steps == checkpoint.completed_steps(checkpoints.folder) == [1]
    checkpoints.close()
    save(workdir, {2: None}).close()
    assert checkpoint.find_checkpoint(workdir).name == "2"


def test_reading_changes_nothing(tmp_path):
    """Another run may be saving there."""
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.steps == []
    checkpoints.close()
    assert not (tmp_path / "none").exists()
    save(tmp_path, {1: None, 2: None}).close()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpoints = Checkpoints(tmp_path, keep_last=1, read_only=True)
    assert checkpoints.steps == [1, 2]
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_multiples_of_keep_every_are_never_deleted(tmp_path):
    save(tmp_path, dict.fromkeys(range(1, 8)), keep_last=1, keep_best=0, keep_every=3).close()
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [3, 6, 7]


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "__version__", "0.0.9")
    with pytest.raises(CheckpointError, match=r"newer than this 0\.0\.9"):
        checkpoint.read_meta(path)
    monkeypatch.setattr(checkpoint, "__version__", "10.0.0")
    assert checkpoint.read_meta(path)["config"] == {}


def test_a_partial_read_reads_the_leaves_of_the_target(tmp_path):
    save(tmp_path, {1: None}).close()
    model, _ = trees(1.0)
    del model["batch_stats"]
    restored = checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(model), partial=True)
    jax.tree.map(np.testing.assert_array_equal, restored, model)


def test_saving_a_step_twice_changes_nothing(tmp_path):
    checkpoints = save(tmp_path, {1: None})
    model, train = trees(9.0)
    checkpoints.save(1, model, train, {}, {})
    checkpoints.close()
    restored = checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(model))
    assert restored["params"]["kernel"][0, 0] == 1.0


def test_find(tmp_path):
    save(tmp_path, {1: None, 2: None}).close()
    newest = tmp_path / "checkpoints" / "2"
    assert checkpoint.find_checkpoint(tmp_path) == newest
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints") == newest
    assert checkpoint.find_checkpoint(tmp_path, step=1).name == "1"
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints" / "1").name == "1"
    with pytest.raises(CheckpointError, match=r"step 7.*\[1, 2\]"):
        checkpoint.find_checkpoint(tmp_path, step=7)


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    (tmp_path / "ep-last.pt").touch()
    for name, problem in {
        "absent": "does not exist",
        "ep-last.pt": "import-pytorch",
        ".": "it holds ep-last.pt",
    }.items():
        with pytest.raises(CheckpointError, match=problem) as error:
            checkpoint.find_checkpoint(tmp_path / name, field="train.start_from")
        assert (error.value.field, error.value.value) == ("train.start_from", str(tmp_path / name))


def test_an_incomplete_checkpoint_is_skipped(tmp_path):
    save(tmp_path, {1: None, 2: None}).close()
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert checkpoint.find_checkpoint(tmp_path).name == "1"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    checkpoints.close()


def changed_contents(data, rng):
    """Yields copies of the content of a file: one flipped bit, 4 KB of random bytes, the end missing."""
    for _ in range(3):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        yield bytes(changed)
    start = rng.integers(len(data))
    yield data[:start] + rng.bytes(4096) + data[start + 4096 :]
    yield data[:-1]


def read_everything(path):
    model, train = trees(1.0)
    checkpoint.read_meta(path)
    checkpoint.verify(path, "data", "train")
    checkpoint.read_model(path, shapes(model))
    return checkpoint.read_checkpoint(path, shapes(model), shapes(train))


def test_changed_files_are_damage(tmp_path):
    save(tmp_path, {1: 1.0}).close()
    path, rng, tried = checkpoint.find_checkpoint(tmp_path), np.random.default_rng(0), 0
    files = [p for item in ("model", "train", "data", "meta") for p in (path / item).rglob("*") if p.is_file()]
    for file in (file for file in files if file.name != checkpoint.COMPLETE):
        data = file.read_bytes()
        for changed in changed_contents(data, rng):
            file.write_bytes(changed)
            with pytest.raises(DamagedError, match=str(path)):
                read_everything(path)
            tried += 1
        file.unlink()
        with pytest.raises(DamagedError, match=str(path)):
            read_everything(path)
        file.write_bytes(data)
        (extra := file.with_name("extra")).touch()
        with pytest.raises(DamagedError, match="extra"):
            read_everything(path)
        extra.unlink()
    assert tried >= 5 * 20
    read_everything(path)


def test_damaged_metrics_are_named(tmp_path):
    save(tmp_path, {1: 1.0}).close()
    metrics = tmp_path / "checkpoints" / "1" / "metrics"
    (metrics / "metrics").write_text('{"psnr": 9.0}')
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path)
    assert error.value.field == str(metrics)
    assert Checkpoints(tmp_path, read_only=True).steps == [1]
    shutil.rmtree(metrics)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    read_everything(tmp_path / "checkpoints" / "1")


def remove_digests(path):
    """Makes a checkpoint one of a version without digests."""
    for file in path.glob("*/digests.json"):
        file.unlink()
    meta = path / "meta" / "metadata"
    meta.write_text(json.dumps({n: v for n, v in json.loads(meta.read_text()).items() if n != "digests"}))


def test_checkpoints_without_digests_are_read_with_one_warning(tmp_path, caplog):
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    remove_digests(path)
    read_everything(path)
    assert [str(path) in record.message for record in caplog.records if record.name == "vqrae_jax.checkpoint"] == [True]


def test_processes_share_the_verification(tmp_path):
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    file = next((path / "model").rglob("ocdbt.process_0/d/*"))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    damaged = []
    for share in range(3):
        try:
            checkpoint.verify(path, "model", share=share, shares=3)
        except DamagedError:
            damaged.append(share)
    assert len(damaged) == 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    save(tmp_path, {1: None}).close()
    model, _ = trees(1.0)
    path = checkpoint.find_checkpoint(tmp_path)
    for data in (path / "model").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(DamagedError, match=rf"{path} .*(damaged|complete)"):
        checkpoint.read_model(path, shapes(model))
    shutil.rmtree(path / "meta")
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.read_meta(path)


def test_another_architecture_is_reported_leaf_by_leaf(tmp_path):
    save(tmp_path, {1: None}).close()
    target = {"params": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(3)}, "batch_stats": {}}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(target))
    text = str(error.value)
    assert "missing (1): params/bias" in text
    assert "unexpected (1): batch_stats/codebook" in text
    assert "params/kernel (4, 4) instead of (4, 5)" in text


def test_other_trained_parts_are_reported_leaf_by_leaf(tmp_path):
    """Trees are compared before anything is read."""
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    model, train = trees(1.0)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_checkpoint(path, shapes(model), shapes({**train, "adversary": {"kernel": jnp.zeros(3)}}))
    text = str(error.value)
    assert not isinstance(error.value, DamagedError)
    assert "missing (1): adversary/kernel" in text
    assert f"--config.train.start_from={tmp_path}" in text
    model["params"]["kernel"] = jnp.zeros((4, 5))
    with pytest.raises(CheckpointError, match=r"kernel \(4, 4\) instead of \(4, 5\)"):
        checkpoint.read_checkpoint(path, shapes(model), shapes({"step": jnp.zeros(2)}))


@pytest.mark.parametrize("failure", ["reading", pytest.param("saving", marks=pytest.mark.slow)])
def test_a_failed_read_is_one_error(tmp_path, failure):
    """TensorStore's threads continue after the first truncated file, and report to a closed event loop."""
    save(tmp_path, {1: None}).close()
    remove_digests(tmp_path / "checkpoints" / "1")
    for file in (tmp_path / "checkpoints" / "1" / "model").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    reading = (
        "import sys, asyncio\n"
        "from vqrae_jax import checkpoint, storage\n"
        "from vqrae_jax.errors import DamagedError\n"
        "try:\n"
        f"    checkpoint.saved_shapes(storage.resolve_path({str(tmp_path / 'checkpoints' / '1')!r}))\n"
        "except DamagedError as error:\n"
        "    print(error)\n"
    )
    tree = "{'a': jax.numpy.ones(2)}"
    saving = (  # as on a full disk
        "import asyncio, jax\n"
        "from vqrae_jax import checkpoint\n"
        f"checkpoints = checkpoint.Checkpoints({str(tmp_path / 'other')!r})\n"
        f"checkpoints.save(1, {tree}, {tree}, {{}}, {{}})\n"
        "checkpoints.close()\n"
    )
    late = (
        "loop = asyncio.new_event_loop()\n"
        "loop.close()\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        loop.call_soon_threadsafe(print)\n"
        "Late()\n"
        "class Other:\n"
        "    def __del__(self):\n"
        "        raise RuntimeError('another error')\n"
        "Other()\n"
    )
    script = (reading if failure == "reading" else saving) + late
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert failure == "saving" or "1 cannot be read (" in done.stdout
    assert "Event loop is closed" not in done.stderr
    assert "another error" in done.stderr


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file") as error:
        Checkpoints(tmp_path / "file")
    assert error.value.field == "--workdir"


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_user_without_permission_reads_and_gets_one_error(folder, monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # the folders of tmp_path are closed to other users
        workdir = pathlib.Path(name)
        save(workdir, {1: None}).close()
        path = checkpoint.find_checkpoint(workdir)
        read_everything(path)
        checkpoint.check_writable(workdir)
        user = os.geteuid()
        for writable in (workdir, workdir / "checkpoints"):
            writable.chmod(0o777)
        (workdir / folder).chmod(0o555)
        try:
            os.seteuid(user or 65534)
            read_everything(path)
            with pytest.raises(CheckpointError, match=str(workdir / folder)) as error:
                checkpoint.check_writable(workdir)
        finally:
            os.seteuid(user)
            (workdir / folder).chmod(0o777)
        assert error.value.field == "--workdir"


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    clock, now = itertools.count(1), time.time()
    monkeypatch.setattr(time, "time", lambda: now - 10.0 * next(clock))
    checkpoints = save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, keep_last=1)
    assert checkpoints.steps == [1, 3]
    checkpoints.close()
    for file in tmp_path.rglob("*"):
        os.utime(file, (2e9, 2e9))
    checkpoints = save(tmp_path, {4: 1.0}, keep_last=1)
    assert checkpoints.steps == [1, 4]
    checkpoints.close()
    assert read_everything(checkpoint.find_checkpoint(tmp_path, step=1))[2] == {"next_index": 1}
