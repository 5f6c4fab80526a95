import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.config import ModelConfig
from vqrae_jax.errors import ConfigError
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run
from vqrae_jax.train.task import jit_step, place_horizon
from vqrae_jax.train.tokenizer import TokenizerTask, masked_counts

STEPS = 3


def batches(size=8):
    low = np.random.default_rng(0).uniform(size=(STEPS, size, 4, 4, 3)).repeat(8, 2).repeat(8, 3)
    return [{"image": (x * 255).astype(np.uint8)} for x in low]


def train(config, mesh):
    task = TokenizerTask.build(config, mesh)
    state, frozen = task.init(), task.frozen()
    step, losses, grads = jit_step(task, mesh), [], None
    for batch in batches():
        state, metrics = step(state, frozen, sharding.place_batch(batch, mesh), place_horizon(STEPS, mesh))
        losses.append(metrics["loss/total"])
        if grads is None:
            grads = jax.device_get(state.opt_state[0].mu)  # those of the first step, all scaled alike
    return jax.device_get((grads, state.batch_stats, losses)), state


# One layer, a learned fusion of two, and another one in front of tokens whose prefixes decode.
LAYERS = {
    "layers": (0, 1),
    "architecture": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
}
MODELS = {"ema": {}, "fused": {"encoder_params": {**LAYERS, "fusion": "linear"}}, "nested": {
    "encoder_params": {**LAYERS, "fusion": "routed"}, "resampler_tokens": 8, "resampler_blocks": 1,
    "resampler_nested": True,
}}  # fmt: skip
NOISE = {"code_noise": 0.3, "code_neighbors": 3}


