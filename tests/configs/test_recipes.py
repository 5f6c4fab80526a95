"""Checks that the recipes are valid and build, and the shapes of their full-size steps, without computing anything."""

import jax
import numpy as np
import pytest

from tests.configs.test_released import load
from vqrae_jax.config import epochs_to_steps
from vqrae_jax.config.schema import Section
from vqrae_jax.errors import ConfigError
from vqrae_jax.pretrained.released import ARCHITECTURES
from vqrae_jax.quantizers.factory import unread
from vqrae_jax.train.tokenizer import TokenizerTask

IMAGENET = 1_281_167
FULL = [("vqrae_dinov2_b", ()), ("recipe_16k", ()), ("recipe_131k", ()), ("recipe_bits", ()),
        ("simvq_siglip2_l", ("1",)), ("simvq_siglip2_l", ("2",)), ("vfmtok_dinov2_l", ()), ("finetune_decoder", ()),
        ("fsq_dinov2_b", ()), ("small", ("ema",)), ("small", ("simvq",)), ("small", ("fsq",))]  # fmt: skip
FAST = [("simvq_siglip2_l", ("2",))]  # with every network


def test_recipes_set_only_fields_that_their_quantizer_reads():
    others = [("dinov2_b", ()), ("rae_dinov2_b", ()), ("quickstart", ()), ("laptop", ()), ("cpu_recipe", ("encoder",))]
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
    assert task.built.module.encoder.grid == (24 if name == "vfmtok_dinov2_l" else 16)
    encoder = "teacher" if "encoder" in config.train.trainable else "encoder"
    metrics, adversary = check_step(task, config.data.image_size), config.adversary
    discriminator = set() if adversary.discriminator == "none" else {"discriminator"}
    quantizer = set() if "quantizer" in config.train.trainable else {"quantizer"}  # with its learned fusion
    assert set(task.frozen_shapes()) == {"perceptual", encoder} | discriminator | quantizer
    assert "loss/perceptual" in metrics
    assert {"loss/adversarial", "gan/discriminator"} <= metrics or not discriminator
    assert 0 <= adversary.start_steps <= adversary.generator_start_steps < config.train.steps


def flat(section, prefix=""):
    for name, value in section:
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, Section) else [(f"{prefix}{name}", value)]


EPOCH = IMAGENET // 512
OPTIMIZER = {"learning_rate": 2e-4, "final_learning_rate": 2e-5, "schedule": "cosine", "warmup_steps": EPOCH,
             "b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "clip_norm": 0.0}  # fmt: skip
RAE = {  # configs/stage1/training/DINOv2-B_decXL.yaml and src/train_stage1.py of github.com/bytetriper/RAE
    "model.encoder_config_path": "facebook/dinov2-with-registers-base", "model.encoder_input_size": 224,
    "model.decoder_config_path": "ViT-XL", "data.image_size": 256, "data.crop": "random", "data.resize": 384 / 256,
    "data.flip": False, "data.batch_size": 512, "train.steps": 16 * EPOCH, "optimizer.ema_decay": 0.9978,
    "loss.pixel": "l1", "loss.perceptual.network": "lpips", "loss.perceptual.weight": 1.0,
    "loss.perceptual.start_steps": 0, "adversary.discriminator": "dino", "adversary.path": "facebook/dino-vits8",
    "adversary.window": 9, "adversary.norm": "batch", "adversary.spectral": True, "adversary.augment": 1.0,
    "adversary.cutout": 0.0, "adversary.loss": "hinge", "adversary.generator_loss": "vanilla",
    "adversary.weight": 0.75, "adversary.adaptive": True, "adversary.adaptive_max": 1e4, "adversary.disc_updates": 1,
    "adversary.start_steps": 6 * EPOCH, "adversary.generator_start_steps": 8 * EPOCH,
    "adversary.optimizer.decay_end_steps": 16 * EPOCH,
    **{f"{part}{name}": value for part in ("optimizer.", "adversary.optimizer.") for name, value in OPTIMIZER.items()},
}  # fmt: skip


@pytest.mark.parametrize(("name", "noise"), [("vqrae_dinov2_b", 0.0), ("rae_dinov2_b", 0.8)])
def test_settings_equal_those_of_rae(name, noise):
    settings = dict(flat(epochs_to_steps(load(name), lambda: IMAGENET)))
    assert settings | RAE | {"model.noise_tau": noise} == settings


BOTH = {  # columns SigLIP2-so400m, 256 pixels, of table 7 in arXiv:2511.23386, and its equations 1, 2, 3 and 5
    "data.image_size": 256, "model.num_embeddings": 16_384, "model.quantizer_params.codebook_dim": 1536,
    "model.quantizer_params.distance": "l2", "model.commitment_cost": 0.25, "loss.pixel": "l2",
    "loss.perceptual.weight": 1.1, "loss.distill_distance": "l2", "data.crop": "random", "data.flip": True,
    "data.batch_size": 1024, "optimizer.schedule": "cosine", "optimizer.weight_decay": 1e-4, "optimizer.b1": 0.9,
    "optimizer.b2": 0.999, "optimizer.warmup_steps": 2000, "optimizer.clip_norm": 1.0, "model.dtype": "bfloat16",
}  # fmt: skip
STAGES = {
    "1": {"train.trainable": ("quantizer", "decoder"), "train.steps": 100_000, "adversary.discriminator": "none",
          "loss.distill_weight": 0.0, "optimizer.learning_rate": 4e-4, "optimizer.final_learning_rate": 1e-4},
    "2": {"train.trainable": ("encoder", "quantizer", "decoder"), "train.steps": 70_000, "adversary.weight": 0.1,
          "adversary.start_steps": 50_000, "adversary.generator_start_steps": 50_000, "loss.distill_weight": 1.0,
          "optimizer.learning_rate": 1e-4, "optimizer.final_learning_rate": 1e-5, "optimizer.encoder_rate": 0.1,
          "adversary.optimizer.learning_rate": 4e-5},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_settings_equal_those_of_the_vqrae_paper(stage):
    settings = dict(flat(load("simvq_siglip2_l", stage)))
    assert settings | BOTH | STAGES[stage] == settings


def check_step(task, size):
    """Checks the shapes of one step; returns its metrics."""
    state, image = task.shapes(), jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
    new_state, metrics = jax.eval_shape(task.step, state, task.frozen_shapes(), {"image": image}, 100)
    assert jax.tree.map(np.shape, new_state) == jax.tree.map(np.shape, state)
    return metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "terms"), [
    ("cpu_recipe", {"loss/perceptual", "loss/features", "loss/adversarial"}), ("laptop", {"loss/gradient"}),
])  # fmt: skip
def test_recipe_needs_no_network(name, terms, one_mesh):
    """Builds the recipe with its randomly initialized networks."""
    config = load(name)
    assert terms <= check_step(TokenizerTask.build(config, one_mesh), config.data.image_size)


def test_all_levels_of_the_laptop_recipe_are_equally_frequent():
    params = load("laptop").model.quantizer_params
    assert params.dropout / (params.depth - 1) == 1 - params.dropout


@pytest.mark.parametrize(("name", "argument"), [
    ("simvq_siglip2_l", "3"), ("small", "lfq"), ("rae_dinov2_b", "384"),
    *(("dinov2_b", text) for text in ("ViT-XL", "ViT-XL,", ",256", "ViT-XL,0", "ViT-XL,200", "ViT-XL,big")),
])  # fmt: skip
def test_bad_argument_raises(name, argument):
    with pytest.raises(ConfigError) as error:
        load(name, argument)
    assert repr(argument) in str(error.value)
