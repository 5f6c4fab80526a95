"""Quantization on grids from coarse to fine (VQ-VAE-2: Razavi et al. 2019; VAR: Tian et al. 2024)."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Mask, Rows
from vqrae_jax.quantizers.base import Quantized, Wrapper, flatten, relative_error, sum_metrics
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.resize import resize

VAR_GRIDS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24, 32)  # VAR's, continued beyond 16


class MultiScale(Wrapper):
    """Every scale quantizes, on its own grid, what the coarser scales left of the latent grid (VAR, algorithm 1).

    The residual is averaged down to the grid of the scale, quantized, enlarged bicubically and subtracted; the latent
    is the sum. Indices are [B, sum of grid^2], coarse scales first, row by row; a prefix of whole scales decodes too.
    All scales share one codebook, which starts from what all of them quantize and learns from each in turn. Means skip
    latents that are not finite, and a cell without a finite latent is ignored. The gradient is the mean of the
    scales': each passes what its grid holds through its quantizer and its parameters, and the rest unchanged, so that
    straight-through quantizers are one straight-through in total. The loss is the mean of the scales' as well.
    """

    quantizer: registry.Inner
    grids: Annotated[
        tuple[Annotated[int, registry.Setting(ge=1, le=1024)], ...],
        registry.Setting(
            "increasing sides, the last that of the latent grid; (): 1, 2, 3, ... as in VAR", default=(), hashed=True
        ),
    ]

    @property
    def channels(self) -> int:
        return self.quantizer.channels

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(np.cumsum([size**2 for size in self.grids]).tolist())

    def __post_init__(self):
        if not self.grids or sorted(set(self.grids)) != list(self.grids) or self.grids[0] < 1:
            raise ConfigError("must be increasing sides of at least 1, one per scale", field="grids", value=self.grids)
        super().__post_init__()

    def __call__(self, z: Float[AnyArray, "B h w C"], train: bool = False) -> Quantized:
        side = self.grids[-1]
        if z.ndim != 4 or z.shape[1:3] != (side, side):
            raise ValueError(f"grids={self.grids} quantize latents [B, {side}, {side}, C], got shape {z.shape}")
        flat, finite = flatten(z, self.channels)
        grid, mask = flat.reshape(z.shape), finite.reshape(*z.shape[:-1], 1)
        if train:
            # Not by the first call of the quantizer: the coarsest scale has as few cells as there are images.
            fixed = jax.lax.stop_gradient(grid)
            self.quantizer.initialize(lambda: self._all_cells(fixed, mask), jnp.sum(mask))
        rest, total, through = grid, jnp.zeros(z.shape), 0.0
        outs = []
        for size in self.grids:
            cells = _cell_means(rest, mask, size)
            out = self.quantizer(cells, train)
            part = self._enlarge(jax.lax.stop_gradient(out.z))
            rest, total = rest - part, total + part
            through += self._enlarge(out.z - cells)  # only for its gradient
            outs.append(out)
        metrics = [out.metrics for out in outs]
        fixed = jax.lax.stop_gradient(flat)
        return Quantized(
            z=value_of(total, grid + through / len(outs)),
            indices=jnp.concatenate([out.indices.reshape(len(z), -1) for out in outs], axis=1),
            loss=sum(out.loss for out in outs) / len(outs),
            metrics={
                "counts": sum(m["counts"] for m in metrics),
                "nonfinite": jnp.sum(~finite, dtype=jnp.int32),
                "quantization_error": relative_error(fixed, total.reshape(-1, self.channels), finite),
                **sum_metrics(metrics),
            },
        )

    def lookup(self, indices: Int[AnyArray, "B N"]) -> Float[Array, "B h w C"]:
        """Returns the sum of all scales, or of the first scales if only their indices are passed."""
        if indices.ndim != 2 or indices.shape[1] not in self.prefixes:
            raise ValueError(f"grids={self.grids} need [B, N] with N in {self.prefixes}, got shape {indices.shape}")
        side = self.grids[-1]
        total = jnp.zeros((len(indices), side, side, self.channels))
        for size, end in zip(self.grids, self.prefixes, strict=True):
            if end <= indices.shape[1]:
                part = indices[:, end - size**2 : end].reshape(-1, size, size)
                total += self._enlarge(self.quantizer.lookup(part))
        return total

    def _all_cells(self, grid: Float[Array, "B h w C"], mask: Bool[Array, "B h w 1"]) -> tuple[Rows, Mask]:
        """Returns what all scales quantize if each leaves nothing of its grid, and which cells are finite."""
        rest, parts = grid, []
        for size in self.grids:
            cells = _cell_means(rest, mask, size)
            parts.append(cells.reshape(len(grid), -1, self.channels))
            rest = rest - self._enlarge(jnp.nan_to_num(cells))
        cells = jnp.concatenate(parts, axis=1).reshape(-1, self.channels)
        return cells, jnp.all(jnp.isfinite(cells), axis=-1)

    def _enlarge(self, z: Float[Array, "B s s C"]) -> Float[Array, "B h w C"]:
        return resize(z, self.grids[-1], self.grids[-1], "bicubic")


def averaging_matrix(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Returns rows that average the source cells of each target cell; cells cut by its border count in proportion."""
    edges = np.arange(target + 1) * source / target
    cells = np.arange(source)
    covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(covered, 0) * target / source).astype(np.float32)


def _cell_means(z: Float[Array, "B s s C"], mask: Bool[Array, "B s s 1"], size: int) -> Float[Array, "B t t C"]:
    """Returns the mean of the latents in `mask` of every cell; NaN, which quantizers ignore, for empty cells."""
    matrix = averaging_matrix(z.shape[1], size)
    share = _resample(matrix, mask.astype(jnp.float32))
    means = _resample(matrix, jnp.where(mask, z, 0.0)) / jnp.where(share > 0, share, 1.0)
    return jnp.where(share > 0, means, jnp.nan)


def _resample(matrix: Float[np.ndarray, "t s"], z: Float[Array, "B s s C"]) -> Float[Array, "B t t C"]:
    return jnp.einsum("is,jt,bstc->bijc", matrix, matrix, z, precision=jax.lax.Precision.HIGHEST)


def _build(context: registry.Context, quantizer: str, grids: tuple[int, ...]) -> MultiScale:
    if context.flat:
        message = "must be False for multiscale, which resizes the latent grid"
        raise ConfigError(message, field="model.quantize_before_reshape", value=True)
    grids = grids or (*(side for side in VAR_GRIDS if side < context.grid), context.grid)
    if grids[-1] != context.grid:
        raise ConfigError(f"must end with {context.grid}, the side of the latent grid", field="grids", value=grids)
    return MultiScale(context.build(quantizer, context.channels, len(grids)), grids)


registry.register(
    "multiscale", MultiScale, "Tian et al. 2024, arXiv:2404.02905; Razavi et al. 2019, arXiv:1906.00446",
    "grids from coarse to fine for next-scale generators; prefixes of scales decode", build=_build,
)  # fmt: skip
