"""What a run begins with."""

import logging
import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import loop
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
    # A step that was traced in this process before may be compiled a little otherwise: so is this one.
    shutil.copytree(trained, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "2")
    whole = opened(tmp_path / "whole")
    whole.state, _ = whole.step(whole.state, whole.frozen, whole.next_batch())
    assert_equal(run.state, whole.state)
    for ours, theirs in zip(jax.tree.leaves(run.state), jax.tree.leaves(opened(trained).state), strict=True):
        np.testing.assert_allclose(jax.device_get(ours), jax.device_get(theirs), rtol=1e-5, atol=1e-5)


def test_a_damaged_one_is_not_evaluated_nor_another_unasked(trained, tiny, tmp_path, one_device):
    """Training, evaluation and inference each say what they do; figures and codes are of the step that is named."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / "2" / "model").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedError, match=r"checkpoints/2 cannot be read .*; --step=1 takes another") as no:
        loop.evaluate(tiny(), tmp_path, one_device)
    with pytest.raises(DamagedError, match=r"2 cannot be read .*checkpoints/1 can be given in its") as nor:
        Tokenizer.load(tmp_path)
    assert len(str(no.value).splitlines()) == len(str(nor.value).splitlines()) == 1
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1, 2]
    assert loop.evaluate(tiny(), tmp_path, one_device, step=1)["step"] == 1
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(DamagedError, match="there is no other"):
        loop.evaluate(tiny(), tmp_path, one_device)
    with pytest.raises(DamagedError, match="there is no other"):
        Tokenizer.load(tmp_path)


def test_a_step_that_is_there_is_evaluated(trained, tiny, one_device):
    assert loop.evaluate(tiny(), trained, one_device, step=1)["step"] == 1
    assert loop.evaluate(tiny(), trained, one_device)["step"] == 2
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 7; it has \[1, 2\]"):
        loop.evaluate(tiny(), trained, one_device, step=7)
    with pytest.raises(CheckpointError, match="give the workdir of the run, and --step=1"):
        loop.evaluate(tiny(), trained / "checkpoints" / "1", one_device)


def test_when_all_are_damaged_nothing_begins_anew(trained, opened, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read; to begin anew"):
        opened(tmp_path)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"num_embeddings": 64}}, r"another architecture than this config:\n.*codebook \(32, .* of \(64, "),
        ({"model": {"quantizer": "fsq"}}, r"another architecture than this config:\n  missing .*quantizer/"),
        ({"train": {"trainable": ("quantizer", "decoder")}}, r"another architecture .*\n  unexpected .*encoder/"),
        ({"adversary": {"discriminator": "patch", "width": 4, "layers": 1}}, r"missing .*adversary/.*\n.*start_from="),
    ],
    ids=["size", "quantizer", "part", "term"],
)
def test_another_config_is_no_damage(trained, opened, tmp_path, changed, message):
    """The leaves that differ are named, and every checkpoint keeps its name."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=message) as error:
        opened(tmp_path, **changed)
    assert "damaged" not in str(error.value)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1, 2]


def test_clipping_comes_and_goes(trained, opened, tmp_path):
    """As a diverged run is told to do; both optimizers keep what they know."""
    adversary = {"discriminator": "patch", "width": 4, "layers": 1}
    clipped = {**adversary, "optimizer": {"clip_norm": 1.0}}
    first = opened(tmp_path, optimizer={"clip_norm": 0.0}, adversary=adversary)
    first.state, _ = first.step(first.state, first.frozen, first.next_batch())
    first.save()
    first.checkpoints.wait()
    second = opened(tmp_path, optimizer={"clip_norm": 1.0}, adversary=clipped)
    assert_equal(second.state.opt_state[1], first.state.opt_state)
    assert_equal(second.state.adversary["opt_state"][1], first.state.adversary["opt_state"])
    second.state, _ = second.step(second.state, second.frozen, second.next_batch())
    second.save()
    second.checkpoints.wait()
    third = opened(tmp_path, optimizer={"clip_norm": 0.0}, adversary=adversary)
    assert_equal(third.state.opt_state, second.state.opt_state[1])
    assert int(third.state.step) == 2


@pytest.fixture(scope="module")
def begin(tiny, one_mesh):
    """The state of a run that begins: begin(**fields of the train section)."""

    def start(**train):
        task = TokenizerTask.build(tiny(train=train), one_mesh)
        return jax.device_get(task.init())

    return start


def test_parts_and_renames(trained, opened, begin):
    source = opened(trained).state
    taken = begin(start_from=str(trained))
    assert int(taken.step) == 0
    assert_equal(taken.inference(), source.inference())
    fresh, part = begin(), begin(start_from=str(trained), start_parts=("decoder",))
    assert_equal(part.params, {**fresh.params, "decoder": source.ema_params["decoder"]})
    assert_equal(part.batch_stats, fresh.batch_stats)
    renames = {f"decoder/blocks/norm{i}": f"decoder/blocks/norm{3 - i}" for i in (1, 2)}
    swapped = begin(start_from=str(trained), start_parts=("decoder",), start_renames=renames).params["decoder"]
    blocks = source.ema_params["decoder"]["blocks"]
    assert_equal(swapped["blocks"], {**blocks, "norm1": blocks["norm2"], "norm2": blocks["norm1"]})


def test_what_does_not_fit_is_named(trained, begin):
    with pytest.raises(CheckpointError, match=r"missing \(2\): .*pred"):
        begin(start_from=str(trained), start_renames={"decoder/pred": "decoder/out"})
    with pytest.raises(ConfigError, match=r"start_parts=\('decoder',\): .* has encoder, painter, quantizer, not dec"):
        begin(start_from=str(trained), start_parts=("decoder",), start_renames={"decoder": "painter"})
