"""The training loop: exact resuming, files, meshes, waits, compilations, signals."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.data import images
from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import hooks, loop
from vqrae_jax.train.run import open_run, save_checkpoint
from vqrae_jax.train.task import jit_step

ROOT = pathlib.Path(__file__).parents[2]
END = {"decay_end_steps": 6}
PATCH = {"discriminator": "patch", "width": 4, "layers": 1, "lecam_weight": 0.1}


def state_of(workdir, config, devices):
    with open_run(config, workdir, devices) as (_, state):
        return jax.device_get(state)


@pytest.fixture(scope="module")
def step_calls():
    """For each step of `straight`, the number of compilations and whether its new state has replaced the old one."""
    return []


@pytest.fixture(scope="module")
def straight(tiny, step_calls, tmp_path_factory):
    """Six steps without a stop, on one device."""

    def jit_recorded_step(*arguments):
        step = jit_step(*arguments)

        def call(state, *inputs):
            result = step(state, *inputs)
            step_calls.append((step._cache_size(), all(leaf.is_deleted() for leaf in jax.tree.leaves(state))))
            return result

        return call

    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_step", jit_recorded_step)
        return workdir, loop.train(tiny(optimizer=END), workdir, jax.devices()[:1])


@pytest.fixture
def step_keys(caplog):
    """Returns the keys under which the compilation cache was asked for the training step since the last call."""

    def keys():
        messages = [r.getMessage() for r in caplog.records if r.name == "jax._src.compiler"]
        caplog.clear()
        return {match[1] for text in messages if (match := re.search(r"'jit_step' with key '([^']*)'", text))}

    with caplog.at_level("DEBUG", "jax._src.compiler"):
        yield keys


def test_one_compilation_per_run_and_one_state(straight, step_calls):
    assert {compilations for compilations, _ in step_calls} == {1}
    assert [replaced for _, replaced in step_calls[:2]] == [
        True,
        True,
    ]  # later, a checkpoint may be reading the old one


def test_a_signal_saves_and_a_longer_run_resumes_exactly_and_compiles_no_other_step(
    tiny, straight, tmp_path, one_device, step_keys, assert_same, monkeypatch
):
    """SIGTERM during step 2 of a run of three steps."""
    workdir, metrics = straight
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    step_keys()
    with monkeypatch.context() as patch:
        patch.setattr(hooks.StepTimer, "before_step", interrupt)
        with pytest.raises(loop.Stopped) as stopped:
            loop.train(tiny(train={"steps": 3, "checkpoint_every": 100}, optimizer=END), tmp_path, one_device)
    assert stopped.value.step == 2
    assert checkpoint.find_checkpoint(tmp_path).name == "2"
    assert signal.getsignal(signal.SIGINT) is handler
    keys = step_keys()
    assert loop.train(tiny(optimizer=END), tmp_path, one_device) == metrics
    assert step_keys() == keys
    assert len(keys) == 1
    assert_same(state_of(tmp_path, tiny(), one_device), state_of(workdir, tiny(), one_device))


def test_all_files_are_written(straight):
    workdir, metrics = straight
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [2, 4, 6]
    assert {"loss/pixel", "loss/vq", "grad_norm"} <= lines[0].keys()
    health = ("usage", "perplexity", "entropy_bits", "dead", "starved", "revived", "quantization_error", "distance")
    assert {f"codebook/{name}" for name in health} <= lines[0].keys()
    assert metrics["eval/images"] == 64
    assert (workdir / "reconstructions.png").stat().st_size > 1000
    assert any((workdir / "tensorboard").iterdir())
    meta = checkpoint.read_meta(workdir / "checkpoints" / "6")
    assert meta["config"]["model"]["num_embeddings"] == 32
    assert {"revision", "version", "step"} <= meta.keys()


@pytest.mark.slow
def test_without_validation_images_the_grid_has_training_images(
    tiny, tmp_path, one_device, caplog, capsys, monkeypatch
):
    """The grid has training images, and the table at the end names files that exist."""
    monkeypatch.setenv("COLUMNS", "1000")
    for i in range(8):
        images.write_image(tmp_path / "images" / f"{i}.png", np.full((32, 32, 3), 30 * i, np.uint8))
    data = {"source": "folder", "path": str(tmp_path / "images"), "scale": (1, 1), "crop": "center"}
    config, workdir = tiny(data=data, train={"steps": 1}), tmp_path / "run"
    with caplog.at_level("INFO", "vqrae_jax"):
        assert loop.train(config, workdir, one_device) == {}
    assert "data.eval_path" in caplog.text
    grid = images.read_image(workdir / "reconstructions.png")
    assert {30 * i for i in range(8)} <= set(np.unique(grid))
    table = capsys.readouterr().out
    assert "training images" in table
    assert "PSNR" not in table
    assert [path for path in named_paths(table, workdir) if not os.path.exists(path)] == []
    (workdir / "reconstructions.png").unlink()
    loop.train(config, workdir, one_device)
    assert len(named_paths(table, workdir)) - 1 == len(named_paths(capsys.readouterr().out, workdir)) == 3


def named_paths(table, folder):
    return re.findall(rf"{folder}\S*", table)


def test_a_finished_run_only_evaluates(tiny, straight, one_device, caplog):
    workdir, metrics = straight
    before = (workdir / "metrics.jsonl").read_text()
    with caplog.at_level("INFO", "vqrae_jax"):
        assert loop.train(tiny(), workdir, one_device) == pytest.approx(metrics)
    assert "train.steps=6" in caplog.text
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_evaluate_returns_the_metrics_of_training(tiny, straight, caplog):
    workdir, metrics = straight
    with caplog.at_level("INFO", "vqrae_jax"):
        evaluated = loop.evaluate(tiny(), workdir)  # on eight devices
    assert f"{workdir / 'evaluation.json'} and {workdir / 'evaluation' / 'index.html'}" in caplog.text
    assert evaluated["step"] == 6
    assert {name: evaluated[name] for name in metrics} == pytest.approx(metrics, rel=1e-4)


@pytest.mark.slow
def test_inference_gets_the_live_codebook(tiny, straight, one_device):
    """The PyTorch VQRAE saves the codebook that it started with."""
    workdir, _ = straight
    trained = state_of(workdir, tiny(), one_device).batch_stats["quantizer"]["codebook"]
    initial = state_of(workdir / "other", tiny(), one_device).batch_stats["quantizer"]["codebook"]
    loaded = Tokenizer.load(workdir).variables["batch_stats"]["quantizer"]["codebook"]
    np.testing.assert_array_equal(loaded, trained)
    assert np.abs(np.asarray(loaded) - initial).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"data": 4, "model": 2}])
def test_checkpoints_move_between_meshes(tiny, tmp_path, one_device, assert_same, mesh):
    """With the discriminator: its parameters, moments, power iteration and moving averages."""
    fsdp = {"data": 8, "fsdp": True, "fsdp_min_size": 1}
    with open_run(tiny(mesh=fsdp, adversary=PATCH), tmp_path) as (run, state):
        # Another state than the initial one of any mesh.
        state = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + 1, x.sharding), state)
        save_checkpoint(run, state, {})
        run.checkpoints.wait()
        saved = jax.device_get(state)
    assert set(saved.adversary) == {"params", "opt_state", "spectral", "lecam"}
    with open_run(tiny(mesh=mesh, adversary=PATCH), tmp_path, None if mesh else one_device) as (_, state):
        assert int(state.step) == 1
        assert_same(jax.device_get(state), saved)
        kernel = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.num_devices == (8 if mesh else 1)


@pytest.fixture
def fetches(monkeypatch):
    """Lists the shapes of arrays whose values are copied to the host: each is a wait for the device."""
    from jax._src.array import ArrayImpl

    shapes, value = [], ArrayImpl._value.fget
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda self: shapes.append(self.shape) or value(self)))
    return shapes


@pytest.mark.slow
def test_nothing_waits_for_the_device_between_two_log_lines(tiny, tmp_path, one_device, fetches):
    numbers = []
    for steps in (4, 12):
        rarely = {"steps": steps, "log_every": steps, "evaluate_every": steps, "checkpoint_every": steps}
        start = len(fetches)
        loop.train(tiny(train=rarely), tmp_path / str(steps), one_device)
        numbers.append(len(fetches) - start)
    assert numbers[0] == numbers[1] > 0


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_checkpoints(trained, tiny, tmp_path):
    """From step 4 on files may grow to a few kilobytes only; the checkpoint of step 3 stays."""
    script = """
