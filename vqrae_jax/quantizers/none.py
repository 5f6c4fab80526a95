"""No quantizer: the continuous representation autoencoder (RAE, Zheng et al. 2025, arXiv:2510.11690)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantized, Quantizer

NO_CODES = "this model is a continuous autoencoder (quantizer='none') without codes; use encode and decode"


class NoQuantizer(Quantizer):
    """Returns latents unchanged, with a loss of zero, without indices and metrics."""

    has_indices = False
    num_embeddings = None

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        return Quantized(z=z, indices=None, loss=jnp.zeros(()), metrics={})

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*b C"]:
        raise ValueError(NO_CODES)


registry.register(
    "none", NoQuantizer, "Zheng et al. 2025, arXiv:2510.11690", "the continuous autoencoder RAE, without indices",
    build=lambda context: NoQuantizer(), wrappers=(),
)  # fmt: skip
