import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax.config import OptimizerConfig
from vqrae_jax.train.optim import ema_decay, learning_rate, make_optimizer, update_ema

CASES = ["cosine_warmup_steps", "linear_warmup_steps", "decay_end_before_warmup_end"]


@pytest.mark.parametrize("case", CASES)
def test_schedules_equal_the_origin(golden, case):
    given = next(c for c in json.loads((golden / "schedules.json").read_text())["cases"] if c["name"] == case)
    s = given["training_config"]["scheduler"]
    config = OptimizerConfig(
        schedule=s["type"], warmup_steps=s["warmup_steps"], decay_end_steps=s["decay_end_steps"],
        learning_rate=s["base_lr"], final_learning_rate=s["final_lr"],
    )  # fmt: skip
    rate = jax.jit(learning_rate(config, steps=10**6))
    np.testing.assert_allclose([rate(i) for i in given["steps"]], given["lr"], rtol=1e-5)


def test_decay_ends_with_training_by_default():
    rate = learning_rate(OptimizerConfig(warmup_steps=10), steps=100)
    assert rate(100) == pytest.approx(2e-5)
    assert rate(99) > 2e-5


def test_weight_decay_touches_kernels_only():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "pos_embed": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), lambda _: 1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert np.all(updates["dense"]["kernel"] < 0)
    assert not np.any(updates["dense"]["bias"])
    assert not np.any(updates["pos_embed"])


def test_ema_decay_warms_up():
    warm = [float(ema_decay(OptimizerConfig(ema_decay=0.9), s)) for s in (0, 10, 10**6)]
    assert warm == pytest.approx([0.1, 11 / 20, 0.9])
    assert ema_decay(OptimizerConfig(ema_decay=0.9, ema_warmup=False), 0) == pytest.approx(0.9)


def test_ema():
    np.testing.assert_allclose(update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.9)["a"], 0.1, rtol=1e-6)
