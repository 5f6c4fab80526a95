"""A quantizer in a space of its own: a learned linear map in, codes there, a learned linear map out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten


class Projected(Quantizer):
    """Low-dimensional codes use the codebook better (Yu et al. 2021, arXiv:2110.04627, "factorized codes").

    `params`: project_in, project_out. The quantizer's own variables are under `quantizer`.

    Attributes:
      quantizer: takes latents of `dim` channels.
      channels: C of the latents outside.
      dim: channels inside.
    """

    quantizer: Quantizer
    channels: int
    dim: int

    def setup(self):
        self.project_in = nn.Dense(self.dim, precision=jax.lax.Precision.HIGHEST)
        self.project_out = nn.Dense(self.channels, precision=jax.lax.Precision.HIGHEST)

    @property
    def num_embeddings(self) -> int:
        return self.quantizer.num_embeddings

    @property
    def decodes_prefixes(self) -> bool:
        return self.quantizer.decodes_prefixes

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; loss and metrics are the inner quantizer's."""
        flat, finite = flatten(z, self.channels)
        # NaN goes around the projection, not through it: inside, it would reach the gradient of the kernel.
        inside = jnp.where(finite[:, None], self.project_in(flat), jnp.nan)
        out = self.quantizer(inside.reshape(*z.shape[:-1], self.dim), train)
        return out.replace(z=self.project_out(out.z))

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The projected codes of `indices`."""
        return self.project_out(self.quantizer.lookup(indices))

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.quantizer.embeddings()
