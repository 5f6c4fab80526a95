"""Lookup-free quantization (Yu et al. 2023, arXiv:2310.05737); spherical: BSQ (Zhao et al. 2024, arXiv:2406.07548)."""

import functools
import itertools
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Mask, Rows, Scalar
from vqrae_jax.quantizers.base import MAX_EMBEDDINGS, Quantized, Quantizer, batch_metrics, flatten, masked_mean
from vqrae_jax.quantizers.codebook_losses import entropies
from vqrae_jax.quantizers.estimators import straight_through
from vqrae_jax.quantizers.nearest import unit
from vqrae_jax.quantizers.wrappers import Projected

MAX_BITS = MAX_EMBEDDINGS.bit_length() - 1


class LFQ(Quantizer):
    """One bit per channel, its sign: K = 2^C corners of a cube without a codebook. Zero counts as negative.

    The first channel is the most significant bit of the index. The gradient is straight-through.

    The loss weighs, by entropy_cost, (mean entropy of a soft assignment) - diversity * (entropy of the mean soft
    assignment). Soft assignments are softmax(-|z - e|^2 / temperature) over the corners e. Their bits are independent,
    so the first entropy is exact as a sum over bits. The second adds the entropies of groups of bits.
    """

    num_embeddings: registry.NumEmbeddings
    commitment_cost: registry.CommitmentCost = 0.25
    entropy_cost: registry.EntropyCost = 0.1
    diversity: Annotated[float, registry.Setting("weight of even use within entropy_cost, usually 1", ge=0)] = 1.0
    temperature: registry.Temperature = 1.0
    group: Annotated[
        int,
        registry.Setting("bits whose joint distribution is exact, by 2^group probabilities; 1 in the BSQ paper", ""),
    ] = 8
    spherical: Annotated[bool, registry.Setting("BSQ: unit length, corners inside the unit sphere", "")] = False

    def __post_init__(self):
        if self.num_embeddings not in (2**bits for bits in range(1, MAX_BITS + 1)):
            message = f"must be a power of two from 2 to {MAX_EMBEDDINGS} for lfq and bsq; product has groups of bits"
            raise ConfigError(message, field="num_embeddings", value=self.num_embeddings)
        super().__post_init__()

    @property
    def channels(self) -> int:
        """Number of bits."""
        return self.num_embeddings.bit_length() - 1

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        flat = unit(flat) if self.spherical else flat
        bits = flat > 0
        indices = jnp.sum(bits * self._basis(), axis=-1, dtype=jnp.int32)
        quantized = jnp.where(bits, self._size(), -self._size())
        commitment = masked_mean((flat - quantized) ** 2, finite)
        certainty, spread = self._entropies(flat, finite)
        loss = self.commitment_cost * commitment + self.entropy_cost * (certainty - self.diversity * spread)
        metrics = batch_metrics(flat, quantized, indices, self.num_embeddings, finite)
        metrics |= {"entropy": jax.lax.stop_gradient(certainty), "batch_entropy": jax.lax.stop_gradient(spread)}
        out = straight_through(flat, quantized).reshape(z.shape)
        return Quantized(out, indices.reshape(z.shape[:-1]), loss, metrics)

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*b C"]:
        bits = indices[..., None] // self._basis() % 2 == 1
        return jnp.where(bits, self._size(), -self._size())

    def change_indices(self, indices: Int[AnyArray, "*b"], key: Key[Array, ""], neighbors: int = 0) -> Int[Array, "*b"]:
        """Returns another index for each: the `neighbors` nearest differ in the fewest bits."""
        if not neighbors:
            return super().change_indices(indices, key)
        changes = (itertools.combinations(self._basis().tolist(), count) for count in range(1, self.channels + 1))
        nearest = itertools.islice(itertools.chain.from_iterable(changes), neighbors)
        return indices ^ jax.random.choice(key, np.asarray([sum(bits) for bits in nearest], np.int32), indices.shape)

    def _entropies(self, flat: Rows, finite: Mask) -> tuple[Scalar, Scalar]:
        """Returns the mean entropy of a soft assignment and the entropy of the mean soft assignment, in nats."""
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


def _build(context: registry.Context, spherical: bool, **settings: Any) -> Quantizer:
    inner = LFQ(spherical=spherical, **settings)
    if context.codebook_dim not in (None, inner.channels) and context.channels != inner.channels:
        bits = inner.channels * context.codebook_dim // context.channels  # of all groups
        message = f"must be None or {bits}, the bits of num_embeddings={inner.num_embeddings} of all groups"
        raise ConfigError(message, field="codebook_dim", value=context.codebook_dim)
    return inner if context.channels == inner.channels else Projected(inner, context.channels)


registry.register(
    "lfq", LFQ, "Yu et al. 2023, arXiv:2310.05737", "signs of learned channels; no codebook, no search",
    build=functools.partial(_build, spherical=False), inner=True,
)  # fmt: skip
registry.register(
    "bsq", LFQ, "Zhao et al. 2024, arXiv:2406.07548", "lfq on the unit sphere, with a bounded error",
    build=functools.partial(_build, spherical=True), inner=True,
)  # fmt: skip
