"""Pixels -> latent grid: resize, normalize, pretrained ViT, final LayerNorm."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.models.stacking import stack_blocks
from vqrae_jax.models.vit import ViT, ViTConfig, layer_norm, resample_positions
from vqrae_jax.resize import resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per channel, of pictures in [0, 1]
Fusion = Literal["sum", "mean", "concat"]


class Encoder(nn.Module):
    """A pretrained vision encoder as a feature extractor.

    Attributes:
      vit: architecture.
      input_size: side in pixels to which images are resized (torch's bicubic, no antialias, before normalization);
        None takes images as they come.
      mean, std: per channel, of the encoder's training images in [0, 1].
      normalize: True drops scale and bias of the final LayerNorm, so that every latent has mean 0 and variance 1.
      layers: blocks whose patch tokens are used, negative from the end.
      fusion: how several layers, each normalized, become one latent.
    """

    vit: ViTConfig
    input_size: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    normalize: bool = True
    layers: tuple[int, ...] = (-1,)
    fusion: Fusion = "mean"

    @property
    def channels(self) -> int:
        """C, the width of the latent."""
        return self.vit.blocks.width * (len(self.layers) if self.fusion == "concat" else 1)

    @property
    def grid(self) -> int:
        """Side of the latent grid at input_size."""
        return self.input_size // self.vit.patch

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Encodes images in [0, 1]."""
        if self.input_size is not None:
            image = resize(image, self.input_size, self.input_size, "bicubic")
        image = (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        taps = tuple(layer % self.vit.blocks.depth for layer in self.layers)
        outputs, (h, w) = ViT(self.vit, name="vit")(image, taps)
        norm = layer_norm(self.vit.blocks, "norm", affine=not self.normalize)
        latents = [self.vit.blocks.spread.pin(norm(tokens)).reshape(len(image), h, w, -1) for tokens in outputs]
        if self.fusion == "concat":
            return jnp.concatenate(latents, axis=-1)
        return sum(latents) / (len(latents) if self.fusion == "mean" else 1)


def at_input_size(encoder: Encoder, params: Mapping[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """The same encoder with its position grid resampled to input_size once, in float32, instead of in every call.

    For running frozen weights: those of the file, with their own grid, are what is exported and hashed.
    """
    vit, grid = encoder.vit, encoder.grid
    if vit.pos == "rope" or grid == vit.grid:
        return encoder, dict(params)
    table = np.asarray(resample_positions(vit, jnp.asarray(params["vit"]["pos_embed"]), grid, grid))
    tree = {**params, "vit": {**params["vit"], "pos_embed": table}}
    return encoder.clone(vit=dataclasses.replace(vit, grid=grid)), tree


def scanned(encoder: Encoder, params: Mapping[str, Any] | None) -> tuple[Encoder, dict[str, Any] | None]:
    """The same encoder with its blocks stacked and scanned, which compiles as fast as one block; for frozen weights."""
    blocks = dataclasses.replace(encoder.vit.blocks, scan=True)
    tree = params and {**params, "vit": stack_blocks(params["vit"])}
    return encoder.clone(vit=dataclasses.replace(encoder.vit, blocks=blocks)), tree


class PooledEncoder(nn.Module):
    """One vector per picture, as distances between sets of pictures use it; parameters as those of `Encoder`.

    Attributes:
      vit, mean, std: as in `Encoder`.
      input_size: side in pixels to which images are resized, bicubic with antialias as image processors do it.
      pool: the class token, or the mean of the patch tokens, after the pretrained final LayerNorm.
    """

    vit: ViTConfig
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pool: Literal["cls", "mean"]

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Images in [0, 1] -> float32 features."""
        image = resize(image, self.input_size, self.input_size, "bicubic_antialias")
        image = (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        (tokens,), _ = ViT(self.vit, name="vit")(image, (self.vit.blocks.depth - 1,), keep_prefix=True)
        tokens = layer_norm(self.vit.blocks, "norm")(tokens).astype(jnp.float32)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, self.vit.prefix :].mean(1)


def with_matmul(encoder: Encoder, kind: Literal["dtype", "int8", "fp8"]) -> Encoder:
    """The same encoder with the dense layers of its blocks multiplied in `kind`, see `low_precision`."""
    blocks = dataclasses.replace(encoder.vit.blocks, matmul=kind)
    return encoder.clone(vit=dataclasses.replace(encoder.vit, blocks=blocks))
