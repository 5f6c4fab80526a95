"""Laws of the adversarial recipe: what each term trains, one backward pass, starts, frozen networks, meshes."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.build import judges
from vqrae_jax.config import AdversaryConfig
from vqrae_jax.errors import ConfigError, WeightsError
from vqrae_jax.losses.adversarial import adaptive_weight
from vqrae_jax.train.objective import Objective
from vqrae_jax.train.task import place_horizon
from vqrae_jax.train.tokenizer import TokenizerTask

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
PATCH = {"discriminator": "patch", "width": 4, "layers": 1, "lecam_weight": 0.1, "cutout": 0.2}
PATCH["consistency_weight"] = 2.0
PERCEPTUAL = {"network": "encoder", "weight": 1.0, "architecture": ENCODER, "input_size": 32, "start_steps": 2}
PERCEPTUAL["gram_weight"] = 0.5
MODEL = {"quantizer_params": {"codebook_dim": 8}, "decoder_features": (0,), "decoder_feature_blocks": 1}
LOSS = {"perceptual": PERCEPTUAL, "feature_weight": 0.5, "distill_weight": 2.0}
LATE = {"start_steps": 1, "generator_start_steps": 2, "disc_updates": 2}
RECIPE = {"model": MODEL, "adversary": {**PATCH, **LATE}, "loss": LOSS}
NOTHING = {"pixel_weight": 0.0, "vq_weight": 0.0}


def images():
    low = np.random.default_rng(0).uniform(size=(3, 8, 4, 4, 3)).repeat(8, 2).repeat(8, 3)
    return (low * 255).astype(np.uint8)


def run(task):
    """Yields state, metrics and frozen networks after each step, without end; the step is compiled once."""
    state, frozen = task.init(), task.frozen()
    placements = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(task.mesh))
    step, horizon = jax.jit(task.step, out_shardings=placements), place_horizon(task.config.train.steps, task.mesh)
    for batch in itertools.cycle(images()):
        state, metrics = step(state, frozen, sharding.place_batch({"image": batch}, task.mesh), horizon)
        yield state, jax.device_get(metrics), frozen


def take(steps, running):
    """Returns the last state of some steps, the metrics of all, and the frozen networks."""
    states, metrics, frozen = zip(*itertools.islice(running, steps), strict=True)
    return states[-1], list(metrics), frozen[-1]


@pytest.fixture(scope="module")
def whole(tiny, one_mesh):
    """Three steps, the last of them with every term."""
    task = TokenizerTask.build(tiny(**RECIPE), one_mesh)
    before, running = jax.device_get(task.frozen()), run(task)
    first, first_metrics, _ = next(running)
    state, metrics, frozen = take(2, running)
    return task, (before, first, running), state, [first_metrics, *metrics], frozen


def nonzero(tree):
    return {n for n, part in tree.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(part))}


ALL = {"encoder", "quantizer", "decoder"}
TERMS = {  # term -> its config, and the parts and heads of the decoder that it has gradients for
    "pixel": ({"pixel_weight": 1.0}, {}, ALL, {"pred"}),
    "vq": ({"vq_weight": 1.0}, {}, {"encoder", "quantizer"}, set()),
    "perceptual": ({"perceptual": {**PERCEPTUAL, "start_steps": 0}}, {}, ALL, {"pred"}),
    "features": ({"feature_weight": 1.0}, {}, ALL, {"features"}),
    "distill": ({"distill_weight": 1.0}, {}, {"encoder"}, set()),
    "adversarial": ({}, {**PATCH, "adaptive": False}, ALL, {"pred"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_trains_its_parts(tiny, one_mesh, term):
    loss, adversary, parts, heads = TERMS[term]
    task = TokenizerTask.build(tiny(model=MODEL, loss={**NOTHING, **loss}, adversary=adversary), one_mesh)
    state, frozen = task.init(), task.frozen()
    if term == "distill":  # student and teacher are the same at the start
        state.params["encoder"] = jax.tree.map(lambda x: 1.1 * x, state.params["encoder"])
    grads, *_ = jax.jit(task.gradients)(state, frozen, images()[0] / 255, jax.random.key(1), state.batch_stats)
    assert nonzero(grads) == parts
    assert nonzero(grads["decoder"]) & {"pred", "features"} == heads
    assert set(frozen) <= {"teacher", "perceptual", "discriminator"}


@pytest.mark.slow
def test_a_frozen_encoder_runs_once_for_its_latents_and_the_features(tiny, one_mesh, monkeypatch, assert_close):
    """The loss and its gradients are those of a second pass."""
    encoder = {"layers": (0,), "architecture": {**ENCODER, "num_hidden_layers": 2}}
    model = {**MODEL, "encoder_params": encoder, "decoder_features": (1, 0)}
    train = {"trainable": ("quantizer", "decoder")}
    task = TokenizerTask.build(tiny(model=model, loss={"feature_weight": 1.0}, train=train), one_mesh)
    assert task.objective.targets(task.frozen()) == (1, 0)
    assert task.objective.targets({"teacher": task.frozen()["encoder"]}) == ()  # the encoder started from another run
    state, results = task.init(), []
    for targets in ((1, 0), ()):
        monkeypatch.setattr(Objective, "targets", lambda *_, targets=targets: targets)
        gradients = jax.jit(lambda *args: task.gradients(*args, state.batch_stats))  # not that of the other targets
        results.append(gradients(state, task.frozen(), images()[0] / 255, jax.random.key(1)))
    (grads, *_, metrics), (expected, *_, others) = results
    assert metrics["loss/features"] > 0.1
    assert_close(metrics["loss/features"], others["loss/features"], 1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected)


@pytest.mark.slow
def test_the_discriminator_trains_only_itself(whole):
    """Its loss has no gradient for the reconstructions, and its parameters are not the tokenizer's."""
    task, _, state, _, frozen = whole
    fake, real = jax.random.uniform(jax.random.key(0), (2, 4, 32, 32, 3))

    @jax.jit
    def loss(params, images):
        key = jax.random.key(1)
        return task.adversary.loss(params, state.adversary, frozen["discriminator"], images, real, key)[0]

    own, of_images = jax.grad(loss, (0, 1))(state.adversary["params"], fake)
    assert nonzero(own) == set(state.adversary["params"])
    assert not np.any(of_images)
    assert not set(state.adversary["params"]) & set(state.params)


