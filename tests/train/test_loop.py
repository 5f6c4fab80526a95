import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.errors import CheckpointError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import loop

ROOT = pathlib.Path(__file__).parents[2]


def state_of(workdir, config, devices):
    run = loop.Run(config, workdir, devices)
    state = jax.device_get(run.state)
    run.close()
    return state


def assert_equal(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """Six steps without a stop, on one device."""
    workdir = tmp_path_factory.mktemp("straight")
    figures = loop.train(tiny(), workdir, jax.devices()[:1])
    return workdir, figures


def test_resuming_equals_going_on(tiny, straight, tmp_path, one_device):
    workdir, figures = straight
    loop.train(tiny(train={"steps": 3, "evaluate_every": 3}, optimizer={"decay_end_steps": 6}), tmp_path, one_device)
    resumed = loop.train(tiny(), tmp_path, one_device)
    assert resumed == figures
    assert_equal(state_of(tmp_path, tiny(), one_device), state_of(workdir, tiny(), one_device))


def test_everything_is_written(straight):
    workdir, figures = straight
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [2, 4, 6]
    assert {"loss/pixel", "loss/vq", "grad_norm"} <= lines[0].keys()
    health = ("usage", "perplexity", "entropy_bits", "dead", "starved", "revived", "quantization_error", "distance")
    assert {f"codebook/{name}" for name in health} <= lines[0].keys()
    assert figures["eval/images"] == 64
    assert (workdir / "reconstructions.png").stat().st_size > 1000
    assert any((workdir / "tensorboard").iterdir())
    path = checkpoint.find_checkpoint(workdir)
    assert path.name == "6"
    meta = checkpoint.read_meta(path)
    assert meta["config"]["model"]["num_embeddings"] == 32
    assert {"revision", "version", "step"} <= meta.keys()


def test_a_finished_run_only_reports(tiny, straight, one_device, caplog):
    workdir, figures = straight
    before = (workdir / "metrics.jsonl").read_text()
    with caplog.at_level("INFO", "vqrae_jax"):
        assert loop.train(tiny(), workdir, one_device) == pytest.approx(figures)
    assert "nothing to train: train.steps=6 are done; give more to go on" in caplog.text
    assert (workdir / "metrics.jsonl").read_text() == before


def test_evaluate_mode_gives_the_figures_of_training(tiny, straight, caplog):
    workdir, figures = straight
    with caplog.at_level("INFO", "vqrae_jax"):
        evaluated = loop.evaluate(tiny(), workdir)  # on eight devices
    assert f"wrote {workdir / 'evaluation.json'} and {workdir / 'evaluation' / 'index.html'}" in caplog.text
    assert evaluated["step"] == 6
    assert {name: evaluated[name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_inference_gets_the_live_codebook(tiny, straight, one_device):
    """The origin ships the codebook that it started with."""
    workdir, _ = straight
    state = state_of(workdir, tiny(), one_device)
    start = loop.Run(tiny(), workdir / "other", one_device)
    first = jax.device_get(start.state.batch_stats["quantizer"]["codebook"])
    start.close()
    held = Tokenizer.load(workdir).variables["batch_stats"]["quantizer"]["codebook"]
    np.testing.assert_array_equal(held, state.batch_stats["quantizer"]["codebook"])
    assert np.abs(np.asarray(held) - first).max() > 0.1


def test_checkpoints_move_between_meshes(tiny, tmp_path, one_device):
    fsdp = tiny(mesh={"data": 8, "fsdp": True, "fsdp_min_size": 1}, train={"steps": 1, "checkpoint_every": 1})
    loop.train(fsdp, tmp_path)
    saved = state_of(tmp_path, fsdp, None)
    for mesh, devices in (({}, one_device), ({"data": 4, "model": 2}, None)):
        run = loop.Run(tiny(mesh=mesh), tmp_path, devices)
        assert int(run.state.step) == 1
        assert_equal(jax.device_get(run.state), saved)
        kernel = run.state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.num_devices == (1 if devices else 8)
        run.close()


def test_one_compilation_per_run_and_one_state(tiny, tmp_path, one_device):
    run = loop.Run(tiny(), tmp_path, one_device)
    for _ in range(3):
        before = run.state
        run.state, _ = run.step(run.state, run.frozen, run.next_batch())
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # the new state took its place
    assert run.step._cache_size() == 1
    run.close()


@pytest.fixture
def fetched(monkeypatch):
    """Counts arrays whose values are brought to the host: each is a wait for the device."""
    from jax._src.array import ArrayImpl

    count, value = [], ArrayImpl._value.fget
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda self: count.append(self.shape) or value(self)))
    return count


def test_between_two_lines_of_the_log_nothing_waits_for_the_device(tiny, tmp_path, one_device, fetched):
    found = []
    for steps in (4, 12):
        seldom = {"steps": steps, "log_every": steps, "evaluate_every": steps, "checkpoint_every": steps}
        start = len(fetched)
        loop.train(tiny(train=seldom), tmp_path / str(steps), one_device)
        found.append(len(fetched) - start)
    assert found[0] == found[1] > 0


def test_another_architecture_is_refused(tiny, straight, one_device):
    workdir, _ = straight
    with pytest.raises(CheckpointError, match=r"codebook \(32, 16\) instead of \(16, 16\)"):
        loop.Run(tiny(model={"num_embeddings": 16}), workdir, one_device)


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path):
    """Files may grow to a few kilobytes only from step 4 on; the checkpoint of step 3 stays and is named."""
    script = """
import resource, sys, jax
sys.path.insert(0, "tests")
from conftest import tiny_config
from vqrae_jax.train import loop
config = tiny_config()
write = loop.Run.save
def save(run, metrics=None):
    if int(run.state.step) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    write(run, metrics)
loop.Run.save = save
loop.train(config, sys.argv[1])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr
    assert "last complete checkpoint is" in done.stderr
    assert checkpoint.find_checkpoint(tmp_path).name == "3"
    assert Tokenizer.load(tmp_path).codebook_size == 32


def test_a_signal_saves_and_stops(tiny, tmp_path, one_device, monkeypatch):
    """SIGTERM, or Ctrl-C once, during step 2."""
    fetch, before = loop.Run.next_batch, signal.getsignal(signal.SIGINT)

    def next_batch(run):
        if int(run.state.step) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(run)

    monkeypatch.setattr(loop.Run, "next_batch", next_batch)
    with pytest.raises(loop.Stopped, match="stopped at step 2, which is saved"):
        loop.train(tiny(train={"checkpoint_every": 100}), tmp_path, one_device)
    assert checkpoint.find_checkpoint(tmp_path).name == "2"
    assert signal.getsignal(signal.SIGINT) is before