@pytest.fixture(scope="module")
def single(tiny):
    """A function of a name in MODELS that returns what one device computes."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    return functools.cache(lambda name: train(tiny(model=MODELS[name], train=NOISE), one)[0])


@pytest.mark.slow
def test_fsdp_splits_weights_and_never_activations(tiny):
    """Each of eight devices computes its own image of a batch of eight; only weights and sums cross devices."""
    mesh = sharding.make_mesh(8, 1)
    fsdp = {"data": 8, "fsdp": True, "fsdp_min_size": 1}
    # With scanned and recomputed blocks the partitioner chooses other shardings if nothing pins the tokens.
    task = TokenizerTask.build(tiny(mesh=fsdp, model={"remat": True}), mesh)
    image = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8, sharding=sharding.over_data(mesh))
    state = task.shapes()
    horizon = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh))
    program = jit_step(task, mesh).lower(state, {}, {"image": image}, horizon).compile().as_text()
    assert "all-to-all" not in program
    assert "f32[1,17,40]" in program  # decoder tokens of one image, cls first
    assert "f32[8,17," not in program  # of all of them
    assert "f32[8,4,4,16]" not in program  # latents
    assert "all-gather" in program


MESHES = [
    {"data": 4, "model": 2}, {"data": 8, "model": 1}, {"data": 4, "model": 2, "fsdp": True, "fsdp_min_size": 1},
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "model"), [
    *(pytest.param(mesh, "ema", marks=pytest.mark.slow) for mesh in MESHES),
    *(pytest.param(MESHES[-1], model, marks=pytest.mark.slow) for model in ("fused", "nested")),
    ({"slices": 2, "data": 2, "model": 2, "fsdp": True, "fsdp_min_size": 1}, "ema"),
])  # fmt: skip
def test_eight_devices_equal_one(tiny, single, mesh, model, assert_close):
    devices = sharding.make_mesh(mesh["data"], mesh["model"], slices=mesh.get("slices", 1))
    (grads, stats, losses), state = train(tiny(mesh=mesh, model=MODELS[model], train=NOISE), devices)
    single = single(model)
    np.testing.assert_allclose(losses, single[2], rtol=1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(stats), jax.tree.leaves(single[1]), strict=True):
        assert_close(ours, theirs, 1e-5, jax.tree_util.keystr(path))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(single[0]))
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(single[0]), strict=True)
    for (path, ours), theirs in leaves:
        # Gradients that are zero in exact arithmetic (key biases) have no scale of their own.
        scale = max(np.abs(theirs).max(), 1e-3 * largest)
        assert np.abs(ours - theirs).max() <= 1e-5 * scale, jax.tree_util.keystr(path)
    if mesh["model"] > 1:
        kernel = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert "model" in str(kernel.sharding.spec)
        assert state.opt_state[0].mu["decoder"]["blocks"]["mlp"]["up"]["kernel"].sharding == kernel.sharding


def test_frozen_parts_are_not_part_of_the_state(tiny, one_mesh):
    task = TokenizerTask.build(tiny(train={"trainable": ("quantizer", "decoder")}), one_mesh, weights=False)
    assert set(task.shapes().params) == {"decoder"}
    assert set(task.frozen_shapes()) == {"encoder"}


def test_a_learned_fusion_trains_as_a_part_of_the_quantizer(tiny, one_mesh):
    config = tiny(model=MODELS["fused"], train={"trainable": ("quantizer", "decoder")})
    task = TokenizerTask.build(config, one_mesh, weights=False)
    assert set(task.frozen_shapes()) == {"encoder"}
    assert task.shapes().params["quantizer"]["fusion"]["linear"]["kernel"].shape == (32, 16)
    with pytest.raises(ConfigError) as error:
        TokenizerTask.build(tiny(model=MODELS["fused"], train={"trainable": ("decoder",)}), one_mesh)
    assert error.value.field == "train.trainable"


@pytest.mark.parametrize(
    "quantizer", ["gumbel", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ema", "multiscale"))]
)
def test_the_state_of_a_quantizer_that_does_not_train_passes_unchanged(tiny, quantizer, one_mesh):
    """Means, annealed temperatures and whitening are inputs of the step that it returns as they are."""
    model = {"quantizer": quantizer, "quantizer_params": {"whitening_dim": 8, "grids": (2, 4)}}
    train = {"trainable": ("decoder",), "code_noise": 0.5, "code_neighbors": 2}
    task = TokenizerTask.build(tiny(model=model, train=train), one_mesh, weights=False)
    state, image = task.shapes(), jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)
    step = jax.make_jaxpr(task.step)(state, task.frozen_shapes(), {"image": image}, 6).jaxpr
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    unchanged = {
        jax.tree_util.keystr(path) for path, x, y in zip(leaves, step.invars, step.outvars, strict=False) if x is y
    }
    stats = jax.tree_util.tree_leaves_with_path({"batch_stats": state.batch_stats})
    assert unchanged == {jax.tree_util.keystr(path).replace("['batch_stats']", ".batch_stats", 1) for path, _ in stats}


@pytest.mark.slow
def test_code_noise_is_for_training_and_changes_the_input_of_the_decoder(tiny, one_mesh):
    """The loss of the quantizer and its counts are those of the true codes."""
    metrics, evaluations, image = [], [], batches()[0]["image"]
    for noise in (0.0, 1.0):
        task = TokenizerTask.build(tiny(train={"code_noise": noise, "code_neighbors": 3 if noise else 0}), one_mesh)
        state = task.init()
        *_, values = jax.jit(task.gradients)(state, {}, image / 255, jax.random.key(1), state.batch_stats)
        metrics.append(values)
        batch = {"image": image, "mask": np.ones(len(image), bool)}
        evaluations.append(str(jax.make_jaxpr(task.evaluate)(state.inference(), {}, batch)))
    plain, noisy = metrics
    assert evaluations[0] == evaluations[1]
    assert noisy["loss/pixel"] != plain["loss/pixel"]
    for name in ("loss/vq", "counts"):
        np.testing.assert_array_equal(noisy[name], plain[name])


STATEFUL = {
    "ema": {}, "ema_whitened": {"whitening_dim": 4}, "residual": {"depth": 2}, "product": {},
    "multiscale": {"grids": (1, 4)}, "simvq": {}, "gumbel": {"anneal_steps": 4}, "ema_fused": {}, "ema_nested": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_accumulation_equals_one_large_batch(tiny, one_mesh, assert_close, name):
    """State is made from the whole batch and updated by it once; every part quantizes with the same codebook."""
    model = {"quantizer": name.partition("_")[0], "quantizer_params": STATEFUL[name], "num_embeddings": 8}
    model |= MODELS.get(name.partition("_")[2], {})
    steps, key = {}, jax.random.key(3)
    for parts in (1, 4):
        task = TokenizerTask.build(tiny(model=model, optimizer={"accumulate": parts}), one_mesh)

        @jax.jit
        def step(state, image, task=task):
            grads, stats, _, metrics = task.mean_gradients(state, {}, task.micro_batches(image / 255), key)
            metrics = {n: metrics[n] for n in ("counts", "codebook/starved", "codebook/revived") if n in metrics}
            # Compiling the gradients takes most of the time.
            return stats, metrics, grads if name == "ema" else None

        steps[parts] = step
    first = state = task.init()
    for image in (x["image"] for x in batches()[:2]):
        (whole, *exact), (split, *sums) = (step(state, image) for step in steps.values())
        for (path, a), b in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(split), strict=True):
            assert_close(b + 1, a + 1, 1e-4, jax.tree_util.keystr(path))
        # gumbel samples its indices; scales of multiscale see updates of the coarser ones, so by their part only.
        if name in ("gumbel", "multiscale"):
            exact, sums = ([values[0]["counts"].sum()] for values in (exact, sums))
        for a, b in zip(*map(jax.tree.leaves, (exact, sums)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)
        state = state.replace(batch_stats=whole)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, first.batch_stats)
    assert max(jax.tree.leaves(moved)) > 0.1  # otherwise the comparison is empty


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, one_device, assert_same):
    """With lengths of prefixes that are random in every step, and moments of a router and of queries."""
    results = []
    for folder, stops in (("uninterrupted", (3,)), ("resumed", (2, 3))):
        for steps in stops:
            config = tiny(model=MODELS["nested"], train={"steps": steps}, optimizer={"decay_end_steps": 3})
            metrics = loop.train(config, tmp_path / folder, one_device)
        with open_run(config, tmp_path / folder, one_device) as (_, state):
            results.append((metrics, jax.device_get(state)))
    assert int(results[0][1].step) == 3
    assert_same(*results)


QUANTIZERS = get_args(ModelConfig.model_fields["quantizer"].annotation)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_fits_the_task(tiny, quantizer, one_mesh):
    """Step, evaluation and images for the log, in shapes only; the quantizers' arithmetic has its own tests."""
    params = {"grids": (1, 2, 4)} if quantizer == "multiscale" else {}
    model = {"quantizer": quantizer, "quantizer_params": params}
    task = TokenizerTask.build(tiny(model=model, optimizer={"accumulate": 2}), one_mesh)
    state = task.shapes()
    image = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)
    after, metrics = jax.eval_shape(task.step, state, {}, {"image": image}, jnp.asarray(6))
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert all(value.shape == () for name, value in metrics.items() if name != "counts")
    mask = jax.ShapeDtypeStruct((8,), bool)
    sums = jax.eval_shape(task.evaluate, state.inference(), {}, {"image": image, "mask": mask})
    assert ("counts" in sums) == (quantizer != "none")
    if quantizer != "none":
        assert sums["counts"].shape == metrics["counts"].shape
    assert sharding.unmatched(state.inference(), min_size=1024) == []
    jax.eval_shape(task._jit_samples, state.inference(), {}, image)


