import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.config import Config, OptimizerConfig, epochs_to_steps, from_dict
from vqrae_jax.errors import ConfigError
from vqrae_jax.train.optim import (
    ema_decay,
    learning_rate,
    make_optimizer,
    make_tokenizer_optimizer,
    part_rates,
    update_ema,
)

CASES = [
    "cosine_warmup_steps", "linear_warmup_steps", "decay_end_before_warmup_end",
    "cosine_epochs_as_in_the_shipped_configs", "cosine_no_warmup", "linear_fractional_epochs",
    "warmup_only_final_lr_set", "empty_scheduler_section_with_training_level_keys",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_schedules_equal_the_pytorch_vqrae(golden, case):
    recorded = next(c for c in json.loads((golden / "schedules.json").read_text())["cases"] if c["name"] == case)
    # The PyTorch VQRAE accepts keys outside the section too, and ends a decay without an end with the warm-up.
    s = {**recorded["training_config"], **recorded["training_config"]["scheduler"]}
    del s["scheduler"]
    if not s.keys() & {"decay_end_steps", "decay_end_epoch"}:
        s["decay_end_steps"] = s["warmup_steps"]
    names = {"decay_start_epoch": "warmup_epochs", "decay_end_epoch": "decay_end_epochs", "base_lr": "learning_rate",
             "final_lr": "final_learning_rate", "type": "schedule"}  # fmt: skip
    images = 4 * recorded["steps_per_epoch"] + 3  # the last batch of an epoch is dropped
    optimizer = {names.get(name, name): value for name, value in s.items()}
    whole = from_dict(Config, {"data": {"batch_size": 4}, "optimizer": optimizer})
    rate = jax.jit(functools.partial(learning_rate, epochs_to_steps(whole, lambda: images).optimizer))
    np.testing.assert_allclose([rate(i, 10**6) for i in recorded["steps"]], recorded["lr"], rtol=1e-5)


def test_parts_have_their_own_rates():
    config = OptimizerConfig(encoder_rate=0.1, constant=("quantizer",), warmup_steps=2, learning_rate=1.0)
    rates = functools.partial(part_rates, config)
    assert rates(0, 100) == pytest.approx({"encoder": 0.05, "quantizer": 0.5, "decoder": 0.5})
    assert rates(99, 100)["quantizer"] == 1.0
    assert rates(99, 100)["decoder"] < 0.1
    assert rates(50, 100)["encoder"] == pytest.approx(0.1 * float(rates(50, 100)["decoder"]))
    params = {part: {"kernel": jnp.ones((2, 2))} for part in ("encoder", "quantizer", "decoder")}
    optimizer = make_optimizer(config, rates)
    updates, state = optimizer.update(params, optimizer.init(params), params, horizon=100)
    np.testing.assert_allclose(updates["encoder"]["kernel"], 0.1 * updates["decoder"]["kernel"], rtol=1e-6)
    updates, _ = optimizer.update(params, state, params, horizon=100)
    np.testing.assert_allclose(updates["decoder"]["kernel"], -1, rtol=1e-5)  # Adam's step is one; warm-up is over


def test_rates_are_scaled_to_the_batch():
    config = from_dict(Config, {"data": {"batch_size": 64}, "optimizer": {"reference_batch": 256},
                                "adversary": {"optimizer": {"reference_batch": 128, "learning_rate": 1e-3}},
                                "train": {"epochs": 2.5}})  # fmt: skip
    scaled = epochs_to_steps(config, lambda: 650)
    assert scaled.optimizer.learning_rate == pytest.approx(2e-4 / 4)
    assert scaled.optimizer.final_learning_rate == pytest.approx(2e-5 / 4)
    assert scaled.adversary.optimizer.learning_rate == pytest.approx(5e-4)
    assert scaled.train.steps == 25
    assert epochs_to_steps(scaled, lambda: 1) == scaled  # a checkpoint keeps the result


@pytest.mark.parametrize(("images", "epochs"), [(12, 0.5), (12, 0.0), (7, 3.0)])
def test_epochs_of_less_than_a_step_are_an_error(images, epochs):
    config = from_dict(Config, {"data": {"batch_size": 8}, "train": {"epochs": epochs}})
    with pytest.raises(ConfigError, match=f"{images} training images are {images // 8} batches") as error:
        epochs_to_steps(config, lambda: images)
    assert (error.value.field, error.value.value) == ("train.epochs", epochs)


def test_a_rising_rate_is_a_warning(caplog):
    """Happens if only the learning rate is lowered, below the default of the final one."""
    adversary = {"optimizer": {"learning_rate": 1e-5, "schedule": "constant"}}
    epochs_to_steps(from_dict(Config, {"optimizer": {"learning_rate": 1e-5}, "adversary": adversary}), lambda: 1)
    (message,) = caplog.messages
    assert message.startswith("optimizer.learning_rate=1e-05")


@pytest.mark.parametrize(("kind", "generator", "warnings"), [("patch", 0, 1), ("patch", 3, 0), ("none", 0, 0)])
def test_a_generator_that_starts_before_the_discriminator_is_a_warning(kind, generator, warnings, caplog):
    adversary = {"discriminator": kind, "start_epochs": 3, "generator_start_epochs": generator}
    config = from_dict(Config, {"data": {"batch_size": 8}, "train": {"steps": 9}, "adversary": adversary})
    epochs_to_steps(config, lambda: 8)
    assert [message.partition("=")[0] for message in caplog.messages] == ["adversary.generator_start_steps"] * warnings


def test_without_epochs_no_images_are_counted():
    assert epochs_to_steps(Config(), lambda: pytest.fail("counted")) == Config()


def test_decay_ends_with_training_by_default():
    config = OptimizerConfig(warmup_steps=10)
    assert learning_rate(config, 100, horizon=100) == pytest.approx(2e-5)
    assert learning_rate(config, 99, horizon=100) > 2e-5


def test_weight_decay_touches_kernels_only():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "pos_embed": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), lambda step, horizon: 1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, horizon=1)
    assert np.all(updates["dense"]["kernel"] < 0)
    assert not np.any(updates["dense"]["bias"])
    assert not np.any(updates["pos_embed"])


