"""VQRAE: image -> frozen encoder -> latent -> quantizer -> codes -> quantized latent -> decoder -> image."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.quantizers.base import Quantized, Quantizer
from vqrae_jax.quantizers.none import NO_CODES


@flax.struct.dataclass
class Output:
    """Everything one pass produces."""

    reconstruction: Any  # Float [B, H, W, 3], not clipped
    latent: Any  # Float [B, h, w, C] (or [B, N, C]): quantized and normalized, what `decode` takes
    quantized: Quantized
    encoded: Any = None  # Float [B, h, w, C]: what the encoder saw, before noise and quantization
    features: Any = None  # Float [B, g, g, F]: the decoder's guess at encoder features, where it has that head


class VQRAE(nn.Module):
    """The tokenizer.

    Images are [B, H, W, 3] floats in [0, 1]. Training mode (train=True) needs the rng streams "noise" (if noise_tau)
    and "codes" (for quantizers that draw), and `mutable=["batch_stats"]`.

    Attributes:
      encoder, quantizer, decoder: the three parts.
      noise_tau: in training, latents get Gaussian noise of sigma = noise_tau * uniform(0, 1), one sigma per image.
      quantize_before_reshape: True: indices are [B, N]; False: [B, h, w].
      reshape_to_2d: True: latents are [B, h, w, C]; False: [B, N, C].
      latent_stats: shapes of the latent mean and variance in `batch_stats/latent`, for example {"var": (16, 16, 768)};
        their values are set by whoever builds the variables. Empty: latents are not normalized.
      stat_eps: added to the variance.
    """

    encoder: Encoder
    quantizer: Quantizer
    decoder: Decoder
    noise_tau: float = 0.0
    quantize_before_reshape: bool = False
    reshape_to_2d: bool = True
    latent_stats: Any = ()
    stat_eps: float = 1e-5

    def setup(self):
        self.latent = LatentNormalization(dict(self.latent_stats), self.stat_eps)

    def __call__(
        self, image: Float[Array, "B H W 3"], train: bool = False, return_loss: bool = False
    ) -> Float[Array, "B H W 3"] | tuple[Float[Array, "B H W 3"], dict[str, Float[Array, ""]]]:
        """Reconstructs; with return_loss also {recon_loss (mean squared error), vq_loss, total_loss}."""
        out = self.forward(image, train)
        if not return_loss:
            return out.reconstruction
        if out.reconstruction.shape != image.shape:
            raise ValueError(
                f"return_loss compares a reconstruction of {out.reconstruction.shape[1:3]} pixels with an image of "
                f"{image.shape[1:3]}: give images of {self.decoder.image_size}x{self.decoder.image_size}"
            )
        recon_loss = jnp.mean((out.reconstruction - image) ** 2)
        vq_loss = out.quantized.loss
        return out.reconstruction, {
            "recon_loss": recon_loss,
            "vq_loss": vq_loss,
            "total_loss": recon_loss + vq_loss,
        }

    def forward(self, image: Float[Array, "B H W 3"], train: bool = False) -> Output:
        """One pass with everything that it produces."""
        encoded = self.encoder(image)
        quantized = self._quantize(encoded, train)
        latent = self._normalize(quantized.z)
        reconstruction, features = self._paint(latent)
        return Output(reconstruction, latent, quantized, encoded, features)

    def encode(self, image: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B h w C"]:
        """The quantized, normalized latent."""
        return self._normalize(self.quantize(image, train).z)

    def decode(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Paints a latent, as `encode` returns it."""
        return self._paint(latent)[0]

    def encode_to_indices(self, image: Float[Array, "B H W 3"]) -> Int[Array, "B h w"]:
        """The codes: [B, h, w], or [B, N] with quantize_before_reshape. ValueError if the model has none."""
        indices = self.quantize(image).indices
        if indices is None:
            raise ValueError(NO_CODES)
        return indices

    def decode_from_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W 3"]:
        """Paints codes: `decode_from_indices(encode_to_indices(x)) == __call__(x)`."""
        return self.decode(self.lookup(indices))

    def lookup(self, indices: Int[Array, "B h w"]) -> Float[Array, "B h w C"]:
        """The latent of codes: `lookup(encode_to_indices(x)) == encode(x)`."""
        return self._normalize(self.quantizer.lookup(indices))

    def quantize(self, image: Float[Array, "B H W 3"], train: bool = False) -> Quantized:
        """Encodes and quantizes; z is [B, h, w, C], or [B, N, C] with quantize_before_reshape."""
        return self._quantize(self.encoder(image), train)

    def _paint(self, latent: Float[Array, "B h w C"]) -> tuple[Float[Array, "B H W 3"], Float[Array, "B g g F"] | None]:
        return self.decoder(self.latent.undo(self._to_grid(latent)), with_features=True)

    def _quantize(self, z: Float[Array, "B h w C"], train: bool) -> Quantized:
        if train and self.noise_tau:
            z = self._noised(z)
        if self.quantize_before_reshape:
            z = z.reshape(len(z), -1, z.shape[-1])
        return self.quantizer(z, train)

    def _noised(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        sigma_key, noise_key = jax.random.split(self.make_rng("noise"))
        sigma = self.noise_tau * jax.random.uniform(sigma_key, (len(z), 1, 1, 1))
        return z + (sigma * jax.random.normal(noise_key, z.shape)).astype(z.dtype)

    def _normalize(self, z: Float[Array, "B *n C"]) -> Float[Array, "B h w C"]:
        latent = self.latent(self._to_grid(z))
        return latent if self.reshape_to_2d else latent.reshape(len(latent), -1, latent.shape[-1])

    def _to_grid(self, z: Float[Array, "B *n C"]) -> Float[Array, "B h w C"]:
        if z.ndim == 4:
            return z
        B, N, C = z.shape
        side = round(N**0.5)
        if side * side != N:
            raise ValueError(f"{N} tokens are no square grid: give the latent as [B, h, w, C]")
        return z.reshape(B, side, side, C)


class LatentNormalization(nn.Module):
    """(z - mean) / sqrt(var + eps) with fixed statistics, per channel or per position and channel; and its inverse."""

    shapes: dict[str, tuple[int, ...]]
    eps: float

    def setup(self):
        initial = {"mean": jnp.zeros, "var": jnp.ones}
        self.stats = {n: self.variable("batch_stats", n, initial[n], shape) for n, shape in self.shapes.items()}

    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        mean, deviation = self._moments()
        return (z - mean) / deviation

    def undo(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        mean, deviation = self._moments()
        return z * deviation + mean

    def _moments(self) -> tuple[jax.Array | float, jax.Array | float]:
        mean = self.stats["mean"].value if "mean" in self.stats else 0.0
        return mean, jnp.sqrt(self.stats["var"].value + self.eps) if "var" in self.stats else 1.0
