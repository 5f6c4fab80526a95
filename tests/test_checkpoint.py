import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from vqrae_jax import checkpoint, storage
from vqrae_jax.checkpoint import Checkpoints
from vqrae_jax.errors import CheckpointError, DamagedError

ROOT = pathlib.Path(__file__).parents[1]


def trees(value):
    model = {"params": {"kernel": jnp.full((4, 4), value)}, "batch_stats": {"codebook": jnp.full((8, 2), value)}}
    return model, {"step": jnp.asarray(int(value))}


def save(folder, scores, **options):
    kept = Checkpoints(folder, **options)
    for step, score in scores.items():
        model, train = trees(float(step))
        kept.save(
            step,
            model,
            train,
            {"next_index": step},
            {"config": {}, "version": vqrae_jax.__version__},
            score and {"psnr": score},
        )
    kept.wait()
    return kept


def shapes(tree):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


@pytest.fixture(params=["here", "bucket"])
def workdir(request, tmp_path):
    if request.param == "here":
        return tmp_path
    request.getfixturevalue("buckets")
    return storage.at(f"gs://bucket/{tmp_path.name}")


def test_round_trip(workdir):
    kept = save(workdir, {1: None})
    model, train = trees(1.0)
    kept.close()
    restored = checkpoint.read_checkpoint(checkpoint.find_checkpoint(workdir), shapes(model), shapes(train))
    jax.tree.map(np.testing.assert_array_equal, restored, (model, train, {"next_index": 1}))


def test_the_last_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0, 4: None, 5: 15.0}, keep_last=2, keep_best=1).close()
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [2, 4, 5]


def test_one_that_is_set_aside_is_no_step_any_more(workdir):
    kept = save(workdir, {1: None, 2: None})
    kept.set_aside(2)
    assert kept.steps == checkpoint.completed_steps(kept.folder) == [1]
    kept.close()
    save(workdir, {2: None}).close()
    assert checkpoint.find_checkpoint(workdir).name == "2"


def test_reading_changes_nothing(tmp_path):
    """Another run may be saving there."""
    kept = Checkpoints(tmp_path / "none", read_only=True)
    assert kept.steps == []
    kept.close()
    assert not (tmp_path / "none").exists()
    save(tmp_path, {1: None, 2: None}).close()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    kept = Checkpoints(tmp_path, keep_last=1, read_only=True)
    assert kept.steps == [1, 2]
    kept.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_multiples_of_keep_every_are_kept_for_good(tmp_path):
    save(tmp_path, dict.fromkeys(range(1, 8)), keep_last=1, keep_best=0, keep_every=3).close()
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [3, 6, 7]


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "__version__", "0.0.9")
    with pytest.raises(CheckpointError, match=r"written by vqrae_jax .* newer than this 0\.0\.9: update"):
        checkpoint.read_meta(path)
    monkeypatch.setattr(checkpoint, "__version__", "10.0.0")
    assert checkpoint.read_meta(path)["config"] == {}


def test_only_what_is_asked_for_is_read(tmp_path):
    save(tmp_path, {1: None}).close()
    model, _ = trees(1.0)
    del model["batch_stats"]
    read = checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(model), partial=True)
    jax.tree.map(np.testing.assert_array_equal, read, model)


def test_saving_a_step_twice_changes_nothing(tmp_path):
    kept = save(tmp_path, {1: None})
    model, train = trees(9.0)
    kept.save(1, model, train, {}, {})
    kept.close()
    read = checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(model))
    assert read["params"]["kernel"][0, 0] == 1.0


def test_find(tmp_path):
    save(tmp_path, {1: None, 2: None}).close()
    newest = tmp_path / "checkpoints" / "2"
    assert checkpoint.find_checkpoint(tmp_path) == newest
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints") == newest
    assert checkpoint.find_checkpoint(tmp_path, step=1).name == "1"
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints" / "1").name == "1"
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 7; it has \[1, 2\]"):
        checkpoint.find_checkpoint(tmp_path, step=7)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint.find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint \(it holds nothing\)"):
        checkpoint.find_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, {1: None, 2: None}).close()
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert checkpoint.find_checkpoint(tmp_path).name == "1"
    kept = Checkpoints(tmp_path)
    assert kept.steps == [1]
    kept.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    save(tmp_path, {1: None}).close()
    model, _ = trees(1.0)
    path = checkpoint.find_checkpoint(tmp_path)
    for data in (path / "model").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(DamagedError, match=rf"{path} .*(damaged|complete)"):
        checkpoint.read_model(path, shapes(model))
    shutil.rmtree(path / "meta")
    with pytest.raises(CheckpointError, match="no readable config"):
        checkpoint.read_meta(path)


def test_another_architecture_is_told_leaf_by_leaf(tmp_path):
    save(tmp_path, {1: None}).close()
    target = {"params": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(3)}, "batch_stats": {}}
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_model(checkpoint.find_checkpoint(tmp_path), shapes(target))
    text = str(error.value)
    assert "missing (1): params/bias" in text
    assert "unexpected (1): batch_stats/codebook" in text
    assert "params/kernel (4, 4) instead of (4, 5)" in text


def test_what_trains_otherwise_is_told_leaf_by_leaf(tmp_path):
    """Before anything is read, and apart from a model that differs."""
    save(tmp_path, {1: None}).close()
    path = checkpoint.find_checkpoint(tmp_path)
    model, train = trees(1.0)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_checkpoint(path, shapes(model), shapes({**train, "adversary": {"kernel": jnp.zeros(3)}}))
    text = str(error.value)
    assert not isinstance(error.value, DamagedError)
    assert "has this model, but other optimizers, terms or trained parts than this config" in text
    assert "missing (1): adversary/kernel" in text
    assert f"--config.train.start_from={tmp_path}," in text
    model["params"]["kernel"] = jnp.zeros((4, 5))
    with pytest.raises(CheckpointError, match=r"is of another architecture .*\n.*kernel \(4, 4\) instead of \(4, 5\)"):
        checkpoint.read_checkpoint(path, shapes(model), shapes({"step": jnp.zeros(2)}))


def test_a_failed_read_is_one_error(tmp_path):
    """TensorStore's threads go on after the first of many files that are cut, and find its event loop closed."""
    save(tmp_path, {1: None}).close()
    for file in (tmp_path / "checkpoints" / "1" / "model").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    script = (
        "import sys, asyncio\n"
        "from vqrae_jax import checkpoint, storage\n"
        "try:\n"
        f"    checkpoint.saved_shapes(storage.at({str(tmp_path / 'checkpoints' / '1')!r}))\n"
        "except DamagedError as error:\n"
        "    print(error)\n"
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "1 cannot be read (model: " in done.stdout
    assert "Event loop is closed" not in done.stderr
    assert "another error" in done.stderr

    _, found, late = script.partition("loop = asyncio")  # and those of a save, as on a full disk
    tree = "{'a': jax.numpy.ones(2)}"
    saving = (
        "import asyncio, jax\n"
        "from vqrae_jax import checkpoint\n"
        f"there = checkpoint.Checkpoints({str(tmp_path / 'other')!r})\n"
        f"there.save(1, {tree}, {tree}, {{}}, {{}})\n"
        "there.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", saving + found + late], capture_output=True, text=True, cwd=ROOT)
    assert "Event loop is closed" not in done.stderr
    assert "another error" in done.stderr


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--workdir: .* cannot be written"):
        Checkpoints(tmp_path / "file")
