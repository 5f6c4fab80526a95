"""The interface of all quantizers, their return value, and the losses and metrics that they share."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers.arrays import AnyArray, Indices, Mask, Rows, Scalar
from vqrae_jax.quantizers.nearest import find_neighbors, unit
from vqrae_jax.quantizers.statistics import code_counts

MAX_EMBEDDINGS = 2**24  # of a quantizer without a codebook: the counts of all indices must fit into memory
LARGEST = 1e12  # of a latent's values

# Computes the latents from which a codebook starts [N, C], and which rows are finite [N].
Sample = Callable[[], tuple[Rows, Mask]]


@flax.struct.dataclass
class Quantized:
    """The return value of a quantizer."""

    z: Any  # Float [*b, C]: the quantized latent; the quantizer decides which gradient reaches the input
    indices: Any  # Int32 [*b], or [*b, depth] with several indices per latent; None without indices
    loss: Any  # Float []: weighted, to be added to the training loss
    # "counts" Int32 [K] (or [depth, K]): how often each index was chosen in this batch. "nonfinite" Int32 []: latents
    # with NaN, Inf or values beyond LARGEST. "quantization_error" Float []: mean squared error relative to the variance
    # of the latents. Further scalars: integers count events of this step ("revived" embeddings), floats describe it.
    metrics: dict[str, Any]


class Quantizer(nn.Module):
    """Base class of all quantizers: a discrete bottleneck for vectors, independent of images.

    Every quantizer has a field or property `num_embeddings`, the codebook size K, None if it has no indices; and
    `channels` of its latents, except for `NoQuantizer`.

    Laws: `lookup(q(z, train=False).indices) == q(z, train=False).z`, projections included; train=False changes no
    state; NaN and Inf in z (and values beyond LARGEST) are counted in the metrics and change neither state nor loss.

    Trained arrays are in `params`, other state in `batch_stats`; random numbers come from the rng stream "codes".
    """

    has_indices = True  # False: latents stay continuous
    prefixes = ()  # lengths of indices' last axis that `lookup` accepts, if the first levels or scales decode alone

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train=True also updates the state."""
        raise NotImplementedError

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*b C"]:
        """Returns the quantized latents of `indices`, bit for bit the `z` that was returned with them."""
        return self.embeddings()[indices]

    def blend(self, pair: Int[AnyArray, " 2 *b"], weights: Float[AnyArray, " steps"]) -> Int[Array, " steps *b"]:
        """Quantizes weighted means of the latents of two sets of indices; `weights` are those of the second."""
        first, second = self.lookup(pair).astype(jnp.float32)
        column = weights.reshape(-1, *[1] * first.ndim)
        return self((1 - column) * first + column * second).indices

    def change_indices(self, indices: Int[AnyArray, "*b"], key: Key[Array, ""], neighbors: int = 0) -> Int[Array, "*b"]:
        """Returns another index for each, uniformly: of the `neighbors` nearest embeddings, or of all.

        All are possible with neighbors=0. Several indices per latent have their own codebooks.
        """
        neighbors = min(neighbors, self.num_embeddings - 1)
        if not neighbors:
            steps = jax.random.randint(key, indices.shape, 1, max(2, self.num_embeddings))
            return (indices + steps) % self.num_embeddings
        if (points := self.points()) is None:
            message = "needs a quantizer with codes that are near or far; use 0, for which all codes are possible"
            raise ConfigError(message, field="train.code_neighbors", value=neighbors)
        ranks = jax.random.randint(key, (indices.size, 1), 0, neighbors)
        nearest = find_neighbors(points, indices.reshape(-1), neighbors)
        return jnp.take_along_axis(nearest, ranks, axis=1).reshape(indices.shape)

    def points(self) -> Float[Array, "K c"] | None:
        """Returns the embeddings, or the points of a fixed grid, between which codes are near or far; None: unknown."""
        return self.embeddings()

    def embeddings(self) -> Float[Array, "K c"] | None:
        """Returns the (first) codebook that latents are compared with, before any projection; None for a fixed grid."""
        return None

    def fuse(self, z: Float[AnyArray, "*b LC"]) -> Float[AnyArray, "*b C"]:
        """Returns the latents that a learned fusion makes of the encoder's layers; without one, `z`."""
        return z

    def innermost(self) -> "Quantizer":
        """Returns the (first) quantizer that maps single vectors to single indices, inside of all others."""
        return self

    def initialize(self, sample: Sample, count: Int[Array, ""]) -> None:
        """Makes the codebook from `sample`, which has `count` finite latents, unless it is already initialized."""


