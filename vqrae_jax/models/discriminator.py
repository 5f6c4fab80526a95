"""Discriminators between images and reconstructions: heads on a frozen DINO ViT, or a PatchGAN."""

import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from vqrae_jax.models.vit import ViT, ViTConfig, matmul_precision
from vqrae_jax.resize import resize

Norm = Literal["batch", "group"]
SPECTRAL = "spectral"  # collection of the vectors of the power iteration


class SpectralConv(nn.Module):
    """A convolution whose kernel is divided by its largest singular value (Miyato et al. 2018, arXiv:1802.05957).

    Each call with train=True makes one step of the power iteration, which needs the collection "spectral" to be
    mutable: `u` [features] and `v` [inputs of one output]. Other calls use the stored vectors.
    """

    features: int
    window: tuple[int, ...]  # sides of the kernel, one (over [B, N, C]) or two (over [B, H, W, C])
    stride: int = 1
    circular: bool = False  # pads by wrapping around; otherwise with zeros. Only the stride changes the sides
    spectral: bool = True  # False does not normalize the kernel
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B *n C"], train: bool = False) -> Float[Array, "B *m F"]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.spectral:
            kernel = kernel / self._largest_singular_value(kernel.reshape(-1, self.features), train)
        pads = [(0, 0), *((side // 2, (side - 1) // 2) for side in self.window), (0, 0)]
        x = jnp.pad(x.astype(self.dtype), pads, mode="wrap" if self.circular else "constant")
        axes = ("NHC", "HIO", "NHC") if len(self.window) == 1 else ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (self.stride,) * len(self.window), "VALID", dimension_numbers=axes,
            precision=matmul_precision(self.dtype),
        )  # fmt: skip
        return y + bias.astype(self.dtype)

    def _largest_singular_value(self, matrix: Float[Array, "M F"], train: bool) -> Float[Array, ""]:
        def initialize(length: int) -> jax.Array:
            return unit(jax.random.normal(self.make_rng("params"), (length,)))

        u = self.variable(SPECTRAL, "u", initialize, matrix.shape[1])
        v = self.variable(SPECTRAL, "v", initialize, matrix.shape[0])
        dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
        if train and not self.is_initializing():
            fixed = jax.lax.stop_gradient(matrix)
            v.value = unit(dot(fixed, u.value))
            u.value = unit(dot(v.value, fixed))
        return dot(dot(v.value, matrix), u.value)


def unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Scales a vector to unit length."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class ConvNormAct(nn.Module):
    """Convolution, normalization, leaky ReLU.

    The norm "batch" is per channel, "group" per 32 groups of channels. Both normalize every image by itself, so that
    its logits do not depend on the batch or its sharding.
    """

    features: int
    window: tuple[int, ...]
    stride: int = 1
    circular: bool = False
    spectral: bool = True
    norm: Norm = "batch"
    norm_eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B *n C"], train: bool = False) -> Float[Array, "B *m F"]:
        options = self.stride, self.circular, self.spectral, self.dtype
        x = SpectralConv(self.features, self.window, *options, name="conv")(x, train)
        groups = self.features if self.norm == "batch" else math.gcd(32, self.features)
        x = nn.GroupNorm(groups, epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
        return nn.leaky_relu(x, 0.2)


class Head(nn.Module):
    """Head from the tokens of one block to one logit per token (Sauer et al. 2023, arXiv:2301.09515)."""

    window: int
    spectral: bool
    norm: Norm
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], train: bool = False) -> Float[Array, "B N"]:
        width, rest = x.shape[-1], (self.spectral, self.norm, self.norm_eps, self.dtype)
        x = ConvNormAct(width, (1,), 1, True, *rest, name="narrow")(x, train)
        x = (x + ConvNormAct(width, (self.window,), 1, True, *rest, name="wide")(x, train)) / math.sqrt(2)
        return SpectralConv(1, (1,), spectral=self.spectral, dtype=self.dtype, name="conv_out")(x, train)[..., 0]


class DinoDiscriminator(nn.Module):
    """Heads on several blocks of a frozen DINO ViT; only the heads train, the trunk is `params/trunk`."""

    trunk: ViTConfig  # images are resized bilinearly to its training resolution
    taps: tuple[int, ...] = (2, 5, 8, 11)  # blocks with a head, in addition to the last one, which has the first head
    window: int = 9  # width of the heads' middle convolution, in tokens
    norm: Norm = "batch"
    norm_eps: float = 1e-6
    spectral: bool = True

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B M"]:
        """Returns float32 logits of images in [0, 1]; positive means real."""
        blocks = self.trunk.blocks
        side = self.trunk.grid * self.trunk.patch
        image = resize(image, side, side, "bilinear")
        image = (image - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        outputs, _ = ViT(self.trunk, name="trunk")(image, (blocks.depth - 1, *self.taps))
        logits = [
            Head(self.window, self.spectral, self.norm, self.norm_eps, blocks.dtype, name=f"head{i}")(tokens, train)
            for i, tokens in enumerate(outputs)
        ]
        return jnp.concatenate(logits, axis=1).astype(jnp.float32)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004): a convolutional network, one logit per overlapping patch."""

    width: int = 64  # channels after the first convolution; each further one doubles them, up to eightfold
    layers: int = 3  # number of convolutions of stride two
    norm: Norm = "group"
    norm_eps: float = 1e-6
    spectral: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B M"]:
        """Returns float32 logits of images in [0, 1]; positive means real."""
        rest = {"spectral": self.spectral, "dtype": self.dtype}
        x = SpectralConv(self.width, (4, 4), 2, **rest, name="conv_in")(2 * image - 1, train)
        x = nn.leaky_relu(x, 0.2)
        for i in range(1, self.layers + 1):
            block = ConvNormAct(
                self.width * min(2**i, 8), (4, 4), 2 if i < self.layers else 1, norm=self.norm, norm_eps=self.norm_eps,
                **rest, name=f"layer{i}",
            )  # fmt: skip
            x = block(x, train)
        x = SpectralConv(1, (4, 4), **rest, name="conv_out")(x, train)
        return x.reshape(len(x), -1).astype(jnp.float32)
