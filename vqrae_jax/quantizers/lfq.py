"""Lookup-free quantization (Yu et al. 2023, arXiv:2310.05737); spherical: BSQ (Zhao et al. 2024, arXiv:2406.07548)."""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    """One bit per channel, its sign: 2^C corners of a cube without a codebook. Zero counts as negative.

    The first channel is the most significant bit of the index. The gradient is straight-through.

    The loss weighs, by entropy_cost, (mean entropy of a soft assignment) - diversity * (entropy of the mean soft
    assignment). Soft assignments are softmax(-|z - e|^2 / temperature) over the corners e. Their bits are independent,
    so the first entropy is exact as a sum over bits. The second adds the entropies of groups of bits.
    """

    channels: int  # number of bits, at most 24
    commitment_cost: float = 0.25
    entropy_cost: float = 0.1
    diversity: float = 1.0
    temperature: float = 1.0
    group: int = 8  # bits whose joint distribution is exact, by 2^group probabilities per latent; BSQ has 1
    spherical: bool = False  # BSQ: unit length, corners of the cube inside the unit sphere

    def __post_init__(self):
        if not 1 <= self.channels <= MAX_BITS:
            raise ConfigError(f"must be 1 to {MAX_BITS} bits", field="channels", value=self.channels)
        super().__post_init__()

    num_embeddings = property(lambda self: 2**self.channels)

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


def _build(
    context: registry.Context,
    spherical: bool,
    num_embeddings: registry.NumEmbeddings,
    commitment_cost: registry.CommitmentCost,
    codebook_dim: registry.CodebookDim = 0,
    entropy_cost: registry.EntropyCost = 0.1,
    diversity: Annotated[float, registry.Setting("weight of even use within entropy_cost", ge=0)] = 1.0,
    temperature: registry.Temperature = 1.0,
) -> Quantizer:
    bits = num_embeddings.bit_length() - 1
    if 2**bits != num_embeddings or not 1 <= bits <= MAX_BITS:
        message = f"must be a power of two from 2 to {MAX_EMBEDDINGS} for lfq and bsq"
        raise ConfigError(message, field="num_embeddings", value=num_embeddings)
    if codebook_dim not in (0, bits):
        message = f"must be None or {bits}, the bits of num_embeddings={num_embeddings}"
        raise ConfigError(message, field="codebook_dim", value=codebook_dim)
    inner = LFQ(bits, commitment_cost, entropy_cost, diversity, temperature, spherical=spherical)
    return inner if context.channels == bits else Projected(inner, context.channels, bits)


registry.register(
    "lfq", functools.partial(_build, spherical=False), "Yu et al. 2023, arXiv:2310.05737",
    "signs of learned channels; no codebook, no search", inner=True,
)  # fmt: skip
registry.register(
    "bsq", functools.partial(_build, spherical=True), "Zhao et al. 2024, arXiv:2406.07548",
    "lfq on the unit sphere, with a bounded error", inner=True,
)  # fmt: skip
