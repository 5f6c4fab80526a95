"""LPIPS: how different two pictures look (Zhang et al. 2018, arXiv:1801.03924), with the VGG16 trunk, version 0.1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.vit import matmul_precision

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions; a tap after each
# ImageNet's mean and deviation as LPIPS has them, for pictures in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015): the feature maps after each of its five stages."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        taps = []
        for stage, (channels, convolutions) in enumerate(STAGES):
            if stage:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(convolutions):
                conv = nn.Conv(
                    channels, (3, 3), padding=1, dtype=self.dtype, precision=matmul_precision(self.dtype),
                    name=f"conv{stage + 1}_{i + 1}",
                )  # fmt: skip
                x = nn.relu(conv(x))
            taps.append(x)
        return taps


class LPIPS(nn.Module):
    """Perceptual distance of two batches of pictures in [0, 1], sides of at least 16 pixels.

    The features of each stage, unit length per position, are subtracted and squared; a linear head of non-negative
    weights sums the channels, the mean over positions and the sum over stages is the distance.

    Attributes:
      dtype: of the trunk; lengths and heads are float32 always.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        trunk = VGG16(self.dtype, name="trunk")
        # One pass over each: the image's features need no gradient and are not kept for one.
        ours, theirs = (trunk((2 * x - 1 - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)) for x in (reconstruction, image))
        distance = jnp.zeros(len(image))
        for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            head = self.param(f"head{stage}", nn.initializers.constant(1 / a.shape[-1]), (a.shape[-1],))
            difference = (unit_length(a) - unit_length(b)) ** 2
            weighted = jnp.einsum("bhwc,c->bhw", difference, head, precision=jax.lax.Precision.HIGHEST)
            distance += weighted.mean((1, 2))
        return distance


def unit_length(x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """Vectors of length one, in float32; zero stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-20))
    return x / (length + 1e-10)