class Wrapper(Quantizer):
    """Base class of quantizers around another one, their field `quantizer`, or around copies of it."""

    @property
    def num_embeddings(self) -> int | None:
        return self.quantizer.num_embeddings

    @property
    def has_indices(self) -> bool:
        return self.quantizer.has_indices

    @property
    def prefixes(self) -> tuple[int, ...]:
        return self.quantizer.prefixes

    def change_indices(self, indices: Int[AnyArray, "*b"], key: Key[Array, ""], neighbors: int = 0) -> Int[Array, "*b"]:
        return self.quantizer.change_indices(indices, key, neighbors)

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.innermost().embeddings()

    def innermost(self) -> Quantizer:
        return self.quantizer.innermost()


class Mapped(Wrapper):
    """Base class of learned maps in front of a quantizer: indices, and what they blend to, are those inside."""

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*d C"]:
        return self.quantizer.lookup(indices)

    def blend(self, pair: Int[AnyArray, " 2 *b"], weights: Float[AnyArray, " steps"]) -> Int[Array, " steps *b"]:
        return self.quantizer.blend(pair, weights)


def change_each(
    quantizers: Sequence[Quantizer], indices: Int[AnyArray, "*b n"], key: Key[Array, ""], neighbors: int
) -> Int[Array, "*b n"]:
    """Applies `change_indices` of n quantizers to their indices."""
    pairs = enumerate(zip(quantizers, jax.random.split(key, len(quantizers)), strict=True))
    return jnp.stack([part.change_indices(indices[..., i], k, neighbors) for i, (part, k) in pairs], axis=-1)


def flatten(z: Float[AnyArray, "*b C"], channels: int) -> tuple[Rows, Mask]:
    """Returns latents as float32 rows, and which rows are finite; the other rows become zero without gradient.

    Rows with a value beyond LARGEST count as not finite, because sums of squares must be finite.
    """
    if z.shape[-1] != channels:
        raise ValueError(f"the quantizer expects latents of {channels} channels, got shape {z.shape}")
    flat = z.reshape(-1, channels).astype(jnp.float32)
    finite = jnp.all(jnp.abs(flat) <= LARGEST, axis=-1)
    return jnp.where(finite[:, None], flat, 0.0), finite


def check_distance(distance: str) -> None:
    """Raises ConfigError for "dot", by which only IBQ searches."""
    if distance == "dot":
        raise ConfigError("must be 'l2', 'cosine' or 'angle'; only ibq accepts 'dot'", field="distance", value=distance)


def masked_mean(values: Rows, mask: Mask) -> Scalar:
    """Returns the mean over the rows in `mask`; zero if there are no such rows."""
    rows = jnp.mean(values, axis=1)
    return jnp.sum(jnp.where(mask, rows, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def vq_loss(
    flat: Rows, quantized: Rows, mask: Mask, commitment_cost: float, codebook_cost: float = 1.0, distance: str = "l2"
) -> Scalar:
    """Returns codebook plus commitment loss (van den Oord et al. 2017, arXiv:1711.00937, eq. 3), both as means.

    For the distance "angle" the codebook loss is 1 - cosine (dRAE, arXiv:2607.22148).
    """
    fixed = jax.lax.stop_gradient
    if distance == "angle":
        codebook = masked_mean(1 - jnp.sum(unit(fixed(flat)) * unit(quantized), axis=1, keepdims=True), mask)
    else:
        codebook = masked_mean((fixed(flat) - quantized) ** 2, mask)
    return codebook_cost * codebook + commitment_cost * masked_mean((flat - fixed(quantized)) ** 2, mask)


def batch_metrics(flat: Rows, quantized: Rows, indices: Indices, num_embeddings: int, mask: Mask) -> dict[str, Array]:
    """Returns the metrics of a quantizer that replaces each latent by one embedding."""
    flat, quantized = jax.lax.stop_gradient((flat, quantized))
    return {
        "counts": code_counts(indices, num_embeddings, mask),
        "nonfinite": jnp.sum(~mask, dtype=jnp.int32),
        "quantization_error": relative_error(flat, quantized, mask),
    }


def sum_metrics(metrics: list[dict[str, Array]]) -> dict[str, Array]:
    """Returns the sums of "revived" and "starved" over several quantizers; empty if they do not report them."""
    return {name: sum(m[name] for m in metrics) for name in ("revived", "starved") if name in metrics[0]}


def relative_error(flat: Rows, quantized: Rows, mask: Mask) -> Scalar:
    """Returns the mean squared error divided by the variance of the latents (per channel, about the batch mean)."""
    mean = jnp.sum(jnp.where(mask[:, None], flat, 0.0), axis=0) / jnp.maximum(jnp.sum(mask), 1)
    return masked_mean((flat - quantized) ** 2, mask) / jnp.maximum(masked_mean((flat - mean) ** 2, mask), 1e-12)
