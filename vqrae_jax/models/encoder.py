"""Pretrained vision encoders as feature extractors: images to a latent grid, or to one vector per image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vqrae_jax.models.vit import Tokens, ViT, ViTConfig, layer_norm, resample_positions
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.resize import resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per channel, of images in [0, 1]


class Encoder(nn.Module):
    """Image to latent grid: resize, normalize, ViT, final LayerNorm.

    Attributes:
      vit: architecture.
      input_size: side in pixels to which images are resized (torch's bicubic, no antialiasing, before normalization);
        None keeps their size.
      mean, std: per channel, of the encoder's training images in [0, 1].
      normalize: drops scale and bias of the final LayerNorm, so that every latent has mean 0 and variance 1.
      layers: numbers of the blocks whose patch tokens are used; negative ones count from the end.
      fusion: how several layers, each normalized, become one latent.
      keep_proportions: images are resized to a short side of `input_size` and a long side of a multiple of the patch,
        instead of to a square. For each shape learned positions are resampled from those in `vit`, so that weights must
        not have passed `resample_to_input_size`.
    """

    vit: ViTConfig
    input_size: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    normalize: bool = True
    layers: tuple[int, ...] = (-1,)
    fusion: Literal["sum", "mean", "concat"] = "mean"
    keep_proportions: bool = False

    @property
    def channels(self) -> int:
        """Width C of the latent."""
        return self.vit.blocks.width * (len(self.layers) if self.fusion == "concat" else 1)

    @property
    def grid(self) -> int:
        """Side of the latent grid at `input_size`."""
        return self.input_size // self.vit.patch

    def __call__(self, image: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Encodes images in [0, 1]."""
        return self.encode_with(image, ())[0]

    @nn.compact
    def encode_with(
        self, image: Float[AnyArray, "B H W 3"], targets: tuple[int, ...]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w F"] | None]:
        """Encodes images; the same pass also returns the normalized features of the blocks `targets`, concatenated."""
        blocks, sides = self.vit.blocks, image.shape[1:3]
        if self.input_size is not None:
            size, patch = self.input_size, self.vit.patch
            scaled = (round(n * self.grid / min(sides)) * patch for n in sides)
            image = resize(image, *(scaled if self.keep_proportions else (size, size)), "bicubic")
        image = (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        taps = tuple(layer % blocks.depth for layer in (*self.layers, *targets))
        outputs, (h, w) = ViT(self.vit, name="vit")(image, taps)

        def features(outputs: list[Tokens], affine: bool, name: str) -> list[Float[Array, "B h w D"]]:
            norm = layer_norm(blocks, name, affine)
            return [blocks.shard(norm(tokens)).reshape(len(image), h, w, -1) for tokens in outputs]

        count = len(self.layers)
        latents = features(outputs[:count], not self.normalize, "norm")
        target = jnp.concatenate(features(outputs[count:], False, "target_norm"), axis=-1) if targets else None
        if self.fusion == "concat":
            return jnp.concatenate(latents, axis=-1), target
        return sum(latents) / (count if self.fusion == "mean" else 1), target


def resample_to_input_size(encoder: Encoder, params: Mapping[str, Any]) -> tuple[Encoder, Mapping[str, Any]]:
    """Resamples the stored position grid to that of `input_size` once, in float32, instead of in every call.

    For running frozen weights only: exports and hashes use the weights with the grid of their file.
    """
    vit, grid = encoder.vit, encoder.grid
    if vit.pos == "rope" or grid == vit.grid:
        return encoder, params
    table = np.asarray(resample_positions(vit, jnp.asarray(params["vit"]["pos_embed"]), grid, grid))
    encoder = encoder.clone(vit=dataclasses.replace(vit, grid=grid))
    return encoder, {**params, "vit": {**params["vit"], "pos_embed": table}}


class PooledEncoder(nn.Module):
    """Image to one feature vector, for distances between sets of images; has the parameters of `Encoder`.

    Attributes:
      vit, mean, std: see `Encoder`.
      input_size: side in pixels to which images are resized, bicubic with antialiasing as image processors do it.
      pool: the class token, or the mean of the patch tokens, after the pretrained final LayerNorm.
    """

    vit: ViTConfig
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pool: Literal["cls", "mean"]

    @nn.compact
    def __call__(self, image: Float[AnyArray, "B H W 3"]) -> Float[Array, "B D"]:
        """Returns float32 features of images in [0, 1]."""
        image = resize(image, self.input_size, self.input_size, "bicubic_antialias")
        image = (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        (tokens,), _ = ViT(self.vit, name="vit")(image, (self.vit.blocks.depth - 1,), keep_prefix=True)
        tokens = layer_norm(self.vit.blocks, "norm")(tokens).astype(jnp.float32)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, self.vit.prefix :].mean(1)
