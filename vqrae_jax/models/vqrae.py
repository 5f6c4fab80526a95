"""VQRAE, the tokenizer: image -> frozen encoder -> latent -> quantizer -> quantized latent -> decoder -> image."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.resampler import replace_blocks
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantized, Quantizer
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.none import NO_CODES

Images = Float[AnyArray, "B H W 3"]
Reconstructions = Float[Array, "B Y X 3"]
Latents = Float[AnyArray, "B ... C"]  # a grid h, w, or N tokens


@flax.struct.dataclass
class Output:
    """Everything that one forward pass computes."""

    reconstruction: Any  # Float [B, S, S, 3], not clipped
    latent: Any  # Float [B, h, w, C] or [B, N, C]: quantized and normalized, the input of `decode`
    quantized: Quantized
    encoded: Any = None  # Float [B, h, w, C]: the encoder's output, before noise and quantization
    features: Any = None  # Float [B, g, g, F]: the decoder's prediction of encoder features, if it has that head
    target: Any = None  # Float [B, h, w, F]: the encoder features that `forward` was asked for


class VQRAE(nn.Module):
    """The tokenizer.

    Images are [B, H, W, 3] floats in [0, 1]. Training mode (train=True) needs the rng streams "noise" (with noise_tau
    or code_noise) and "codes" (for stochastic quantizers), and `mutable=["batch_stats"]`.

    Attributes:
      encoder, quantizer, decoder: the three parts.
      noise_tau: in training, latents get Gaussian noise of sigma = noise_tau * uniform(0, 1), one sigma per image.
      quantize_before_reshape: True: indices are [B, N]; False: [B, h, w].
      reshape_to_2d: True: latents are [B, h, w, C]; False: [B, N, C].
      latent_stats: shapes of the latent mean and variance in `batch_stats/latent`, for example {"var": (16, 16, 768)};
        `build.tokenizer.initial_variables` sets their values. Empty: latents are not normalized.
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

    def __new__(cls, *args: Any, **attributes: Any):
        """Refuses names of config fields, such as encoder_cls of the PyTorch VQRAE."""
        if unknown := attributes.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise TypeError(
                f"{cls.__name__} is a Linen module and has no attributes {', '.join(sorted(unknown))}; "
                "Tokenizer.from_config(ModelConfig(encoder_cls=..., num_embeddings=...)) builds a model from a config"
            )
        return super().__new__(cls)

    @property
    def code_grid(self) -> int:
        """Side of the grid of codes; 0 if they are tokens that are free of the grid."""
        return 0 if self.decoder.tokens else self.encoder.grid

    def setup(self):
        self.latent = LatentNormalization(dict(self.latent_stats), self.stat_eps)

    def __call__(
        self, image: Images, train: bool = False, return_loss: bool = False
    ) -> Reconstructions | tuple[Reconstructions, dict[str, Float[Array, ""]]]:
        """Reconstructs images; return_loss adds recon_loss (mean squared error), vq_loss and total_loss."""
        out = self.forward(image, train)
        if not return_loss:
            return out.reconstruction
        if out.reconstruction.shape != image.shape:
            size = self.decoder.image_size
            raise ValueError(
                f"return_loss needs images of {size}x{size} pixels, the size of the reconstruction; "
                f"got {image.shape[1]}x{image.shape[2]}"
            )
        recon_loss, vq_loss = jnp.mean((out.reconstruction - image) ** 2), out.quantized.loss
        losses = {"recon_loss": recon_loss, "vq_loss": vq_loss, "total_loss": recon_loss + vq_loss}
        return out.reconstruction, losses

    def forward(
        self, image: Images, train: bool = False, code_noise: float = 0.0, code_neighbors: int = 0,
        targets: tuple[int, ...] = (),
    ) -> Output:  # fmt: skip
        """Runs all parts and returns everything that they compute.

        With code_noise the decoder gets other codes for a part of each image, see `replace_codes`, while `quantized`
        has the true ones. `targets`: blocks of the encoder whose normalized features are returned as well.
        """
        encoded, target = self.encoder.encode_with(image, targets)
        return self.forward_encoded(encoded, train, code_noise, code_neighbors).replace(target=target)

    def forward_encoded(
        self, encoded: Float[AnyArray, "B h w C"], train: bool = False, code_noise: float = 0.0, code_neighbors: int = 0
    ) -> Output:
        """Runs all parts but the encoder on its output, see `forward`."""
        quantized = self.quantize(encoded, train)
        z = self.replace_codes(quantized, code_noise, code_neighbors) if code_noise else quantized.z
        latent, present = self.normalize(z), None
        if train and self.decoder.tokens and self.quantizer.prefixes:
            present = quantized.indices.reshape(*z.shape[:2], -1)[..., 0] >= 0  # the others are left out
        reconstruction, features = self.decode(latent, with_features=True, present=present)
        return Output(reconstruction, latent, quantized, encoded, features)

    def encode(self, image: Images) -> Latents:
        """Returns quantized, normalized latents."""
        return self.normalize(self.quantize(self.encoder(image)).z)

    def encode_to_indices(self, image: Images) -> Int[Array, "B ..."]:
        """Returns indices [B, h, w], or [B, N] with quantize_before_reshape; residual quantizers add an axis.

        Raises:
          ValueError: the model has no quantizer.
        """
        indices = self.quantize(self.encoder(image)).indices
        if indices is None:
            raise ValueError(NO_CODES)
        return indices

    def decode_from_indices(self, indices: Int[Array, "B ..."]) -> Reconstructions:
        """Decodes indices: `decode_from_indices(encode_to_indices(x)) == __call__(x)`."""
        return self.decode(self.lookup(indices))

    def lookup(self, indices: Int[Array, "B ..."]) -> Latents:
        """Returns the latents of indices: `lookup(encode_to_indices(x)) == encode(x)`."""
        return self.normalize(self.quantizer.lookup(indices))

    def quantize(self, z: Float[Array, "B h w C"], train: bool = False) -> Quantized:
        """Quantizes encoded images; `z` of the result is [B, h, w, C], or [B, N, C] with quantize_before_reshape."""
        if train and self.noise_tau:
            z = self._add_noise(z)
        if self.quantize_before_reshape:
            z = z.reshape(len(z), -1, z.shape[-1])
        return self.quantizer(z, train)

    def replace_codes(self, quantized: Quantized, largest_share: float, neighbors: int = 0) -> Latents:
        """Returns latents of which some indices are replaced, as by a generator's errors; their gradient is unchanged.

        Every image has a share of replaced indices, uniform from 0 to `largest_share` and rounded down to whole ones;
        `Quantizer.change_indices` chooses the codes (latent perturbation: Qiu et al. 2025, arXiv:2503.08354).
        """
        indices = quantized.indices
        share_key, order_key, code_key = jax.random.split(self.make_rng("noise"), 3)
        order = jax.random.uniform(order_key, (len(indices), indices[0].size))
        count = largest_share * jax.random.uniform(share_key, (len(order), 1)) * order.shape[1]
        replaced = order < jnp.take_along_axis(jnp.sort(order), count.astype(jnp.int32), axis=1)
        replaced = replaced.reshape(indices.shape) & (indices >= 0)  # -1: a level that is left out
        sampled = self.quantizer.change_indices(indices, code_key, neighbors)
        # A codebook that trains is looked up after the update of this step.
        return value_of(self.quantizer.lookup(jnp.where(replaced, sampled, indices)), quantized.z)

    def normalize(self, z: Latents) -> Latents:
        """Normalizes quantized latents by the latent statistics, in the shape that `decode` takes."""
        latent = self.latent(self._to_grid(z))
        return latent if self.reshape_to_2d else latent.reshape(len(latent), -1, latent.shape[-1])

    def decode(
        self, latent: Latents, with_features: bool = False, present: Bool[Array, "B N"] | None = None
    ) -> Reconstructions | tuple[Reconstructions, Float[Array, "B _ _ F"] | None]:
        """Decodes latents, as `encode` returns them, to images; see `Decoder`."""
        return self.decoder(self.latent.undo(self._to_grid(latent)), with_features, present)

    @nn.nowrap
    def replace_blocks(self, **fields: Any) -> "VQRAE":
        """Returns a copy whose encoder and resampler have other settings of their blocks, see `BlocksConfig`."""
        vit = self.encoder.vit
        vit = dataclasses.replace(vit, blocks=dataclasses.replace(vit.blocks, **fields))
        return self.clone(encoder=self.encoder.clone(vit=vit), quantizer=replace_blocks(self.quantizer, **fields))

    @nn.nowrap
    def _to_grid(self, z: Latents) -> Latents:
        if z.ndim == 4 or self.decoder.tokens:
            return z
        B, N, C = z.shape
        side = round(N**0.5)
        if side * side != N:
            raise ValueError(f"{N} tokens are not a square grid: pass the latent as [B, h, w, C]")
        return z.reshape(B, side, side, C)

    def _add_noise(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        sigma_key, noise_key = jax.random.split(self.make_rng("noise"))
        sigma = self.noise_tau * jax.random.uniform(sigma_key, (len(z), 1, 1, 1))
        return z + (sigma * jax.random.normal(noise_key, z.shape)).astype(z.dtype)


class LatentNormalization(nn.Module):
    """(z - mean) / sqrt(var + eps) with fixed statistics, per channel or per position and channel; and its inverse."""

    shapes: dict[str, tuple[int, ...]]
    eps: float

    def setup(self):
        initial = {"mean": jnp.zeros, "var": jnp.ones}
        self.stats = {n: self.variable("batch_stats", n, initial[n], shape) for n, shape in self.shapes.items()}

    def __call__(self, z: Latents) -> Latents:
        mean, deviation = self._moments()
        return (z - mean) / deviation

    def undo(self, z: Latents) -> Latents:
        """Inverts the normalization."""
        mean, deviation = self._moments()
        return z * deviation + mean

    def _moments(self) -> tuple[AnyArray | float, AnyArray | float]:
        mean = self.stats["mean"].value if "mean" in self.stats else 0.0
        return mean, jnp.sqrt(self.stats["var"].value + self.eps) if "var" in self.stats else 1.0
