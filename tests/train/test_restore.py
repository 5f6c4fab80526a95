"""The variables that a run starts with: its checkpoints, or parts of another run's model."""

import dataclasses
import json
import logging
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vqrae_jax import checkpoint, sharding
from vqrae_jax.config import EncoderParams, LossConfig, QuantizerParams
from vqrae_jax.errors import CheckpointError, ConfigError, DamagedError, WeightsError
from vqrae_jax.inference.location import locate
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import loop, restore
from vqrae_jax.train.run import Run, open_run, save_checkpoint
from vqrae_jax.train.task import TrainState, jit_step, place_horizon
from vqrae_jax.train.tokenizer import TokenizerTask

PATCH = {"discriminator": "patch", "width": 4, "layers": 1}


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def opened(tiny, one_device):
    """Returns a context: opened(workdir, section={...})."""
    return lambda workdir, **sections: open_run(tiny(**sections), workdir, one_device)


@pytest.fixture
def lookups(monkeypatch):
    """The values of train.start_from that were looked up, which asks the hub and reads the files."""
    paths = []
    monkeypatch.setattr(restore, "locate", lambda path: paths.append(path) or locate(path))
    return paths


def train_one_step(run, state):
    batch = sharding.place_batch({"image": next(run.batches)["image"]}, run.mesh)
    state, _ = jit_step(run.task, run.mesh)(state, run.frozen, batch, place_horizon(3, run.mesh))
    save_checkpoint(run, state, {})
    run.checkpoints.wait()
    return jax.device_get(state)


def test_checkpoints_have_the_names_of_the_classes(tiny):
    batches = mock.Mock(classes=("cat", "dog"), **{"get_state.return_value": {"images": 8}})
    task = mock.Mock(**{"score.return_value": None})
    run = mock.Mock(spec=Run, config=tiny(), task=task, batches=batches, checkpoints=mock.Mock())
    save_checkpoint(run, mock.Mock(spec=TrainState, step=1), {})
    (meta,) = [value for value in run.checkpoints.save.call_args.args if isinstance(value, dict) and "step" in value]
    assert meta["classes"] == ("cat", "dog")


