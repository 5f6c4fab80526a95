"""No quantizer: the continuous representation autoencoder (RAE, Zheng et al. 2025, arXiv:2510.11690)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer

NO_CODES = "this model is a continuous autoencoder (quantizer='none') and has no codes: use encode and decode"


class NoQuantizer(Quantizer):
    """Passes latents on as they are: the loss is zero, and `indices` and the code counts do not exist."""

    has_indices = False
    num_embeddings = None

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        return Quantized(z=z, indices=None, loss=jnp.zeros(()), metrics={})

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """Raises ValueError: there is nothing to look up."""
        raise ValueError(NO_CODES)
