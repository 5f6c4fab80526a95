"""Quantizers around another one: learned linear maps, and the dominant principal subspace of frozen features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Mask, Rows
from vqrae_jax.quantizers.base import Quantized, Wrapper, flatten

EPS = 1e-5  # smallest variance of an axis, relative to the largest: axes of less variance are not amplified further


class Projected(Wrapper):
    """Low-dimensional embeddings use the codebook better (Yu et al. 2021, arXiv:2110.04627, "factorized codes").

    `params`: project_in, project_out. The variables of the inner quantizer are under `quantizer`.
    """

    quantizer: registry.Inside
    channels: registry.Channels

    def setup(self):
        self.project_in = nn.Dense(self.quantizer.channels, precision=jax.lax.Precision.HIGHEST)
        self.project_out = nn.Dense(self.channels, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        # NaN bypasses the projection: inside, it would reach the gradient of the kernel.
        inside = jnp.where(finite[:, None], self.project_in(flat), jnp.nan)
        out = self.quantizer(inside.reshape(*z.shape[:-1], -1), train)
        return out.replace(z=self.project_out(out.z))

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*d C"]:
        return self.project_out(self.quantizer.lookup(indices))

    def blend(self, pair: Int[AnyArray, " 2 *b"], weights: Float[AnyArray, " steps"]) -> Int[Array, " steps *b"]:
        return self.quantizer.blend(pair, weights)  # the learned projections are not inverse to each other


class Whitened(Wrapper):
    """Latents are projected onto their first principal axes and scaled to variance one, and are quantized there.

    Distances then weigh all axes equally, and the dropped axes are decoded as their mean (DINO-Tok, Jia et al. 2025,
    arXiv:2511.20565). State in `batch_stats`: mean [C], basis [C, c] (orthonormal columns), deviation [c]; fitted
    [], 1 once they are known. The first training batch gives them, unless they are set by `fitted_state`, for example
    from a file of latent statistics. Before that the first c channels pass unchanged.
    """

    quantizer: registry.Inside
    channels: registry.Channels

    def __post_init__(self):
        dim = self.quantizer.channels
        if not 1 <= dim <= self.channels:
            message = f"must be 1 to {self.channels}, the channels of the latents"
            raise ConfigError(message, field="whitening_dim", value=dim)
        super().__post_init__()

    def setup(self):
        dim = self.quantizer.channels
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,))
        self.basis = self.variable("batch_stats", "basis", jnp.eye, self.channels, dim)
        self.deviation = self.variable("batch_stats", "deviation", jnp.ones, (dim,))
        self.fitted = self.variable("batch_stats", "fitted", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        if train and not self.is_initializing():
            self._fit(jax.lax.stop_gradient(flat), finite)
        inside = _dot(flat - self.mean.value, self.basis.value) / self.deviation.value
        inside = jnp.where(finite[:, None], inside, jnp.nan)  # for the inner quantizer to count and ignore
        out = self.quantizer(inside.reshape(*z.shape[:-1], -1), train)
        return out.replace(z=self._undo(out.z))

    def lookup(self, indices: Int[AnyArray, "*b"]) -> Float[Array, "*d C"]:
        return self._undo(self.quantizer.lookup(indices))

    def _undo(self, inside: Float[Array, "*b D"]) -> Float[Array, "*b C"]:
        return _dot(inside * self.deviation.value, self.basis.value.T) + self.mean.value

    def _fit(self, flat: Rows, finite: Mask) -> None:
        """Computes the axes from the first batch that has finite latents."""

        def fit():
            count = jnp.maximum(jnp.sum(finite), 1)
            mean = jnp.sum(flat, axis=0) / count  # rows that are not finite are zero
            centered = jnp.where(finite[:, None], flat - mean, 0.0)
            variance, axes = jnp.linalg.eigh(_dot(centered.T, centered) / count)
            return fitted_state(mean, axes[:, ::-1], variance[::-1], self.quantizer.channels)

        state = {"mean": self.mean, "basis": self.basis, "deviation": self.deviation, "fitted": self.fitted}
        starts = (self.fitted.value == 0) & jnp.any(finite)
        fitted = jax.lax.cond(starts, fit, lambda: {name: variable.value for name, variable in state.items()})
        for name, variable in state.items():
            variable.value = fitted[name]


registry.WRAPPERS.update(
    codebook_dim=(Projected, registry.CodebookDim), whitening_dim=(Whitened, registry.WhiteningDim)
)


def fitted_state(
    mean: Float[AnyArray, " C"], basis: Float[AnyArray, "C n"], variance: Float[AnyArray, " n"], dim: int
) -> dict[str, Array]:
    """Returns the state of `Whitened` for the first `dim` of n principal axes.

    Args:
      mean: of the latents.
      basis: orthonormal columns, by decreasing variance; n >= dim.
      variance: of the latents along them.
    """
    variance = jnp.maximum(variance[:dim], EPS * variance[0])
    return {
        "mean": jnp.asarray(mean),
        "basis": jnp.asarray(basis[:, :dim]),
        "deviation": jnp.sqrt(variance + 1e-12),
        "fitted": jnp.ones((), jnp.int32),
    }


def _dot(a: Float[Array, "*b C"], b: Float[Array, "C D"]) -> Float[Array, "*b D"]:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
