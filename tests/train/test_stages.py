"""Training in stages: a run that starts from another's model, and what of it then stays as it was."""

import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.errors import CheckpointError
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import loop
from vqrae_jax.train.tokenizer import TokenizerTask

SHORT = {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
MODEL = {"quantizer_params": {"codebook_dim": 8}}
PATCH = {"discriminator": "patch", "width": 4, "layers": 1, "lecam_weight": 0.1}


def assert_same(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """Stage 1: the encoder is frozen."""
    workdir = tmp_path_factory.mktemp("first")
    config = tiny(model=MODEL, train={**SHORT, "trainable": ("quantizer", "decoder")}, adversary=PATCH)
    loop.train(config, workdir, jax.devices()[:1])
    path = checkpoint.find_checkpoint(workdir)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), checkpoint.saved_shapes(path)
    )
    return workdir, jax.device_get(checkpoint.read_model(path, target))


def test_the_second_stage_starts_from_the_first(tiny, first, one_mesh):
    """EMA parameters and codebook of stage 1, the pretrained encoder, and a frozen copy of it to distil from."""
    workdir, model = first
    config = tiny(model=MODEL, train={"start_from": str(workdir)}, loss={"distill_weight": 1.0})
    task = TokenizerTask.build(config, one_mesh)
    state, frozen = task.init(), task.frozen()
    assert set(state.params) == {"encoder", "quantizer", "decoder"}
    for part in ("quantizer", "decoder"):
        assert_same(state.params[part], model["params"][part])
        assert_same(state.ema_params[part], model["params"][part])
    assert_same(state.batch_stats, model["batch_stats"])
    assert_same(frozen["teacher"], state.params["encoder"])
    assert int(state.step) == 0
    assert state.adversary == {}


@pytest.mark.slow
def test_a_decoder_trains_on_frozen_codes(tiny, first, tmp_path, one_device):
    """After 100 steps encoder, codes and their projections are those of the first run to the bit."""
    workdir, model = first
    long = {"steps": 100, "evaluate_every": 100, "checkpoint_every": 100}
    config = tiny(model=MODEL, train={**long, "trainable": ("decoder",), "start_from": str(workdir)})
    loop.train(config, tmp_path, one_device)
    run = loop.Run(config, tmp_path, one_device)  # resumes
    state = jax.device_get(run.state)
    run.close()
    assert int(state.step) == 100
    assert set(state.params) == {"decoder"}
    assert_same(state.ema_params["quantizer"], model["params"]["quantizer"])
    assert_same(state.batch_stats["quantizer"], model["batch_stats"]["quantizer"])
    moved = state.params["decoder"]["embed"]["kernel"] - model["params"]["decoder"]["embed"]["kernel"]
    assert np.abs(moved).max() > 0
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    before, after = Tokenizer.load(workdir), Tokenizer.load(tmp_path)
    np.testing.assert_array_equal(before.encode_to_indices(images), after.encode_to_indices(images))


@pytest.mark.slow
def test_frozen_codes_that_scales_share_do_not_move_within_a_step(tiny, tmp_path, one_mesh, one_device):
    """A decoder in training sees the codes that it will be given."""
    model = {"quantizer": "multiscale", "quantizer_params": {"grids": (1, 2, 4)}}
    loop.train(tiny(model=model, train=SHORT), tmp_path, one_device)
    config = tiny(model=model, train={"trainable": ("decoder",), "start_from": str(tmp_path)})
    task = TokenizerTask.build(config, one_mesh)
    state, frozen = task.init(), task.frozen()
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    _, seen = jax.jit(task.step)(state, frozen, {"image": images})
    batch = {"image": images, "mask": np.ones(8, bool)}
    given = jax.jit(task.evaluate_batch)(state.inference(), frozen, batch)
    np.testing.assert_array_equal(seen["counts"], given["counts"])


def test_the_discriminator_is_resumed_on_another_mesh(tiny, first):
    """Its parameters, moments, power iteration and running means; inference knows nothing of it."""
    workdir, model = first
    assert set(model["params"]) == {"quantizer", "decoder"}
    mesh = {"data": 4, "model": 2, "fsdp": True, "fsdp_min_size": 1}
    config = tiny(model=MODEL, adversary=PATCH, mesh=mesh, train={**SHORT, "trainable": ("quantizer", "decoder")})
    run = loop.Run(config, workdir)
    adversary = jax.device_get(run.state.adversary)
    run.close()
    assert set(adversary) == {"params", "opt_state", "spectral", "lecam"}
    assert adversary["lecam"]["real"] != 0
    assert int(jax.tree.leaves(adversary["opt_state"])[0]) == 2


def test_a_start_that_is_not_there(tiny, tmp_path, one_mesh):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        TokenizerTask.build(tiny(train={"start_from": str(tmp_path / "nowhere")}), one_mesh)


def test_the_first_stage_may_be_gone(tiny, first, tmp_path, one_device):
    """What the second was given and does not train is in its own checkpoints."""
    shutil.copytree(first[0], tmp_path / "first")
    train = {**SHORT, "trainable": ("decoder",), "start_from": str(tmp_path / "first")}
    loop.train(tiny(model=MODEL, train=train), tmp_path / "second", one_device)
    shutil.rmtree(tmp_path / "first")
    longer = tiny(model=MODEL, train={**train, "steps": 3})
    run = loop.Run(longer, tmp_path / "second", one_device)
    assert int(run.state.step) == 2
    assert set(run.state.params) == {"decoder"}
    assert_same(run.state.ema_params["quantizer"], first[1]["params"]["quantizer"])
    run.close()
    figures = loop.evaluate(longer, tmp_path / "second", one_device)
    assert figures["step"] == 2
    assert figures == pytest.approx(loop.evaluate(longer, tmp_path / "second", one_device, step=2))


def test_a_start_of_another_model(tiny, first, one_mesh):
    config = tiny(model={**MODEL, "num_embeddings": 64}, train={"start_from": str(first[0])})
    with pytest.raises(CheckpointError, match="of another architecture"):
        TokenizerTask.build(config, one_mesh)
