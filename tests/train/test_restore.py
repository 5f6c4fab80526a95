"""What a run begins with."""

import logging
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.config import ConfigError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.models.vit import restack_blocks, stacked_blocks
from vqrae_jax.train import loop, restore


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
    assert "it is now called 2.damaged, and the run goes on from step 1" in caplog.text
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
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


def test_parts_renames_and_stacking(trained, opened, tmp_path, tiny):
    source, fresh = opened(trained).state, opened(tmp_path / "fresh").state
    train = {"start_from": str(trained), "start_parts": ("decoder",)}
    run = opened(tmp_path / "part", train=train, model={"scan_layers": True})
    assert_equal(run.state.params["decoder"], restack(source, True).ema_params["decoder"])
    assert_equal(run.state.params["encoder"], fresh.params["encoder"])
    assert_equal(run.state.batch_stats, fresh.batch_stats)
    renames = {"decoder/block00": "decoder/block01", "decoder/block01": "decoder/block00"}
    run = opened(tmp_path / "swapped", train=train | {"start_renames": renames})
    assert_equal(run.state.params["decoder"]["block01"], source.ema_params["decoder"]["block00"])
    assert_equal(run.state.params["decoder"]["block00"], source.ema_params["decoder"]["block01"])


@pytest.mark.parametrize(
    ("train", "model", "error", "message"),
    [
        ({"start_parts": ("decoder", "head")}, {}, ConfigError, r"has decoder, encoder, quantizer, not \['head'\]"),
        (
            {},
            {"num_embeddings": 16},
            checkpoint.CheckpointError,
            r"quantizer/codebook \(32, 16\) instead of \(16, 16\)",
        ),
        ({"start_renames": {"decoder/pred": "decoder/out"}}, {}, checkpoint.CheckpointError, r"missing \(2\): .*pred"),
    ],
)
def test_what_does_not_fit_is_named(trained, opened, tmp_path, train, model, error, message):
    with pytest.raises(error, match=message):
        opened(tmp_path, train={"start_from": str(trained), **train}, model=model)