def test_two_steps_of_adamw_by_hand():
    """Distinct b1 and b2 (Loshchilov & Hutter 2017, arXiv:1711.05101), with optax's epsilon."""
    config, gradients = OptimizerConfig(b1=0.8, b2=0.9, weight_decay=0.1), [np.float32(3), np.float32(-1)]
    optimizer = make_optimizer(config, lambda step, horizon: 0.5)
    params = {"a": {"kernel": jnp.ones(1)}}
    state, (x, first, second) = optimizer.init(params), (1.0, 0.0, 0.0)
    for t, gradient in enumerate(gradients, 1):
        updates, state = optimizer.update({"a": {"kernel": jnp.full(1, gradient)}}, state, params, horizon=2)
        params = jax.tree.map(jnp.add, params, updates)
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        x -= 0.5 * (first / (1 - 0.8**t) / (np.sqrt(second / (1 - 0.9**t)) + 1e-8) + 0.1 * x)
        np.testing.assert_allclose(params["a"]["kernel"], x, rtol=1e-5)


def test_ema_decay_warms_up():
    warm = [float(ema_decay(OptimizerConfig(ema_decay=0.9), s)) for s in (0, 10, 10**6)]
    assert warm == pytest.approx([0.1, 11 / 20, 0.9])
    assert ema_decay(OptimizerConfig(ema_decay=0.9, ema_warmup=False), 0) == pytest.approx(0.9)


def test_ema():
    np.testing.assert_allclose(update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.9)["a"], 0.1, rtol=1e-6)


def test_muon_takes_orthogonal_steps_of_matrices_of_blocks_only():
    """All singular values of Muon's step are about equal; other parameters take Adam's."""
    config = OptimizerConfig(method="muon", learning_rate=1.0, schedule="constant")
    shapes = {"query": (3, 16, 2, 8), "out": (3, 2, 8, 16), "up": (3, 16, 32)}  # three blocks
    keys = iter(jax.random.split(jax.random.key(0), 5))
    blocks = {name: {"kernel": jax.random.normal(next(keys), shape)} for name, shape in shapes.items()}
    others = {
        "embed": {"kernel": jax.random.normal(next(keys), (16, 32))},
        "blocks": {"norm": {"scale": jnp.ones((3, 16))}},
    }
    params = {"decoder": {**others, "blocks": {**others["blocks"], **blocks}}}
    optimizer = make_tokenizer_optimizer(config)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, horizon=100)
    for name in shapes:
        matrices = np.asarray(updates["decoder"]["blocks"][name]["kernel"]).reshape(3, 16, -1)
        values = np.linalg.svd(matrices, compute_uv=False)
        assert values.max() < 2 * values.min()
        np.testing.assert_allclose(np.sqrt((matrices**2).mean((1, 2))), 0.2, rtol=0.3)
        assert (np.asarray(params["decoder"]["blocks"][name]["kernel"]).reshape(3, 16, -1) * matrices).sum() < 0
    np.testing.assert_allclose(np.abs(updates["decoder"]["embed"]["kernel"]), 1, rtol=1e-3)
