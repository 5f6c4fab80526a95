"""Finite scalar quantization: every channel is rounded to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import MAX_CODES, Quantized, Quantizer, flatten, health, kept_mean
from vqrae_jax.quantizers.estimators import straight_through

Adapter = Literal["none", "linear", "mlp"]

EDGE = 1e-3  # how far tanh reaches beyond the outermost level, as a share, so that it is reached
FOURIER_FEATURES = 128
FOURIER_SCALE = 10.0


class FSQ(Quantizer):
    """A grid of prod(levels) codes without a codebook.

    Channel i takes the values -(L_i - 1)/2 ... (L_i - 1)/2 in steps of one. An input in [-1, 1] is scaled to
    that range, clamped and rounded, halves to the even index. The index counts levels, the first channel most
    significant. All of it is float32: in bfloat16 values near a boundary change sides. The gradient passes through
    rounding and clamping.

    Attributes:
      levels: L per quantized channel, each at least 2; odd and even. Their product is at most 2^24.
      channels: C of the latents.
      adapter: from C to len(levels) channels and back. "mlp" is the origin's: LayerNorm and MLP with a bounded, gained
        output, Fourier features and MLP on the way back. "linear": one linear map each way, bounded by tanh. "none":
        latents have len(levels) channels themselves.
      commitment_cost: weight of the mean squared distance to the level; the paper has no such loss, the origin 1.
    """

    levels: tuple[int, ...]
    channels: int
    adapter: Adapter = "mlp"
    commitment_cost: float = 1.0

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={self.levels}: give at least one number of levels, each at least 2")
        if self.num_embeddings > MAX_CODES:
            raise ValueError(
                f"levels={self.levels} are {self.num_embeddings} codes, more than {MAX_CODES}: give fewer or lower ones"
            )
        if self.adapter == "none" and self.channels != len(self.levels):
            raise ValueError(
                f"adapter='none' quantizes the latent itself, which has {self.channels} channels, but levels="
                f"{self.levels} are {len(self.levels)}: use adapter='linear' or 'mlp'"
            )
        super().__post_init__()

    @property
    def num_embeddings(self) -> int:
        """K, the product of the levels."""
        return math.prod(self.levels)

    def setup(self):
        if self.adapter == "mlp":
            self.reduce = Reduce(len(self.levels), name="reduce")
            self.expand = Expand(len(self.levels), self.channels, name="expand")
        elif self.adapter == "linear":
            self.reduce = nn.Dense(len(self.levels), precision=jax.lax.Precision.HIGHEST, name="reduce")
            self.expand = nn.Dense(self.channels, precision=jax.lax.Precision.HIGHEST, name="expand")

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; train makes no difference."""
        flat, finite = flatten(z, self.channels)
        scales = self._scales()
        scaled = (flat if self.adapter == "none" else self._bounded(flat)) * scales
        steps = jnp.round(jnp.clip(scaled, -scales, scales) + scales)  # the level's number, from 0
        indices = jnp.sum(steps.astype(jnp.int32) * self._basis(), axis=-1)
        codes = jax.lax.stop_gradient(steps - scales)
        out = straight_through(scaled, codes)
        out = out if self.adapter == "none" else self.expand(out)
        return Quantized(
            z=out.reshape(z.shape),
            indices=indices.reshape(z.shape[:-1]),
            loss=self.commitment_cost * kept_mean((scaled - codes) ** 2, finite),
            metrics=health(scaled, codes, indices, self.num_embeddings, finite),
        )

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """What `indices` stand for, adapter included."""
        flat = indices.reshape(-1, 1)
        steps = flat // self._basis() % np.asarray(self.levels, np.int32)
        codes = steps.astype(jnp.float32) - self._scales()
        codes = codes if self.adapter == "none" else self.expand(codes)
        return codes.reshape(*indices.shape, self.channels)

    def _bounded(self, flat: Float[Array, "N C"]) -> Float[Array, "N L"]:
        reduced = self.reduce(flat)
        return reduced if self.adapter == "mlp" else (1 + EDGE) * jnp.tanh(reduced)

    def _scales(self) -> Float[np.ndarray, " L"]:
        return (np.asarray(self.levels, np.float32) - 1) / 2

    def _basis(self) -> Int[np.ndarray, " L"]:
        """The weight of each channel's level in the index."""
        return np.asarray([math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))], np.int32)


class Reduce(nn.Module):
    """LayerNorm -> two hidden layers -> tanh times a learned gain."""

    out: int
    hidden: int = 512

    @nn.compact
    def __call__(self, x: Float[Array, "N C"]) -> Float[Array, "N L"]:
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        for i in range(2):
            x = nn.gelu(_dense(self.hidden, f"hidden{i}")(x), approximate=False)
        # About 3: what lies within a third of tanh's range covers all levels, the rest saturates at the outermost.
        gain = self.param("gain", nn.initializers.constant(3.0), (self.out,))
        return jnp.tanh(_dense(self.out, "out")(x)) * gain


class Expand(nn.Module):
    """Random Fourier features of the levels -> two normed hidden layers -> C channels."""

    levels: int
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "N L"]) -> Float[Array, "N C"]:
        shape = (self.levels, FOURIER_FEATURES)
        frequencies = self.variable(
            "batch_stats", "fourier", lambda: FOURIER_SCALE * jax.random.normal(self.make_rng("params"), shape)
        )
        angles = jnp.dot(2 * jnp.pi * x, frequencies.value, precision=jax.lax.Precision.HIGHEST)
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for i in range(2):
            x = nn.LayerNorm(epsilon=1e-5, name=f"norm{i}")(_dense(self.channels, f"hidden{i}")(x))
            x = nn.gelu(x, approximate=False)
        return _dense(self.channels, "out")(x)


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, precision=jax.lax.Precision.HIGHEST, name=name)
