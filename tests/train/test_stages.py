"""Training in stages: runs that start from the model of another run."""

import shutil

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint
from vqrae_jax.inference.tokenizer import Tokenizer
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run
from vqrae_jax.train.tokenizer import TokenizerTask

SHORT = {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
MODEL = {"quantizer_params": {"codebook_dim": 8}}
PATCH = {"discriminator": "patch", "width": 4, "layers": 1, "lecam_weight": 0.1}


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """Stage 1: the encoder is frozen."""
    workdir = tmp_path_factory.mktemp("first")
    config = tiny(model=MODEL, train={**SHORT, "trainable": ("quantizer", "decoder")}, adversary=PATCH)
    loop.train(config, workdir, jax.devices()[:1])
    path = checkpoint.find_checkpoint(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = checkpoint.saved_shapes(path)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return workdir, jax.device_get(checkpoint.read_model(path, target))


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first(tiny, first, one_mesh, assert_same):
    """EMA parameters and codebook of stage 1, the pretrained encoder, and a frozen copy of it to distil from."""
    workdir, model = first
    train, loss = {"start_from": str(workdir)}, {"distill_weight": 1.0}
    task = TokenizerTask.build(tiny(model=MODEL, train=train, loss=loss), one_mesh)
    state, frozen = task.init(), task.frozen()
    assert set(state.params) == {"encoder", "quantizer", "decoder"}
    for params in (state.params, state.ema_params):
        assert_same({part: params[part] for part in ("quantizer", "decoder")}, model["params"])
    assert_same(state.batch_stats, model["batch_stats"])
    assert_same(frozen["teacher"], state.params["encoder"])
    assert (int(state.step), state.adversary) == (0, {})


@pytest.mark.slow
def test_a_random_encoder_has_the_same_teacher_after_a_restart(tiny, trained, tmp_path, one_device, assert_same):
    """The run starts from another decoder alone; its checkpoints have the encoder that trains."""
    train = {**dict.fromkeys(SHORT, 1), "start_from": str(trained), "start_parts": ("decoder",)}
    config = tiny(train=train, loss={"distill_weight": 1.0})
    with open_run(config, tmp_path, one_device) as (run, _):
        expected = jax.device_get(run.frozen["teacher"])
    loop.train(config, tmp_path, one_device)
    with open_run(config, tmp_path, one_device) as (run, state):
        assert state.step == 1
        assert_same(run.frozen["teacher"], expected)


@pytest.mark.slow
def test_a_decoder_trains_on_frozen_codes(tiny, first, tmp_path, one_device, assert_same):
    """After 100 steps encoder, codes and their projections are those of the first run to the bit."""
    workdir, model = first
    train = {**dict.fromkeys(SHORT, 100), "trainable": ("decoder",), "start_from": str(workdir)}
    config = tiny(model=MODEL, train=train)
    loop.train(config, tmp_path, one_device)
    with open_run(config, tmp_path, one_device) as (_, state):
        state = jax.device_get(state)
    assert (int(state.step), set(state.params)) == (100, {"decoder"})
    assert_same(state.ema_params["quantizer"], model["params"]["quantizer"])
    assert_same(state.batch_stats["quantizer"], model["batch_stats"]["quantizer"])
    change = state.params["decoder"]["embed"]["kernel"] - model["params"]["decoder"]["embed"]["kernel"]
    assert np.abs(change).max() > 0
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    before, after = Tokenizer.load(workdir), Tokenizer.load(tmp_path)
    np.testing.assert_array_equal(before.encode_to_indices(images), after.encode_to_indices(images))


@pytest.mark.slow
def test_frozen_codes_that_scales_share_do_not_move_within_a_step(tiny, tmp_path, one_mesh, one_device):
    """A decoder trains on the codes that it will decode."""
    model = {"quantizer": "multiscale", "quantizer_params": {"grids": (1, 2, 4)}}
    loop.train(tiny(model=model, train=SHORT), tmp_path, one_device)
    train = {"trainable": ("decoder",), "start_from": str(tmp_path)}
    task = TokenizerTask.build(tiny(model=model, train=train), one_mesh)
    state, frozen = task.init(), task.frozen()
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    _, trained = jax.jit(task.step)(state, frozen, {"image": images}, 6)
    evaluated = jax.jit(task.evaluate)(state.inference(), frozen, {"image": images, "mask": np.ones(8, bool)})
    np.testing.assert_array_equal(trained["counts"], evaluated["counts"])


@pytest.mark.slow
def test_the_discriminator_is_resumed_on_another_mesh(tiny, first):
    """Its parameters, moments, power iteration and moving averages; they are not part of the model."""
    workdir, model = first
    assert set(model["params"]) == {"quantizer", "decoder"}
    mesh = {"data": 4, "model": 2, "fsdp": True, "fsdp_min_size": 1}
    config = tiny(model=MODEL, adversary=PATCH, mesh=mesh, train={**SHORT, "trainable": ("quantizer", "decoder")})
    with open_run(config, workdir) as (_, state):
        adversary = jax.device_get(state.adversary)
    assert set(adversary) == {"params", "opt_state", "spectral", "lecam"}
    assert adversary["lecam"]["real"] != 0
    assert int(jax.tree.leaves(adversary["opt_state"])[0]) == 2


@pytest.mark.slow
def test_the_first_stage_may_be_deleted(tiny, first, tmp_path, one_device, assert_same):
    """The checkpoints of the second stage include what it started from and does not train."""
    shutil.copytree(first[0], tmp_path / "first")
    train = {**SHORT, "trainable": ("decoder",), "start_from": str(tmp_path / "first")}
    loop.train(tiny(model=MODEL, train=train), tmp_path / "second", one_device)
    shutil.rmtree(tmp_path / "first")
    longer = tiny(model=MODEL, train={**train, "steps": 3})
    with open_run(longer, tmp_path / "second", one_device) as (_, state):
        assert (int(state.step), set(state.params)) == (2, {"decoder"})
        assert_same(state.ema_params["quantizer"], first[1]["params"]["quantizer"])
    assert loop.evaluate(longer, tmp_path / "second", one_device, step=2)["step"] == 2


@pytest.mark.slow
def test_a_learned_fusion_trains_resumes_and_is_saved(tiny, tmp_path, one_device, assert_same):
    """The encoder is frozen, and the fusion of its layers is learned with the codebook."""
    architecture = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    fused = {"encoder_params": {"layers": (0, 1), "fusion": "linear", "architecture": architecture}}

    def states(workdir, *lengths):
        for steps in lengths:
            train = {"steps": steps, "evaluate_every": 4, "checkpoint_every": 2, "trainable": ("quantizer", "decoder")}
            config = tiny(model=fused, train=train, optimizer={"decay_end_steps": 4})
            loop.train(config, tmp_path / workdir, one_device)
            with open_run(config, tmp_path / workdir, one_device) as (_, state):
                yield jax.device_get(state)

    start, resumed = states("resumed", 2, 4)
    (straight,) = states("straight", 4)
    assert_same(resumed, straight)
    kernels = [state.params["quantizer"]["fusion"]["linear"]["kernel"] for state in (start, resumed)]
    assert np.abs(kernels[1] - kernels[0]).max() > 0
    before, after = (Tokenizer.load(tmp_path / "resumed", step=step) for step in (2, 4))
    assert before.hash != after.hash
    saved = Tokenizer.load(after.save_pretrained(tmp_path / "saved"))
    assert saved.hash == after.hash
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(saved.reconstruct(images), after.reconstruct(images))
