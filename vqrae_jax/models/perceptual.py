"""Perceptual distances of images: LPIPS (Zhang et al. 2018, arXiv:1801.03924), and by the tokens of any encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.losses.reconstruction import gram_distance
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.vit import matmul_precision
from vqrae_jax.quantizers.arrays import AnyArray

Images = Float[AnyArray, "B H W 3"]
Distances = Float[Array, " B"]

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions
# Mean and standard deviation of ImageNet as LPIPS defines them, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015); returns the feature maps after each of its five stages."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Images) -> list[Float[Array, "B _ _ _"]]:
        features = []
        for stage, (channels, convolutions) in enumerate(STAGES):
            if stage:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(convolutions):
                conv = nn.Conv(
                    channels, (3, 3), padding=1, dtype=self.dtype, precision=matmul_precision(self.dtype),
                    name=f"conv{stage + 1}_{i + 1}",
                )  # fmt: skip
                x = nn.relu(conv(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """LPIPS 0.1 with the VGG16 trunk, for images in [0, 1] with sides of at least 16 pixels.

    The features of each stage are scaled to unit length per position, subtracted and squared; a linear head of
    non-negative weights sums the channels. The distance is the mean over positions, summed over stages. `with_gram`
    also returns the mean of `gram_distance` over the stages.
    """

    dtype: str = "float32"  # of the trunk; lengths and heads are always float32

    @nn.compact
    def __call__(
        self, reconstruction: Images, image: Images, with_gram: bool = False
    ) -> Distances | tuple[Distances, Distances]:
        trunk = VGG16(self.dtype, name="trunk")
        # Two passes: the features of the image need no gradient and are not stored for one.
        pair = (trunk((2 * x - 1 - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)) for x in (reconstruction, image))
        distance = gram = jnp.zeros(len(image))
        for stage, (a, b) in enumerate(zip(*pair, strict=True)):
            head = self.param(f"head{stage}", nn.initializers.constant(1 / a.shape[-1]), (a.shape[-1],))
            a, b = unit_length(a), unit_length(b)
            weighted = jnp.einsum("bhwc,c->bhw", (a - b) ** 2, head, precision=jax.lax.Precision.HIGHEST)
            distance += weighted.mean((1, 2))
            if with_gram:
                gram += gram_distance(a, b) / len(STAGES)
        return (distance, gram) if with_gram else distance


class EncoderDistance(nn.Module):
    """LPIPS without learned heads: the mean over layers and patch tokens of an encoder; in [0, 4].

    `with_gram` also returns the mean of `gram_distance` over the layers.
    """

    encoder: Encoder  # with fusion "concat"

    @nn.compact
    def __call__(
        self, reconstruction: Images, image: Images, with_gram: bool = False
    ) -> Distances | tuple[Distances, Distances]:
        layers = len(self.encoder.layers)
        latents = (self.encoder(x) for x in (reconstruction, image))
        a, b = (unit_length(latent.reshape(*latent.shape[:3], layers, -1)) for latent in latents)
        distance = ((a - b) ** 2).sum(-1).mean((1, 2, 3)).astype(jnp.float32)
        return (distance, gram_distance(a, b).mean(-1)) if with_gram else distance


def unit_length(x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """Scales vectors to unit length, in float32; zero stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-20))
    return x / (length + 1e-10)
