"""What every quantizer is: its return value, its protocol, and the few formulas that all of them share."""

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Quantized:
    """The one return value of a quantizer."""

    z: Any  # Float [*b, C]: the quantized latent, straight-through for gradients
    indices: Any  # Int32 [*b], or [*b, depth] where one latent has several codes
    loss: Any  # Float []: weighted, to be added to the training loss
    metrics: dict[str, Any]  # "counts" Int32 [K]: how often each code was chosen in this batch; further scalars


class Quantizer(Protocol):
    """A discrete bottleneck; knows nothing of images.

    Law: `lookup(q(z, train=False).indices) == q(z, train=False).z`, projections included.
    """

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized: ...

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]: ...


def straight_through(z: Float[Array, "*b C"], quantized: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """The value of `quantized`, exactly, with the gradient passed to z unchanged (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(quantized) + (z - jax.lax.stop_gradient(z))


def code_counts(indices: Int[Array, "*b"], num_embeddings: int) -> Int[Array, " K"]:
    """How often each code occurs."""
    flat = indices.reshape(-1)
    return jax.ops.segment_sum(jnp.ones_like(flat), flat, num_embeddings)


def vq_loss(z: Float[Array, "*b C"], quantized: Float[Array, "*b C"], commitment_cost: float) -> Float[Array, ""]:
    """Codebook plus commitment loss (van den Oord et al. 2017, arXiv:1711.00937, eq. 3), both as means."""
    codebook = jnp.mean((jax.lax.stop_gradient(z) - quantized) ** 2)
    commitment = jnp.mean((z - jax.lax.stop_gradient(quantized)) ** 2)
    return codebook + commitment_cost * commitment
