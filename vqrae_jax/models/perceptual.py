"""Perceptual distances beside LPIPS: by the tokens of any encoder, and by a ConvNeXt classifier."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.lpips import unit_length


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
