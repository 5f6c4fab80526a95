"""Checks that the recipes are valid and build, and the shapes of their full-size steps, without computing anything."""

import jax
import numpy as np
import pytest

from tests.configs.test_released import load
from vqrae_jax.config import epochs_to_steps
from vqrae_jax.errors import ConfigError
from vqrae_jax.pretrained.released import ARCHITECTURES
from vqrae_jax.quantizers.factory import unread
from vqrae_jax.train.tokenizer import TokenizerTask

IMAGENET = 1_281_167
FULL = [("vqrae_dinov2_b", ()), ("recipe_16k", ()), ("simvq_siglip2_l", ("1",)), ("simvq_siglip2_l", ("2",)),
        ("fsq_dinov2_b", ()), ("small", ("ema",)), ("small", ("simvq",)), ("small", ("fsq",))]  # fmt: skip
FAST = [("small", ("ema",))]


def test_recipes_set_only_fields_that_their_quantizer_reads():
    others = [("dinov2_b", ()), ("rae_dinov2_b", ()), ("quickstart", ()), ("cpu_recipe", ("encoder",))]
    for name, arguments in [*FULL, *others]:
        assert unread(load(name, *arguments).model, 768, 16) == [], (name, *arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [recipe if recipe in FAST else pytest.param(*recipe, marks=pytest.mark.slow) for recipe in FULL],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x,
)
def test_step_has_consistent_shapes(name, arguments, one_mesh):
    config = epochs_to_steps(load(name, *arguments), lambda: IMAGENET)
    architecture = ARCHITECTURES[config.model.encoder_config_path]
    params = config.model.encoder_params.model_copy(update={"architecture": architecture})
    model = config.model.model_copy(update={"encoder_config_path": None, "encoder_params": params})
    task = TokenizerTask.build(config.model_copy(update={"model": model}), one_mesh, weights=False)
    assert task.built.module.encoder.grid == 16
    encoder = "teacher" if "encoder" in config.train.trainable else "encoder"
    assert set(task.frozen_shapes()) == {"perceptual", "discriminator", encoder}
    metrics, adversary = check_step(task, config.data.image_size), config.adversary
    assert {"loss/perceptual", "loss/adversarial", "gan/discriminator"} <= metrics
    assert 0 <= adversary.start_steps < adversary.generator_start_steps < config.train.steps


def test_schedule_equals_that_of_rae():
    config = epochs_to_steps(load("vqrae_dinov2_b"), lambda: IMAGENET)
    epoch = IMAGENET // 512
    assert config.train.steps == 16 * epoch
    assert (config.adversary.start_steps, config.adversary.generator_start_steps) == (6 * epoch, 8 * epoch)
    assert config.optimizer.warmup_steps == epoch


def check_step(task, size):
    """Checks the shapes of one step; returns its metrics."""
    state, image = task.shapes(), jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
    new_state, metrics = jax.eval_shape(task.step, state, task.frozen_shapes(), {"image": image}, 100)
    assert jax.tree.map(np.shape, new_state) == jax.tree.map(np.shape, state)
    return metrics.keys()


def test_cpu_recipe_needs_no_network(one_mesh):
    """Builds the recipe with its randomly initialized networks."""
    metrics = check_step(TokenizerTask.build(load("cpu_recipe"), one_mesh), 64)
    assert {"loss/perceptual", "loss/features", "loss/adversarial"} <= metrics


@pytest.mark.parametrize(("name", "argument"), [
    ("simvq_siglip2_l", "3"), ("small", "lfq"), ("rae_dinov2_b", "384"),
    *(("dinov2_b", text) for text in ("ViT-XL", "ViT-XL,", ",256", "ViT-XL,0", "ViT-XL,200", "ViT-XL,big")),
])  # fmt: skip
def test_bad_argument_raises(name, argument):
    with pytest.raises(ConfigError) as error:
        load(name, argument)
    assert repr(argument) in str(error.value)