def damage(item):
    """Flips one bit of an array, which neither Orbax nor TensorStore notices."""
    file = max(item.rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_checkpoint_before_a_damaged_one_is_used(copied, opened, caplog, assert_same):
    """The repeated step equals that of the undamaged run."""
    folder = copied / "checkpoints"
    with opened(copied) as (_, state):
        expected = jax.device_get(state)
    damage(folder / "3" / "train")
    with caplog.at_level(logging.WARNING), opened(copied) as (run, state):
        assert int(state.step) == 2
        (aside,) = folder.glob("3.damaged-*")
        assert f"{folder / '3'} cannot be read" in caplog.text
        assert "step 2" in caplog.text
        assert aside.name in caplog.text
        again = train_one_step(run, state)
    assert checkpoint.completed_steps(folder) == [2, 3]
    assert_same(again, expected)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_an_error_for_evaluation_and_inference(copied, tiny, one_device):
    """Metrics and codes belong to the step that was requested; no other checkpoint replaces it."""
    damage(copied / "checkpoints" / "3" / "model")
    for load in (lambda: loop.evaluate(tiny(), copied, one_device), lambda: Tokenizer.load(copied)):
        with pytest.raises(DamagedError, match="checkpoints/3") as error:
            load()
        assert len(str(error.value).splitlines()) == 1
    assert checkpoint.completed_steps(copied / "checkpoints") == [2, 3]
    assert loop.evaluate(tiny(), copied, one_device, step=2)["step"] == 2


@pytest.mark.slow
def test_the_last_step_or_a_tokenizer_is_evaluated(copied, tiny, one_device, tmp_path, lookups):
    newest = loop.evaluate(tiny(), copied, one_device)
    assert newest["step"] == 3
    with pytest.raises(CheckpointError, match=r"7.*\[2, 3\]"):
        loop.evaluate(tiny(), copied, one_device, step=7)
    with pytest.raises(CheckpointError, match="--step=2"):
        loop.evaluate(tiny(), copied / "checkpoints" / "2", one_device)
    # Any other tokenizer, as the folder of the same one; its report does not replace that of another model.
    path = Tokenizer.load(copied).save_pretrained(tmp_path / "folder")
    config = tiny(train={"start_from": str(path)})
    assert loop.evaluate(config, tmp_path, one_device, start=True) == newest
    assert lookups == [str(path)]
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert (written["step"], written["protocol"]["checkpoint"]) == (3, str(path))
    with pytest.raises(CheckpointError) as error:
        loop.evaluate(config, copied, one_device, start=True)
    assert error.value.field == "--workdir"


def test_no_run_starts_again_over_damaged_checkpoints(copied, opened):
    for step in ("2", "3"):
        damage(copied / "checkpoints" / step / "train")
    with pytest.raises(CheckpointError, match="--workdir"), opened(copied):
        pass
    assert checkpoint.completed_steps(copied / "checkpoints") == [2, 3]


@pytest.mark.parametrize(("changed", "message"), [
    ({"model": {"num_embeddings": 64}}, r"codebook \(32, .* of \(64, "),
    ({"model": {"quantizer": "fsq"}}, r"missing .*quantizer/"),
    ({"train": {"trainable": ("quantizer", "decoder")}}, r"unexpected .*encoder/"),
    ({"adversary": PATCH}, r"missing .*adversary/.*\n.*start_from="),
], ids=["size", "quantizer", "part", "term"])  # fmt: skip
def test_another_config_is_not_damage(copied, opened, changed, message):
    """The differing leaves are named, and every checkpoint keeps its name."""
    with pytest.raises(CheckpointError, match=message) as error, opened(copied, **changed):
        pass
    assert "damaged" not in str(error.value)
    assert checkpoint.completed_steps(copied / "checkpoints") == [2, 3]


@pytest.mark.slow
def test_clipping_can_be_switched(opened, tmp_path, assert_same):
    """As the message of the NaN guard recommends; both optimizers keep their moments."""
    unclipped = {"optimizer": {"clip_norm": 0.0}, "adversary": PATCH}
    clipped = {"optimizer": {"clip_norm": 1.0}, "adversary": {**PATCH, "optimizer": {"clip_norm": 1.0}}}
    with opened(tmp_path, **unclipped) as (run, state):
        expected = train_one_step(run, state)
    with opened(tmp_path, **clipped) as (run, state):
        assert_same(state, expected)
        assert jax.tree.map(np.shape, run.task.shapes()) == jax.tree.map(np.shape, expected)


@pytest.fixture(scope="module")
def initial(tiny, one_mesh):
    """Returns the state of step 0: initial(**fields of the train section)."""
    return lambda **train: jax.device_get(TokenizerTask.build(tiny(train=train), one_mesh).init())


@pytest.mark.slow
def test_a_run_starts_from_parts_of_another(trained, opened, initial, assert_same):
    """With renames, here of two norms that are exchanged."""
    with opened(trained) as (_, state):
        source = jax.device_get(state)
    everything = initial(start_from=str(trained))
    assert int(everything.step) == 0
    assert_same(everything.inference(), source.inference())
    renames = {f"decoder/blocks/norm{i}": f"decoder/blocks/norm{3 - i}" for i in (1, 2)}
    fresh, part = initial(), initial(start_from=str(trained), start_parts=("decoder",), start_renames=renames)
    decoder = source.ema_params["decoder"]
    blocks = {**decoder["blocks"], "norm1": decoder["blocks"]["norm2"], "norm2": decoder["blocks"]["norm1"]}
    assert_same(part.params, {**fresh.params, "decoder": {**decoder, "blocks": blocks}})
    assert_same(part.batch_stats, fresh.batch_stats)


@pytest.fixture(scope="module")
def folder(untrained, tmp_path_factory):
    """Returns a function that saves a tokenizer with latent statistics, with its frozen encoder or its hash."""
    statistics = tmp_path_factory.mktemp("statistics") / "stat.npz"
    np.savez(statistics, mean=np.linspace(-1, 1, 36, dtype=np.float32))
    tokenizer = untrained(normalization_stat_path=str(statistics))
    return lambda embed: tokenizer.save_pretrained(tmp_path_factory.mktemp("saved"), embed_encoder=embed)


@pytest.fixture(scope="module")
def started(tiny, one_mesh):
    """Returns the task of a run that starts from a tokenizer and has its model section."""

    def build(path, model=None, **train):
        config = tiny(train={"start_from": str(path), "trainable": ("quantizer", "decoder"), **train})
        config = config.model_copy(update={"model": locate(path).config.model_copy(update=model or {})})
        return TokenizerTask.build(config, one_mesh)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("embed", [True, False])
def test_a_run_starts_from_a_saved_folder(folder, started, embed, assert_same, lookups):
    """Every variable, with latent statistics that the config does not name; a frozen encoder is in one of two trees."""
    path = folder(embed)
    task, saved = started(path), Tokenizer.load(path)
    state, frozen = jax.device_get((task.init(), task.frozen()))
    assert lookups == [str(path)]
    assert set(state.params) == {"decoder"}
    assert ("encoder" in state.ema_params, "encoder" in frozen) == (embed, not embed)
    variables = state.inference()
    variables["params"] = {**variables["params"], **frozen}
    expected = {**saved.trained, "params": {**saved.trained["params"]}}
    if not embed:  # its position grid is resampled to the input size
        expected["params"]["encoder"] = saved.variables["params"]["encoder"]
    assert_same(variables, expected)


@pytest.mark.slow
def test_the_teacher_is_the_encoder_of_the_folder(folder, started, assert_same):
    """Not a random one: the config of a folder with its encoder names no other weights."""
    path = folder(True)
    task = started(path, {"decoder_features": (0,)}, start_parts=("encoder",), trainable=("quantizer", "decoder"))
    task = dataclasses.replace(task, config=task.config.model_copy(update={"loss": LossConfig(feature_weight=1.0)}))
    assert_same(task.frozen()["teacher"], Tokenizer.load(path).trained["params"]["encoder"])


def test_a_config_that_changes_the_codes_of_the_start_is_an_error(folder, started, tmp_path):
    path = folder(False)
    for model, name in (
        ({"num_embeddings": 48}, "model.num_embeddings=48 instead of 24"),
        ({"encoder_params": EncoderParams(normalize=False)}, "model.encoder_params.normalize=False instead of True"),
        ({"quantize_before_reshape": True}, "model.quantize_before_reshape"),
        ({"encoder_config_path": None}, "model.encoder_config_path=None instead of"),
    ):
        with pytest.raises(ConfigError, match=name) as error:
            started(path, model)
        assert error.value.field == "train.start_from"
    started(path, {"quantizer_params": QuantizerParams(depth=2)})  # which this quantizer does not read
    with pytest.raises(CheckpointError, match=r"model\.decoder_patch_size=16 instead of 8"):
        started(path, {"decoder_patch_size": 16})
    encoder = shutil.copytree(locate(path).config.encoder_config_path, tmp_path / "encoder")
    tensors = load_file(encoder / "model.safetensors")
    save_file({name: 2 * value for name, value in tensors.items()}, encoder / "model.safetensors")
    with pytest.raises(WeightsError, match="content hash"):
        started(path, {"encoder_config_path": str(encoder)})
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="damaged") as error:
        started(path)
    assert error.value.field == "train.start_from"


def test_a_start_that_does_not_fit_is_an_error(trained, initial, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        initial(start_from=str(trained / "nowhere"))
    damage(shutil.copytree(trained / "checkpoints" / "3", tmp_path / "3") / "model")
    with pytest.raises(DamagedError):
        initial(start_from=str(tmp_path / "3"))
    with pytest.raises(CheckpointError, match=r"missing \(2\): .*pred"):
        initial(start_from=str(trained), start_renames={"decoder/pred": "decoder/out"})
    with pytest.raises(ConfigError) as error:
        initial(start_from=str(trained), start_parts=("decoder",), start_renames={"decoder": "renderer"})
    assert (error.value.field, error.value.value) == ("train.start_parts", ("decoder",))
    assert "encoder, quantizer, renderer" in error.value.message
