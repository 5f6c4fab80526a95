"""The recipes are valid, build, and their full-size step has consistent shapes; nothing is computed or downloaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs.test_released import RECORDED, load
from vqrae_jax import assembly, critics
from vqrae_jax.config import Config, ConfigError, from_dict, in_steps
from vqrae_jax.models.discriminator import DinoDiscriminator
from vqrae_jax.models.lpips import LPIPS
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.train.tokenizer import TokenizerTask

IMAGENET = 1_281_167
FULL = [("vqrae_dinov2_b", ()), ("recipe_16k", ()), ("simvq_siglip2_l", ("1",)), ("simvq_siglip2_l", ("2",)),
        ("fsq_dinov2_b", ()), ("small", ("ema",)), ("small", ("simvq",)), ("small", ("fsq",))]  # fmt: skip
FAST = [("simvq_siglip2_l", ("2",)), ("small", ("ema",))]


def shapes_only(module, config, *given):
    """A critic whose frozen parameters are shapes."""
    params = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    return critics.Critic(module, {n: p for n, p in params.items() if not n.startswith(config)})


@pytest.fixture
def without_hub(monkeypatch):
    """Networks of the recorded sizes, whose weights are shapes."""
    picture = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    dino = BlocksConfig(384, 12, 6, 1536, "gelu_tanh", dtype="bfloat16")

    def discriminator(config):
        module = DinoDiscriminator(ViTConfig(dino, 8, 28), config.taps, config.window)
        return shapes_only(module, "head", picture)

    monkeypatch.setattr(critics, "perceptual", lambda *_: shapes_only(LPIPS("bfloat16"), "none", picture, picture))
    monkeypatch.setattr(critics, "discriminator", discriminator)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [given if given in FAST else pytest.param(*given, marks=pytest.mark.slow) for given in FULL],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x,
)
def test_the_step_of_every_recipe_fits(name, arguments, without_hub, one_mesh):
    config = in_steps(load(name, *arguments), lambda: IMAGENET)
    values = config.model_dump()
    recorded = RECORDED["encoders"][config.model.encoder_config_path]["architecture"]
    values["model"] |= {"encoder_config_path": None}
    values["model"]["encoder_params"]["architecture"] = recorded
    task = TokenizerTask.build(from_dict(Config, values), one_mesh)
    size = config.data.image_size
    assert task.assembly.module.encoder.grid == 16
    state = task.shapes()
    shapes = assembly.shapes(task.assembly)["params"]
    frozen = {n: shapes[n] for n in ("encoder",) if n not in config.train.trainable}
    frozen |= {"teacher": shapes["encoder"]} if "encoder" in config.train.trainable else {}
    frozen |= {"perceptual": task.objective.perceptual.params, "discriminator": task.adversary.critic.params}
    image = jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
    after, told = jax.eval_shape(task.step, state, frozen, {"image": image})
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert {"loss/perceptual", "loss/adversarial", "gan/discriminator"} <= told.keys()
    starts = config.adversary.start_steps, config.adversary.generator_start_steps
    assert 0 <= starts[0] < starts[1] < config.train.steps


def test_epochs_are_those_of_rae():
    config = in_steps(load("vqrae_dinov2_b"), lambda: IMAGENET)
    epoch = IMAGENET // 512
    assert config.train.steps == 16 * epoch
    assert (config.adversary.start_steps, config.adversary.generator_start_steps) == (6 * epoch, 8 * epoch)
    assert config.optimizer.warmup_steps == epoch


def test_the_small_recipe_runs_without_a_network(one_mesh):
    """Two steps' shapes of the CPU variant, with the networks it builds itself."""
    task = TokenizerTask.build(load("cpu_recipe"), one_mesh)
    state, image = task.shapes(), jax.ShapeDtypeStruct((16, 64, 64, 3), np.uint8)
    after, told = jax.eval_shape(task.step, state, jax.eval_shape(task.frozen), {"image": image})
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert {"loss/perceptual", "loss/features", "loss/adversarial"} <= told.keys()


@pytest.mark.parametrize(("name", "argument"), [("simvq_siglip2_l", "3"), ("small", "lfq")])
def test_a_bad_argument_says_what_there_is(name, argument):
    with pytest.raises(ConfigError, match=rf"--config.*'{argument}'"):
        load(name, argument)
