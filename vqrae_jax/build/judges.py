"""Frozen networks that judge pictures, from a config: perceptual distances, and the discriminator with its trunk."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vqrae_jax.build import tokenizer as assembly
from vqrae_jax.config import AdversaryConfig, ModelConfig, PerceptualConfig
from vqrae_jax.models.convnext import ConvNeXtConfig
from vqrae_jax.models.discriminator import DinoDiscriminator, PatchDiscriminator
from vqrae_jax.models.lpips import LPIPS
from vqrae_jax.models.perceptual import EncoderDistance, LogitDistance
from vqrae_jax.models.stacking import stack_blocks, unstack_blocks
from vqrae_jax.models.vit import BlocksConfig, ViTConfig
from vqrae_jax.pretrained.convnext import convert_convnext, read_convnext
from vqrae_jax.pretrained.dino import convert_dino, read_dino
from vqrae_jax.pretrained.lpips import read_lpips
from vqrae_jax.pretrained.released import DINO
from vqrae_jax.errors import ConfigError, WeightsError


@dataclasses.dataclass(frozen=True)
class Critic:
    """A network and what of its parameters never trains."""

    module: nn.Module
    params: dict[str, Any]  # numpy, float32


def perceptual(config: PerceptualConfig, mesh: Mesh | None = None, weights: bool = True) -> Critic:
    """The distance of two batches of pictures in [0, 1] -> [B]; with weights=False its params are shapes.

    `mesh` is that on which it will run, if on one.

    Raises:
      WeightsError, ConfigError: its weights cannot be had, with the field that named them.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with _or_switch_off("loss.perceptual", "loss.perceptual.weight=0"):
        if config.network == "lpips":
            module = LPIPS(config.dtype)
            target = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
            return Critic(module, read_lpips(target, config.trunk, config.heads) if weights else target)
        if config.network == "convnext":
            if config.path is None:
                raise ConfigError("path is None: name a ConvNeXt classifier, as in facebook/convnext-small-224")
            fields, tensors = read_convnext(config.path, "loss.perceptual.path")
            module = LogitDistance(ConvNeXtConfig(**fields, dtype=config.dtype), config.input_size)
            target = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]["classifier"]
            return Critic(module, {"classifier": convert_convnext(tensors, target, config.path) if weights else target})
        model = ModelConfig(
            encoder_cls=config.encoder_cls,
            encoder_config_path=config.path,
            encoder_input_size=config.input_size,
            encoder_params={"layers": config.layers, "fusion": "concat", "architecture": config.architecture},
            dtype=config.dtype,
        )
        encoder, params = assembly.encoder_alone(model, mesh)
        module = EncoderDistance(encoder)
        if not weights:
            return Critic(module, jax.eval_shape(module.init, jax.random.key(0), image, image)["params"])
        if params is None:
            drawn = jax.jit(module.init)(jax.random.key(0), jnp.zeros(image.shape), jnp.zeros(image.shape))
            return Critic(module, jax.device_get(drawn["params"]))
        return Critic(module, {"encoder": params})


def discriminator(
    config: AdversaryConfig,
    mesh: Mesh | None = None,
    weights: bool = True,
    scan: bool = False,
    attention: Literal["xla", "cudnn", "pallas"] = "xla",
) -> Critic:
    """Pictures in [0, 1] -> logits; `params` is {"trunk": ...} of the DINO discriminator, empty for PatchGAN.

    With weights=False they are shapes, and a trunk that was released is not looked for; with `scan` its blocks are
    stacked. `attention` is that of the model; NVIDIA's kernel wants bfloat16 here as well.

    Raises:
      WeightsError, ConfigError: the trunk cannot be had, with the field that named it.
    """
    if config.discriminator == "patch":
        module = PatchDiscriminator(
            config.width, config.layers, config.norm, spectral=config.spectral, dtype=config.dtype
        )
        return Critic(module, {})
    with _or_switch_off("adversary", "adversary.discriminator=none"):
        if not weights and config.path in DINO:
            fields = {**DINO[config.path], "blocks": dict(DINO[config.path]["blocks"])}
        else:
            fields, tensors = read_dino(config.path, "adversary.path", config.trunk_heads)
        attention = attention if config.dtype == "bfloat16" else "xla"
        blocks = BlocksConfig(
            **fields.pop("blocks"), dtype=config.dtype, scan=scan, attention=attention,
            spread=assembly.spread(mesh),
        )  # fmt: skip
        if any(tap >= blocks.depth for tap in config.taps):
            raise ConfigError(f"adversary.taps={config.taps}: the trunk has blocks 0 to {blocks.depth - 1}")
        module = DinoDiscriminator(
            ViTConfig(blocks, **fields), config.taps, config.window, config.norm, spectral=config.spectral
        )
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        target = jax.eval_shape(module.init, jax.random.key(0), image)["params"]["trunk"]
        if not weights:
            return Critic(module, {"trunk": target})
        trunk = convert_dino(tensors, jax.eval_shape(unstack_blocks, target) if scan else target, config.path)
        return Critic(module, {"trunk": stack_blocks(trunk) if scan else trunk})


@contextlib.contextmanager
def _or_switch_off(section: str, line: str) -> Iterator[None]:
    """Adds to an error for what its network is wanted, and how to do without it."""
    try:
        yield
    except (WeightsError, ConfigError) as error:
        raise type(error)(f"{section}: {error}\nwithout this term: --config.{line}") from error
