"""Codes on grids from coarse to fine (VQ-VAE-2: Razavi et al. 2019, 1906.00446; VAR: Tian et al. 2024, 2404.02905)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, relative_error
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.resize import resize


class MultiScale(Quantizer):
    """Every scale codes, on its grid, what the coarser ones left over of the latent grid (VAR, algorithm 1).

    What is left is averaged down to the scale's grid, quantized, enlarged bicubically and subtracted; the latent is the
    sum. Indices are [B, sum of grid^2], coarse scales first, rows first; a prefix of whole scales decodes too. All
    scales share one codebook, which begins with what all of them code and learns from each in turn; a latent that is
    not finite is left out of the means, and a cell without a finite one is passed over. The gradient is the mean of the
    scales': each takes what its grid holds through its quantizer and its parameters, and the rest as it is, so that
    straight-through quantizers are one straight-through in all. The loss is the mean of the scales' too.

    Attributes:
      quantizer: of every scale.
      channels: C.
      grids: side of every scale's grid, rising; the last is that of the latents.
    """

    decodes_prefixes = True  # `lookup` takes the first scales alone

    quantizer: Quantizer
    channels: int
    grids: tuple[int, ...]

    def __post_init__(self):
        if not self.grids or sorted(set(self.grids)) != list(self.grids) or self.grids[0] < 1:
            raise ValueError(f"grids={self.grids}: give rising sides of at least 1, one per scale")
        super().__post_init__()

    @property
    def num_embeddings(self) -> int:
        return self.quantizer.num_embeddings

    def __call__(self, z: Float[Array, "B h w C"], train: bool = False) -> Quantized:
        """Quantizes latent grids, coarse to fine.

        Raises:
          ValueError: z is no grid with sides grids[-1].
        """
        side = self.grids[-1]
        if z.ndim != 4 or z.shape[1:3] != (side, side):
            raise ValueError(f"grids={self.grids} quantize latents [B, {side}, {side}, C], got shape {z.shape}")
        flat, finite = flatten(z, self.channels)
        grid, keep = flat.reshape(z.shape), finite.reshape(*z.shape[:-1], 1)
        if train:
            # Not by its first call: the coarsest scale alone has as few cells as there are images.
            fixed = jax.lax.stop_gradient(grid)
            self.quantizer.initialize(lambda: self._cells(fixed, keep), jnp.sum(keep))
        left, total, through = grid, jnp.zeros(z.shape), 0.0
        outs = []
        for size in self.grids:
            cells = _means(left, keep, size)
            out = self.quantizer(cells, train)
            part = self._enlarged(jax.lax.stop_gradient(out.z))
            left, total = left - part, total + part
            through += self._enlarged(out.z - cells)  # for its gradient alone
            outs.append(out)
        metrics = [out.metrics for out in outs]
        sums = {n: sum(m[n] for m in metrics) for n in ("revived", "starved") if n in metrics[0]}
        return Quantized(
            z=value_of(total, grid + through / len(outs)),
            indices=jnp.concatenate([out.indices.reshape(len(z), -1) for out in outs], axis=1),
            loss=sum(out.loss for out in outs) / len(outs),
            metrics={
                "counts": sum(m["counts"] for m in metrics),
                "nonfinite": jnp.sum(~finite, dtype=jnp.int32),
                "quantization_error": relative_error(
                    jax.lax.stop_gradient(flat), total.reshape(-1, self.channels), finite
                ),
                **sums,
            },
        )

    def lookup(self, indices: Int[Array, "B N"]) -> Float[Array, "B h w C"]:
        """The sum of all scales; of the first few where only their indices are given.

        Raises:
          ValueError: the number of indices is not that of a prefix of the scales.
        """
        ends = np.cumsum([size**2 for size in self.grids]).tolist()
        if indices.ndim != 2 or indices.shape[1] not in ends:
            raise ValueError(f"grids={self.grids} have [B, N] indices with N in {ends}, got shape {indices.shape}")
        side = self.grids[-1]
        total = jnp.zeros((len(indices), side, side, self.channels))
        for size, end in zip(self.grids, ends, strict=True):
            if end <= indices.shape[1]:
                part = indices[:, end - size**2 : end].reshape(-1, size, size)
                total += self._enlarged(self.quantizer.lookup(part))
        return total

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.quantizer.embeddings()

    def _cells(
        self, grid: Float[Array, "B h w C"], keep: Bool[Array, "B h w 1"]
    ) -> tuple[Float[Array, "N C"], Bool[Array, " N"]]:
        """What all scales would code if coarser ones left nothing of what their grids hold; which of it is finite."""
        left, found = grid, []
        for size in self.grids:
            cells = _means(left, keep, size)
            found.append(cells.reshape(len(grid), -1, self.channels))
            left = left - self._enlarged(jnp.nan_to_num(cells))
        cells = jnp.concatenate(found, axis=1).reshape(-1, self.channels)
        return cells, jnp.all(jnp.isfinite(cells), axis=-1)

    def _enlarged(self, z: Float[Array, "B s s C"]) -> Float[Array, "B h w C"]:
        return resize(z, self.grids[-1], self.grids[-1], "bicubic")


def averaging(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Rows average the stretch of the source that a target cell covers, cells cut by its border in proportion."""
    edges = np.arange(target + 1) * source / target
    cells = np.arange(source)
    covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(covered, 0) * target / source).astype(np.float32)


def _means(z: Float[Array, "B s s C"], keep: Bool[Array, "B s s 1"], size: int) -> Float[Array, "B t t C"]:
    """Of the latents that `keep` marks in every cell; NaN, which quantizers pass over, where it has none."""
    matrix = averaging(z.shape[1], size)
    share = _resample(matrix, keep.astype(jnp.float32))
    means = _resample(matrix, jnp.where(keep, z, 0.0)) / jnp.where(share > 0, share, 1.0)
    return jnp.where(share > 0, means, jnp.nan)


def _resample(matrix: Float[np.ndarray, "t s"], z: Float[Array, "B s s C"]) -> Float[Array, "B t t C"]:
    return jnp.einsum("is,jt,bstc->bijc", matrix, matrix, z, precision=jax.lax.Precision.HIGHEST)
