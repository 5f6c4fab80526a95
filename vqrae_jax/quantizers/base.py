"""What every quantizer is: its return value, its protocol, and what all of them do with the latents they are given."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.statistics import code_counts

MAX_CODES = 2**24  # of a quantizer without a codebook; beyond it the counts of all codes no longer fit


@flax.struct.dataclass
class Quantized:
    """The one return value of a quantizer."""

    z: Any  # Float [*b, C]: the quantized latent; what gradient reaches the input is the quantizer's choice
    indices: Any  # Int32 [*b], or [*b, depth] where one latent has several codes
    loss: Any  # Float []: weighted, to be added to the training loss
    # "counts" Int32 [K] (or [depth, K]): how often each code was chosen in this batch. "nonfinite" Int32 []: latents
    # with NaN or Inf. "quantization_error" Float []: mean squared error relative to the variance of the latents.
    # Further scalars: integers count events of this step ("revived" codes), floats describe it.
    metrics: dict[str, Any]


# Computes the latents that a codebook starts from, and which of them are finite.
Sample = Callable[[], tuple[Float[Array, "N C"], Bool[Array, " N"]]]


class Quantizer(nn.Module):
    """Base class of all quantizers: a discrete bottleneck for vectors, independent of images.

    Every quantizer has the attribute or property `num_embeddings`, the codebook size K, or None without indices.

    Laws: `lookup(q(z, train=False).indices) == q(z, train=False).z`, projections included; train=False changes no
    state; NaN and Inf in z are counted in the metrics and change neither state nor loss.

    Trained arrays are in `params`, other state in `batch_stats`; random numbers come from the rng stream "codes".
    """

    has_indices = True  # False: latents stay continuous
    decodes_prefixes = False  # True: `lookup` also accepts the first levels or scales alone

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True also updates the state."""
        raise NotImplementedError

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """Returns the quantized latents of `indices`, equal to `z` of the call that returned them."""
        raise NotImplementedError

    def embeddings(self) -> Float[Array, "K c"] | None:
        """Returns the codebook as latents are compared with it, without projections; None for a fixed grid.

        Of several codebooks it returns the first.
        """
        return None

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        """Makes the codebook from `sample`, which has `count` finite latents, unless it is already initialized."""


def flatten(z: Float[Array, "*b C"], channels: int) -> tuple[Float[Array, "N C"], Bool[Array, " N"]]:
    """Latents as float32 rows, and which of them are finite; the others become zero and receive no gradient.

    Raises:
      ValueError: the last axis of z has not the length `channels`.
    """
    if z.shape[-1] != channels:
        raise ValueError(f"the quantizer takes latents of {channels} channels, got shape {z.shape}")
    flat = z.reshape(-1, channels).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(flat), axis=-1)
    return jnp.where(finite[:, None], flat, 0.0), finite


def kept_mean(values: Float[Array, "N C"], keep: Bool[Array, " N"]) -> Float[Array, ""]:
    """The mean over the rows that `keep` marks; zero where there is none."""
    rows = jnp.mean(values, axis=1)
    return jnp.sum(jnp.where(keep, rows, 0.0)) / jnp.maximum(jnp.sum(keep), 1)


def vq_loss(
    flat: Float[Array, "N C"], codes: Float[Array, "N C"], keep: Bool[Array, " N"], commitment_cost: float
) -> Float[Array, ""]:
    """Codebook plus commitment loss (van den Oord et al. 2017, arXiv:1711.00937, eq. 3), both as means."""
    codebook = kept_mean((jax.lax.stop_gradient(flat) - codes) ** 2, keep)
    commitment = kept_mean((flat - jax.lax.stop_gradient(codes)) ** 2, keep)
    return codebook + commitment_cost * commitment


def health(
    flat: Float[Array, "N C"],
    codes: Float[Array, "N C"],
    indices: Int[Array, " N"],
    num_embeddings: int,
    keep: Bool[Array, " N"],
) -> dict[str, Array]:
    """The metrics of every quantizer that replaces a latent by one code."""
    flat, codes = jax.lax.stop_gradient((flat, codes))
    return {
        "counts": code_counts(indices, num_embeddings, keep),
        "nonfinite": jnp.sum(~keep, dtype=jnp.int32),
        "quantization_error": relative_error(flat, codes, keep),
    }


def relative_error(flat: Float[Array, "N C"], codes: Float[Array, "N C"], keep: Bool[Array, " N"]) -> Float[Array, ""]:
    """Mean squared error as a share of the variance of the latents (per channel, about the batch's mean)."""
    mean = jnp.sum(jnp.where(keep[:, None], flat, 0.0), axis=0) / jnp.maximum(jnp.sum(keep), 1)
    return kept_mean((flat - codes) ** 2, keep) / jnp.maximum(kept_mean((flat - mean) ** 2, keep), 1e-12)