import json, resource, sys, jax
from vqrae_jax import config
from vqrae_jax.train import loop
save = loop.save_checkpoint
def save_checkpoint(run, state, metrics):
    if int(state.step) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    save(run, state, metrics)
loop.save_checkpoint = save_checkpoint
settings = config.from_dict(config.Config, json.loads(sys.argv[2]))
loop.train(settings, sys.argv[1], jax.devices()[:1])
"""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, "-c", script, str(tmp_path), tiny().model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr
    assert f"{tmp_path / 'checkpoints' / '3'}" in done.stderr
    assert checkpoint.find_checkpoint(tmp_path).name == "3"
    assert Tokenizer.load(tmp_path).codebook_size == 32


@pytest.mark.slow
def test_signals_during_evaluation_and_saving(tiny, tmp_path, one_device, monkeypatch):
    """The step after SIGTERM is saved; a second Ctrl-C ends the run with what is complete, unlocked and readable."""

    def send(*numbers):
        def patched(original):
            def call(*args, **kwargs):
                result = original(*args, **kwargs)
                for number in numbers:
                    signal.raise_signal(number)
                return result

            return call

        return patched

    config = tiny(train={"steps": 5, "log_every": 1, "evaluate_every": 1, "checkpoint_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", send(signal.SIGTERM)(Evaluator.evaluate))
        with pytest.raises(loop.Stopped) as stopped:
            loop.train(config, tmp_path, one_device)
    assert stopped.value.step == int(checkpoint.find_checkpoint(tmp_path).name) == 2
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", send(signal.SIGTERM)(checkpoint.Checkpoints.save))
        with pytest.raises(loop.Stopped) as stopped:
            loop.train(config, tmp_path, one_device)
    assert stopped.value.step == int(checkpoint.find_checkpoint(tmp_path).name) == 4
    with monkeypatch.context() as patch:
        interrupts = send(signal.SIGINT, signal.SIGINT)
        patch.setattr(checkpoint.Checkpoints, "save", interrupts(checkpoint.Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path, one_device)
    assert checkpoint.find_checkpoint(tmp_path).name == "5"
    assert not (tmp_path / "run.lock").exists()
    assert Tokenizer.load(tmp_path).provenance["step"] == 5
