"""Finite scalar quantization: every channel is rounded to a few levels (Mentzer et al. 2023, arXiv:2309.15505)."""

import math
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Indices, Rows
from vqrae_jax.quantizers.base import MAX_EMBEDDINGS, Quantized, Quantizer, batch_metrics, flatten, masked_mean
from vqrae_jax.quantizers.estimators import straight_through

EDGE = 1e-3  # share by which tanh reaches beyond the outermost level, so that the level is reached
HIDDEN = 512  # width of the layers of `Reduce`
FOURIER_FEATURES = 128
FOURIER_SCALE = 10.0


class FSQ(Quantizer):
    """A grid of prod(levels) points without a codebook.

    Channel i takes the values -(L_i - 1)/2 ... (L_i - 1)/2 in steps of one. An input in [-1, 1] is scaled to that
    range, clamped and rounded, halves to the even index. The index counts levels, with the first channel most
    significant. All of it is float32: in bfloat16, values near a boundary change sides. The gradient passes through
    rounding and clamping.

    The "mlp" adapter is that of the PyTorch VQRAE: LayerNorm and MLP with a bounded, scaled output; back by Fourier
    features and MLP. "linear" is one linear map each way, bounded by tanh; "none" needs len(levels) channels.
    """

    levels: Annotated[
        tuple[Annotated[int, registry.Setting(ge=2, le=65_536)], ...],
        registry.Setting(
            "number of values of each quantized channel, usually 5 to 8 for 4 to 6 channels; their product is K",
            default=(8, 5, 5, 5),
            hashed=True,
        ),
    ]
    channels: registry.Channels
    adapter: Annotated[
        Literal["mlp", "linear", "none"],
        registry.Setting(
            "layers from the latents to the levels and back; linear for frozen features, with whitening_dim"
        ),
    ] = "mlp"
    commitment_cost: Annotated[
        float, registry.Setting("weight of the squared distance to the level; 0 in the paper, 1 in the PyTorch one", "")
    ] = 1.0

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ConfigError("must be one or more numbers of at least 2", field="levels", value=self.levels)
        if self.num_embeddings > MAX_EMBEDDINGS:
            message = f"makes {self.num_embeddings} embeddings, more than {MAX_EMBEDDINGS}; use fewer or smaller levels"
            raise ConfigError(message, field="levels", value=self.levels)
        if self.adapter == "none" and self.channels != len(self.levels):
            message = f"needs latents of {len(self.levels)} channels, got {self.channels}; use 'linear' or 'mlp'"
            raise ConfigError(message, field="adapter", value=self.adapter)
        super().__post_init__()

    @property
    def num_embeddings(self) -> int:
        return math.prod(self.levels)

    def setup(self):
        if self.adapter == "mlp":
            self.reduce = Reduce(len(self.levels), name="reduce")
            self.expand = Expand(len(self.levels), self.channels, name="expand")
        elif self.adapter == "linear":
            self.reduce = _dense(len(self.levels), "reduce")
            self.expand = _dense(self.channels, "expand")

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        scales = self._scales()
        scaled = (flat if self.adapter == "none" else self._reduce(flat)) * scales
        steps = jnp.round(jnp.clip(scaled, -scales, scales) + scales)  # the number of the level, from 0
        indices = jnp.sum(steps.astype(jnp.int32) * self._basis(), axis=-1)
        quantized = jax.lax.stop_gradient(steps - scales)
        out = straight_through(scaled, quantized)
        out = out if self.adapter == "none" else self.expand(out)
        loss = self.commitment_cost * masked_mean((scaled - quantized) ** 2, finite)
        metrics = batch_metrics(scaled, quantized, indices, self.num_embeddings, finite)
        return Quantized(out.reshape(z.shape), indices.reshape(z.shape[:-1]), loss, metrics)

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*b C"]:
        quantized = self._steps(indices.reshape(-1)) - self._scales()
        quantized = quantized if self.adapter == "none" else self.expand(quantized)
        return quantized.reshape(*indices.shape, self.channels)

    def points(self) -> Float[Array, "K L"]:
        return self._steps(jnp.arange(self.num_embeddings))

    def _steps(self, indices: Indices) -> Float[Array, "N L"]:
        """Returns the numbers of the levels, from 0."""
        return (indices[:, None] // self._basis() % np.asarray(self.levels, np.int32)).astype(jnp.float32)

    def _reduce(self, flat: Rows) -> Float[Array, "N L"]:
        reduced = self.reduce(flat)
        return reduced if self.adapter == "mlp" else (1 + EDGE) * jnp.tanh(reduced)

    def _scales(self) -> Float[np.ndarray, " L"]:
        return (np.asarray(self.levels, np.float32) - 1) / 2

    def _basis(self) -> Int[np.ndarray, " L"]:
        """Returns the weight of each channel's level in the index."""
        return np.asarray([math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))], np.int32)


class Reduce(nn.Module):
    """LayerNorm -> two hidden layers -> tanh times a learned gain."""

    out: int

    @nn.compact
    def __call__(self, x: Rows) -> Float[Array, "N L"]:
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        for i in range(2):
            x = nn.gelu(_dense(HIDDEN, f"hidden{i}")(x), approximate=False)
        # About 3: the middle third of tanh's range covers all levels, the rest saturates at the outermost.
        gain = self.param("gain", nn.initializers.constant(3.0), (self.out,))
        return jnp.tanh(_dense(self.out, "out")(x)) * gain


class Expand(nn.Module):
    """Random Fourier features of the levels -> two normed hidden layers -> C channels."""

    levels: int
    channels: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N L"]) -> Rows:
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


registry.register(
    "fsq", FSQ, "Mentzer et al. 2023, arXiv:2309.15505",
    "a fixed grid; on frozen features with whitening_dim and adapter=linear", wrappers=("whitening_dim",),
)  # fmt: skip