@pytest.mark.slow
def test_consistency_is_of_images_under_two_augmentations(whole, monkeypatch):
    """It is 0 without augmentations, and the other terms, and the power iterations, are those of one of the two."""
    task, _, state, _, frozen = whole
    real, fake = jax.random.uniform(jax.random.key(0), (2, 4, 32, 32, 3))

    def terms(weight):
        config = task.config.adversary.model_copy(update={"consistency_weight": weight})
        adversary = dataclasses.replace(task.adversary, config=config)
        arguments = state.adversary["params"], state.adversary, frozen["discriminator"], fake, real
        return jax.jit(adversary.loss)(*arguments, jax.random.key(1))

    (without, (spectral, metrics)), (total, (same, others)) = terms(0.0), terms(2.0)
    difference = others.pop("gan/consistency")
    assert difference > 1e-4
    np.testing.assert_allclose(total, without + 2 * difference, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, (spectral, metrics), (same, others))
    monkeypatch.setattr("vqrae_jax.train.adversary.augment", lambda images, *_: images)
    assert terms(2.0)[1][1]["gan/consistency"] == 0


@pytest.mark.slow
def test_the_discriminator_compares_8_bit_images(whole):
    """A change below half a level, or beyond black and white, is not visible to it; the generator's loss is smooth."""
    task, _, state, _, frozen = whole
    real = jnp.asarray(images()[0] / np.float32(255))
    noise = np.random.default_rng(0).uniform(-0.45, 0.45, real.shape).astype(np.float32) / 255
    noise = noise + jnp.where(real == 1, 0.1, jnp.where(real == 0, -0.1, 0))
    adversary, trunk, key = task.adversary, frozen["discriminator"], jax.random.key(1)

    @jax.jit
    def losses(fake):
        own = adversary.loss(state.adversary["params"], state.adversary, trunk, fake, real, key)[1][1]
        return own, adversary.generator_loss(state.adversary, trunk, fake, key)

    (equal, smooth), (own, other) = losses(real + noise), losses(real)
    assert equal == own
    assert smooth != other


