"""Perceptual distances beside LPIPS: by the tokens of any encoder, and by a ConvNeXt classifier."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from vqrae_jax.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from vqrae_jax.models.lpips import unit_length
from vqrae_jax.resize import resize


class EncoderDistance(nn.Module):
    """LPIPS without its learned heads, on patch tokens: unit length, difference, square, sum over channels.

    Attributes:
      encoder: with fusion "concat"; the mean over its layers and tokens is the distance, in [0, 4].
    """

    encoder: Encoder

    @nn.compact
    def __call__(self, reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        layers = len(self.encoder.layers)
        ours, theirs = (
            unit_length(latent.reshape(*latent.shape[:3], layers, -1))
            for latent in (self.encoder(reconstruction), self.encoder(image))
        )
        return ((ours - theirs) ** 2).sum(-1).mean((1, 2, 3)).astype(jnp.float32)


class LogitDistance(nn.Module):
    """Mean squared difference of a classifier's logits, as one-dimensional tokenizers use it (arXiv:2406.07550).

    Attributes:
      input_size: side in pixels to which pictures are resized bilinearly.
    """

    classifier: ConvNeXtConfig
    input_size: int = 224

    @nn.compact
    def __call__(self, reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        network = ConvNeXt(self.classifier, name="classifier")
        ours, theirs = (network(self._seen(x)) for x in (reconstruction, image))
        return ((ours - theirs) ** 2).mean(-1)

    def _seen(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B S S 3"]:
        image = resize(image, self.input_size, self.input_size, "bilinear")
        return (image - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
