"""Lookup-free quantization (Yu et al. 2023, arXiv:2310.05737); spherical: BSQ (Zhao et al. 2024, arXiv:2406.07548)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.base import MAX_CODES, Quantized, Quantizer, flatten, health, kept_mean
from vqrae_jax.quantizers.entropy import entropies
from vqrae_jax.quantizers.estimators import straight_through
from vqrae_jax.quantizers.nearest import unit

MAX_BITS = MAX_CODES.bit_length() - 1


class LFQ(Quantizer):
    """One bit per channel, its sign; 2^C codes without a codebook. Zero counts as negative.

    The first channel is the most significant bit of the index. The gradient is straight-through.

    Attributes:
      channels: C, the number of bits, at most 24.
      commitment_cost: weight of mean |z - code|^2.
      entropy_cost: weight of (mean entropy of a latent's soft code) - diversity * (entropy of the mean soft code).
      diversity: weight of the second entropy in it.
      temperature: of the soft codes, softmax of -|z - code|^2 / temperature. Their bits are independent, so the first
        entropy is exact as a sum over bits.
      group: bits whose joint distribution over the batch is taken exactly (2^group probabilities per latent) for the
        second entropy; the groups' entropies are added, as BSQ does with groups of one bit.
      spherical: BSQ: latents are brought to unit length, codes are the corners of the cube inside the unit sphere.
    """

    channels: int
    commitment_cost: float = 0.25
    entropy_cost: float = 0.1
    diversity: float = 1.0
    temperature: float = 1.0
    group: int = 8
    spherical: bool = False

    def __post_init__(self):
        if not 1 <= self.channels <= MAX_BITS:
            raise ValueError(f"channels={self.channels}: lookup-free codes have 1 to {MAX_BITS} bits")
        super().__post_init__()

    @property
    def num_embeddings(self) -> int:
        """K = 2^C."""
        return 2**self.channels

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train makes no difference."""
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.spherical else flat
        bits = flat > 0
        indices = jnp.sum(bits * self._basis(), axis=-1, dtype=jnp.int32)
        codes = jnp.where(bits, self._size(), -self._size())
        commitment = kept_mean((flat - codes) ** 2, finite)
        certainty, spread = self._entropies(flat, finite)
        return Quantized(
            z=straight_through(flat, codes).reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=self.commitment_cost * commitment + self.entropy_cost * (certainty - self.diversity * spread),
            metrics=health(flat, codes, indices, self.num_embeddings, finite)
            | {"entropy": jax.lax.stop_gradient(certainty), "batch_entropy": jax.lax.stop_gradient(spread)},
        )

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The corners that `indices` number."""
        bits = indices[..., None] // self._basis() % 2 == 1
        return jnp.where(bits, self._size(), -self._size())

    def _entropies(
        self, flat: Float[Array, "N C"], finite: Bool[Array, " N"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Of a latent's soft code and of the batch's mean soft code, in nats."""
        # |z + a|^2 - |z - a|^2 = 4 a z for the two values of one bit.
        on = jax.nn.sigmoid(4 * self._size() * flat / self.temperature)
        certainty, spread = 0.0, 0.0
        for start in range(0, self.channels, self.group):
            part = on[:, start : start + self.group]
            joint = jnp.ones((len(flat), 1))
            for i in range(part.shape[1]):
                p = part[:, i, None, None]
                joint = (joint[..., None] * jnp.concatenate([1 - p, p], axis=-1)).reshape(len(flat), -1)
            row, mean = entropies(joint, finite)
            certainty, spread = certainty + row, spread + mean
        return certainty, spread

    def _size(self) -> float:
        return 1 / math.sqrt(self.channels) if self.spherical else 1.0

    def _basis(self) -> Int[np.ndarray, " C"]:
        return 2 ** np.arange(self.channels - 1, -1, -1, dtype=np.int32)