@pytest.mark.slow
def test_one_backward_pass_equals_two(whole, assert_close):
    """Compares with the gradient of pixel + weight * adversarial loss, the weight from two separate passes."""
    task, _, state, _, frozen = whole
    loss = task.config.loss.model_copy(update={"feature_weight": 0.0, "distill_weight": 0.0, "vq_weight": 0.0})
    config = task.config.model_copy(update={"loss": loss})
    objective = dataclasses.replace(task.objective, config=config, perceptual=None)
    task = dataclasses.replace(task, config=config, objective=objective)
    image, key = images()[0] / 255, jax.random.key(1)
    ours, *_, metrics = jax.jit(task.gradients)(state, frozen, image, key, state.batch_stats)

    noise, codes = jax.random.split(key)

    def reconstruct(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, _ = task.built.module.apply(
            variables, image, train=True, method="forward", mutable=["batch_stats"],
            rngs={"noise": noise, "codes": codes},
        )  # fmt: skip
        return out.reconstruction

    def pixel(params):
        return jnp.abs(reconstruct(params) - image).mean()

    def gan(params):
        fake = reconstruct(params)
        return task.adversary.generator_loss(state.adversary, frozen["discriminator"], fake, jax.random.fold_in(key, 2))

    g, h = (jax.jit(jax.grad(f))(state.params) for f in (pixel, gan))
    weight = 0.75 * adaptive_weight(*(x["decoder"]["pred"]["kernel"] for x in (g, h)), 1e4)
    assert_close(metrics["gan/weight"], weight, 1e-5)
    for name in ("pred", "embed"):
        expected = g["decoder"][name]["kernel"] + weight * h["decoder"][name]["kernel"]
        assert_close(ours["decoder"][name]["kernel"], expected, 1e-5, name)


@pytest.mark.slow
def test_frozen_networks_do_not_change(whole, assert_same):
    """Over six steps: the networks of the loss and the parts of the model that do not train."""
    task, (before, _, running), *_ = whole
    _, _, frozen = take(3, running)
    assert_same(frozen, before)
    assert_same(task.frozen(), before)


@pytest.mark.slow
def test_all_metrics_are_returned(whole):
    _, _, state, metrics, _ = whole
    last = metrics[-1]
    losses = {"pixel", "vq", "perceptual", "gram", "features", "distill", "adversarial", "total"}
    assert {n.removeprefix("loss/") for n in last if n.startswith("loss/")} == losses
    gan = {"weight", "logits_real", "logits_fake", "discriminator", "lecam", "consistency"}
    assert {f"gan/{name}" for name in gan} <= last.keys()
    parts = np.array([last[f"grad_norm/{part}"] for part in ALL])
    assert last["grad_norm"] == pytest.approx(np.sqrt((parts**2).sum()), rel=1e-5)
    assert int(state.step) == 3
    assert state.adversary["lecam"]["real"] != 0


@pytest.mark.slow
def test_terms_wait_for_their_start(whole, assert_same):
    """Before, nothing changes, bit for bit."""
    task, (_, first, _), state, metrics, _ = whole
    assert_same(first.adversary, task.init().adversary)
    active = {n: [bool(m[n] != 0) for m in metrics] for n in ("loss/gram", "gan/weight", "gan/discriminator")}
    assert active["loss/gram"] == active["gan/weight"] == [False, False, True]
    assert active["gan/discriminator"] == [False, True, True]
    assert int(jax.tree.leaves(state.adversary["opt_state"])[0]) == 4


@pytest.mark.slow
def test_accumulation_keeps_the_discriminators_gradient(tiny, one_mesh, assert_close):
    """PatchGAN's norms see one image at a time, so two halves equal the whole, also in power steps and averages."""
    plain = {**PATCH, "augment": 0.0, "consistency_weight": 0.0, "lecam_decay": 0.5}
    fake = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3))
    task = TokenizerTask.build(tiny(adversary=plain), one_mesh)
    state, real = task.init().adversary, images()[0] / 255
    update = jax.jit(task.adversary.update)
    halves = ([x.reshape(parts, 8 // parts, 32, 32, 3) for x in (fake, real)] for parts in (1, 2))
    (one, whole), (two, split) = (update(state, {}, *x, 0, 6, jax.random.key(1)) for x in halves)
    for part in ("lecam", "spectral"):
        jax.tree.map(lambda a, b: assert_close(b, a, 1e-5), one[part], two[part])
    assert_close(split["gan/discriminator"], whole["gan/discriminator"], 1e-5)
    assert_close(split["gan/grad_norm"], whole["gan/grad_norm"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_eight_devices_equal_one(tiny, whole, fsdp, assert_close):
    mesh = {"data": 4, "model": 2, "fsdp": fsdp, "fsdp_min_size": 1}
    task = TokenizerTask.build(tiny(**RECIPE, mesh=mesh), sharding.make_mesh(4, 2))
    _, metrics, _ = take(3, run(task))
    for ours, theirs in zip(metrics, whole[3], strict=True):
        for name in ("loss/total", "loss/adversarial", "gan/discriminator", "gan/weight", "gan/grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert sharding.unmatched(task.shapes().rest(), min_size=1024) == []


def test_errors_of_the_trunk_name_the_field(tiny, one_mesh, golden):
    file = str(golden / "discriminator" / "dino_bn.npz")
    for fields, kind, name in (({}, WeightsError, "path"), ({"path": file, "trunk_heads": 2}, ConfigError, "taps")):
        with pytest.raises(kind) as error:
            TokenizerTask.build(tiny(adversary={"discriminator": "dino", **fields}), one_mesh)
        assert error.value.field == f"adversary.{name}"


@pytest.mark.slow
def test_the_dino_discriminator_fits_the_task(tiny, one_mesh, golden):
    """In shapes only; its arithmetic has its own tests."""
    file = str(golden / "discriminator" / "dino_bn.npz")
    dino = {"discriminator": "dino", "path": file, "trunk_heads": 2, "taps": (1, 2), "dtype": "bfloat16"}
    task = TokenizerTask.build(tiny(adversary=dino, optimizer={"accumulate": 2}), one_mesh)
    state = task.shapes()
    assert set(state.adversary["params"]) == {"head0", "head1", "head2"}
    frozen = jax.eval_shape(task.frozen)
    assert set(frozen) == {"discriminator"}
    batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)}
    after, _ = jax.eval_shape(task.step, state, frozen, batch, jnp.asarray(6))
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)


@pytest.mark.parametrize(("change", "field"), [
    ({"loss": {"feature_weight": 1.0}}, "loss.feature_weight"),
    ({"loss": {"distill_weight": 1.0}, "train": {"trainable": ("quantizer", "decoder")}}, "loss.distill_weight"),
    ({"loss": {"perceptual": {"gram_weight": 1.0}}}, "loss.perceptual.gram_weight"),
    ({"adversary": {"consistency_weight": 1.0, "augment": 0.0}}, "adversary.consistency_weight"),
    ({"model": {"quantizer": "none"}, "train": {"code_noise": 0.1}}, "train.code_noise"),
    ({"adversary": {"discriminator": "patch"}, "train": {"trainable": ("encoder",)}}, "adversary.adaptive"),
])  # fmt: skip
def test_terms_check_what_they_need(tiny, change, field):
    with pytest.raises(ConfigError, match=field):
        tiny(**change)


@pytest.mark.slow
def test_a_trunk_split_by_fsdp_keeps_tokens_with_their_images(golden):
    path = str(golden / "discriminator" / "dino_bn.npz")
    config = AdversaryConfig(discriminator="dino", path=path, trunk_heads=2, taps=(1, 2))
    mesh = sharding.make_mesh(8, 1)
    image = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32, sharding=sharding.over_data(mesh))

    def gathered(network_mesh):
        network = judges.build_discriminator(config, network_mesh)
        variables = jax.eval_shape(network.module.init, jax.random.key(1), image)
        where = sharding.shardings(variables, mesh, fsdp=True, fsdp_min_size=1)
        variables = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), variables, where)
        slope = jax.jit(jax.grad(lambda x, v: network.module.apply(v, x).sum()), out_shardings=sharding.over_data(mesh))
        program = slope.lower(image, variables).compile().as_text()
        return re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)

    split = gathered(mesh)
    assert split  # weights are gathered, tokens are not
    assert not [shape for shape in split if shape.startswith("8,") and shape.count(",") == 2]
    assert [shape for shape in gathered(None) if shape.startswith("8,") and shape.count(",") == 2]
