"""What a run begins with."""

import functools
import logging
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint, sharding
from vqrae_jax.config import ConfigError, TrainConfig
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.models.vit import restack_blocks, stacked_blocks
from vqrae_jax.train import loop, restore
from vqrae_jax.train.tokenizer import TokenizerTask


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two steps, both saved."""
    workdir = tmp_path_factory.mktemp("trained")
    loop.train(tiny(train={"steps": 2, "checkpoint_every": 1}), workdir, jax.devices()[:1])
    return workdir


@pytest.fixture
def opened(tiny, one_device):
    """Runs that are closed at the end: opened(workdir, section={...})."""
    runs = []

    def open_run(workdir, **sections):
        runs.append(loop.Run(tiny(**sections), workdir, one_device))
        return runs[-1]

    yield open_run
    for run in runs:
        run.close()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def damage(step):
    for file in (step / "train").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, opened, tmp_path, caplog):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "2")
    with caplog.at_level(logging.WARNING):
        run = opened(tmp_path)
    assert int(run.state.step) == 1
    assert "checkpoints/2 cannot be read" in caplog.text
    assert "step 1 is taken in its place" in caplog.text
    (aside,) = (tmp_path / "checkpoints").glob("2.damaged-*")
    assert f"is now called {aside.name}" in caplog.text
    run.state, _ = run.step(run.state, run.frozen, run.next_batch())
    run.save()
    run.checkpoints.wait()
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1, 2]
    assert_equal(opened(trained).state, run.state)


def test_when_all_are_damaged_nothing_begins_anew(trained, opened, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(checkpoint.CheckpointError, match=r"none of the checkpoints in .* can be read; to begin anew"):
        opened(tmp_path)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1, 2]


def test_a_run_goes_on_with_stacked_layers_and_back(trained, opened, tmp_path):
    single, stacked = opened(trained).state, opened(trained, model={"scan_layers": True})
    assert "blocks" in stacked.state.params["decoder"]
    assert_equal(stacked.state, restack(single, True))
    stacked.checkpoints.close()
    stacked.checkpoints = checkpoint.Checkpoints(tmp_path)
    stacked.save()
    stacked.checkpoints.wait()
    assert_equal(opened(tmp_path).state, single)


def restack(state, stacked):
    moved = [restack_blocks(tree, {"decoder": stacked}) for tree in (state.inference(), state.rest())]
    return restore.TrainState.join(*moved)


def test_stacked_blocks_are_found_by_name():
    tree = {"decoder": {"blocks": {"a": np.zeros((2, 3))}}, "head": {"trunk": {"block00": {"a": np.zeros(3)}}}, "x": 1}
    assert stacked_blocks(tree) == {"decoder": True, "trunk": False}


def test_a_new_run_takes_another_ones_model(trained, opened, tmp_path):
    """The encoder that was trained there is frozen here, and must be in this run's own checkpoints."""
    source = opened(trained).state.inference()
    train = {"start_from": str(trained), "trainable": ("decoder",)}
    run = opened(tmp_path, train=train)
    assert int(run.state.step) == 0
    assert_equal(run.state.params, {"decoder": source["params"]["decoder"]})
    assert_equal(run.state.ema_params, run.state.params)
    assert_equal(run.state.batch_stats, source["batch_stats"])
    assert_equal(run.frozen, {"encoder": source["params"]["encoder"]})
    run.state, _ = run.step(run.state, run.frozen, run.next_batch())
    run.save()
    run.checkpoints.wait()
    again = opened(tmp_path, train=train | {"start_from": "/gone"})
    assert int(again.state.step) == 1
    assert_equal(again.frozen, run.frozen)
    assert_equal(Tokenizer.load(tmp_path).variables["params"]["encoder"], source["params"]["encoder"])


@pytest.fixture(scope="module")
def fresh(tiny, one_mesh):
    """The task and state of a run that begins, of plain and of stacked layers."""
    tasks = [TokenizerTask.build(tiny(model={"scan_layers": scan}), one_mesh) for scan in (False, True)]
    return [(task, task.init()) for task in tasks]


def begin(task_and_state, **train):
    task, state = task_and_state
    place = functools.partial(sharding.shardings, mesh=task.mesh)
    return restore.start_from(TrainConfig(**train), state, {}, place).state


def test_parts_renames_and_stacking(trained, opened, fresh):
    source, (plain, stacked) = opened(trained).state, fresh
    state = begin(stacked, start_from=str(trained), start_parts=("decoder",))
    assert_equal(state.params["decoder"], restack(source, True).ema_params["decoder"])
    assert_equal(state.params["encoder"], stacked[1].params["encoder"])
    assert_equal(state.batch_stats, stacked[1].batch_stats)
    renames = {"decoder/block00": "decoder/block01", "decoder/block01": "decoder/block00"}
    state = begin(plain, start_from=str(trained), start_parts=("decoder",), start_renames=renames)
    assert_equal(state.params["decoder"]["block01"], source.ema_params["decoder"]["block00"])
    assert_equal(state.params["decoder"]["block00"], source.ema_params["decoder"]["block01"])


def test_what_does_not_fit_is_named(trained, fresh):
    plain, _ = fresh
    with pytest.raises(ConfigError, match=r"has decoder, encoder, quantizer, not \['head'\]"):
        begin(plain, start_from=str(trained), start_parts=("decoder", "head"))
    with pytest.raises(checkpoint.CheckpointError, match=r"missing \(2\): .*pred"):
        begin(plain, start_from=str(trained), start_renames={"decoder/pred": "decoder/out"})
    task, state = plain
    smaller = state.replace(batch_stats=jax.tree.map(lambda x: x[:16] if x.ndim else x, state.batch_stats))
    with pytest.raises(checkpoint.CheckpointError, match=r"codebook \(32, 16\) instead of \(16, 16\)"):
        begin((task, smaller), start_from=str(trained))
