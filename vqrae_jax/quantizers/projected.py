"""A quantizer between two learned linear maps, so that its embeddings have fewer channels than the latents."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantized, Quantizer, Wrapper, flatten


class Projected(Wrapper):
    """Low-dimensional embeddings use the codebook better (Yu et al. 2021, arXiv:2110.04627, "factorized codes").

    `params`: project_in, project_out. The variables of the inner quantizer are under `quantizer`.
    """

    quantizer: Quantizer  # for latents of `dim` channels
    channels: int  # of the latents outside
    dim: registry.CodebookDim

    def setup(self):
        self.project_in = nn.Dense(self.dim, precision=jax.lax.Precision.HIGHEST)
        self.project_out = nn.Dense(self.channels, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        # NaN bypasses the projection: inside, it would reach the gradient of the kernel.
        inside = jnp.where(finite[:, None], self.project_in(flat), jnp.nan)
        out = self.quantizer(inside.reshape(*z.shape[:-1], self.dim), train)
        return out.replace(z=self.project_out(out.z))

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*d C"]:
        return self.project_out(self.quantizer.lookup(indices))


registry.WRAPPERS["codebook_dim"] = Projected
