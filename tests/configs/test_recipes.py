"""The recipes are valid, build, and their full-size step has consistent shapes; nothing is computed or downloaded."""

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


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*FULL, ("dinov2_b", ()), ("rae_dinov2_b", ()), ("quickstart", ()), ("cpu_recipe", ("encoder",))],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x,
)
def test_a_recipe_sets_nothing_that_its_quantizer_does_not_read(name, arguments):
    assert unread(load(name, *arguments).model, 768, 16) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [given if given in FAST else pytest.param(*given, marks=pytest.mark.slow) for given in FULL],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x,
)
def test_the_step_of_every_recipe_fits(name, arguments, one_mesh):
    config = epochs_to_steps(load(name, *arguments), lambda: IMAGENET)
    architecture = ARCHITECTURES[config.model.encoder_config_path]
    params = config.model.encoder_params.model_copy(update={"architecture": architecture})
    model = config.model.model_copy(update={"encoder_config_path": None, "encoder_params": params})
    task = TokenizerTask.build(config.model_copy(update={"model": model}), one_mesh, weights=False)
    size = config.data.image_size
    assert task.built.module.encoder.grid == 16
    state, frozen = task.shapes(), task.frozen_shapes()
    judges = {"perceptual", "discriminator"}
    assert set(frozen) == judges | ({"teacher"} if "encoder" in config.train.trainable else {"encoder"})
    image = jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
    after, told = jax.eval_shape(task.step, state, frozen, {"image": image})
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert {"loss/perceptual", "loss/adversarial", "gan/discriminator"} <= told.keys()
    starts = config.adversary.start_steps, config.adversary.generator_start_steps
    assert 0 <= starts[0] < starts[1] < config.train.steps


def test_epochs_are_those_of_rae():
    config = epochs_to_steps(load("vqrae_dinov2_b"), lambda: IMAGENET)
    epoch = IMAGENET // 512
    assert config.train.steps == 16 * epoch
    assert (config.adversary.start_steps, config.adversary.generator_start_steps) == (6 * epoch, 8 * epoch)
    assert config.optimizer.warmup_steps == epoch


def test_the_small_recipe_runs_without_a_network(one_mesh):
    """The CPU variant, with the networks that it builds itself."""
    task = TokenizerTask.build(load("cpu_recipe"), one_mesh)
    state, image = task.shapes(), jax.ShapeDtypeStruct((16, 64, 64, 3), np.uint8)
    after, told = jax.eval_shape(task.step, state, task.frozen_shapes(), {"image": image})
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert {"loss/perceptual", "loss/features", "loss/adversarial"} <= told.keys()


@pytest.mark.parametrize(("name", "argument"), [("simvq_siglip2_l", "3"), ("small", "lfq")])
def test_a_bad_argument_says_what_there_is(name, argument):
    with pytest.raises(ConfigError, match=rf"--config.*'{argument}'"):
        load(name, argument)