@pytest.mark.slow
def test_padding_does_not_count(tiny, one_mesh):
    task = TokenizerTask.build(tiny(), one_mesh)
    state, frozen = task.init(), task.frozen()
    images, mask, evaluate = batches()[0]["image"], np.arange(8) < 5, jax.jit(task.evaluate)
    padded = images * mask[:, None, None, None]
    a, b = (evaluate(state.inference(), frozen, {"image": x, "mask": mask})["counts"] for x in (images, padded))
    assert a.sum() == 5 * 16
    np.testing.assert_array_equal(a, b)


def test_counts_of_several_levels():
    indices = jnp.array([[[0, 1], [2, 2]], [[1, 1], [1, 0]]])  # [B=2, N=2, depth=2]
    counts = masked_counts(indices, (2, 3), jnp.array([True, False]))
    np.testing.assert_array_equal(counts, [[1, 0, 1], [0, 1, 1]])
    np.testing.assert_array_equal(masked_counts(indices[..., 0], (3,), jnp.array([True, True])), [1, 2, 1])


def test_the_decoder_must_fit_the_image_size(tiny, one_mesh):
    with pytest.raises(ConfigError) as error:
        TokenizerTask.build(tiny(data={"image_size": 64}), one_mesh)
    assert (error.value.field, error.value.value) == ("data.image_size", 64)
    assert "model.decoder_patch_size=16" in error.value.message


@pytest.mark.parametrize("trainable", [("quantizer",), ("decoder",)], ids=["nothing_trains", "random_quantizer"])
def test_trainable_parts_are_checked(tiny, one_mesh, trainable):
    with pytest.raises(ConfigError) as error:
        TokenizerTask.build(tiny(train={"trainable": trainable}), one_mesh)
    assert (error.value.field, error.value.value) == ("train.trainable", trainable)


def test_a_setting_that_the_quantizer_ignores_is_a_warning(tiny, one_mesh, caplog):
    TokenizerTask.build(tiny(model={"quantizer_params": {"depth": 8, "frozen": True}}), one_mesh, weights=False)
    (message,) = caplog.messages
    assert message.startswith("model.quantizer_params.depth=8")
