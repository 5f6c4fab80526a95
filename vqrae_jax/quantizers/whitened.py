"""Quantization in the dominant principal subspace of frozen features (DINO-Tok: Jia et al. 2025, arXiv:2511.20565)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten

EPS = 1e-5  # of the largest variance; axes of less are not blown up further


class Whitened(Quantizer):
    """Latents are projected onto their first principal axes and scaled to variance one there; codes live in that space.

    Distances then weigh every axis alike, and what lies in the dropped axes comes back as its mean. State in
    `batch_stats`: mean [C], basis [C, dim] (orthonormal columns), deviation [dim]; fitted [], whether they are known.
    The first training batch gives them; whoever has latent statistics sets them by `fitted_state` instead. Before that
    the first `dim` channels pass as they are.

    Attributes:
      quantizer: takes latents of `dim` channels.
      channels: C of the latents outside.
      dim: axes kept.
    """

    quantizer: Quantizer
    channels: int
    dim: int

    def __post_init__(self):
        if not 1 <= self.dim <= self.channels:
            raise ValueError(f"dim={self.dim}: latents of {self.channels} channels have 1 to {self.channels} axes")
        super().__post_init__()

    def setup(self):
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,))
        self.basis = self.variable("batch_stats", "basis", jnp.eye, self.channels, self.dim)
        self.deviation = self.variable("batch_stats", "deviation", jnp.ones, (self.dim,))
        self.fitted = self.variable("batch_stats", "fitted", lambda: jnp.zeros((), jnp.int32))

    @property
    def num_embeddings(self) -> int:
        return self.quantizer.num_embeddings

    @property
    def decodes_prefixes(self) -> bool:
        return self.quantizer.decodes_prefixes

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents; loss and metrics are the inner quantizer's, in whitened units."""
        flat, finite = flatten(z, self.channels)
        if train and not self.is_initializing():
            self._fit(jax.lax.stop_gradient(flat), finite)
        inside = _dot(flat - self.mean.value, self.basis.value) / self.deviation.value
        inside = jnp.where(finite[:, None], inside, jnp.nan)  # for the quantizer to see and pass over
        out = self.quantizer(inside.reshape(*z.shape[:-1], self.dim), train)
        return out.replace(z=self._back(out.z))

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b C"]:
        """The codes of `indices`, in the latents' own space."""
        return self._back(self.quantizer.lookup(indices))

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.quantizer.embeddings()

    def _back(self, inside: Float[Array, "*b D"]) -> Float[Array, "*b C"]:
        return _dot(inside * self.deviation.value, self.basis.value.T) + self.mean.value

    def _fit(self, flat: Float[Array, "N C"], finite: Bool[Array, " N"]) -> None:
        """Takes the axes from the first batch that has finite latents."""

        def fit():
            count = jnp.maximum(jnp.sum(finite), 1)
            mean = jnp.sum(flat, axis=0) / count  # rows that are not finite are zero
            centred = jnp.where(finite[:, None], flat - mean, 0.0)
            variance, axes = jnp.linalg.eigh(_dot(centred.T, centred) / count)
            return fitted_state(mean, axes[:, ::-1], variance[::-1], self.dim)

        state = {"mean": self.mean, "basis": self.basis, "deviation": self.deviation, "fitted": self.fitted}
        starts = (self.fitted.value == 0) & jnp.any(finite)
        fitted = jax.lax.cond(starts, fit, lambda: {name: variable.value for name, variable in state.items()})
        for name, variable in state.items():
            variable.value = fitted[name]


def fitted_state(
    mean: Float[Array, " C"], basis: Float[Array, "C n"], variance: Float[Array, " n"], dim: int
) -> dict[str, Array]:
    """The state of `Whitened` from principal axes, the first of which are kept.

    Args:
      mean: of the latents.
      basis: orthonormal columns, by falling variance; n >= dim.
      variance: of the latents along them.
      dim: axes to keep.
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
