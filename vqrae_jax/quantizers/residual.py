"""Residual quantization: each level quantizes what the levels before left (Zeghidour et al. 2021, arXiv:2107.03312)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray, Mask, Rows
from vqrae_jax.quantizers.base import Quantized, Quantizer, Wrapper, change_each, flatten, relative_error, sum_metrics
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import kmeans
from vqrae_jax.quantizers.nearest import nearest
from vqrae_jax.quantizers.statistics import gather_rows

ABSENT = -1  # the index of a level that is left out


class Residual(Wrapper):
    """A latent is the sum of one embedding per level; any prefix of its indices decodes to a coarser latent.

    Indices are [*b, depth], counts [depth, K]. The gradient to z is the mean of the levels', one straight-through in
    total. The loss is the sum of the levels', so that z is pulled to every prefix (Lee et al. 2022, arXiv:2203.01941).
    """

    quantizer: registry.Inner  # each level has a copy
    depth: Annotated[int, registry.Setting("number of levels, usually 2 to 8", ge=1, le=256, hashed=True)] = 4
    # A shared codebook starts from what all levels quantize.
    shared: Annotated[bool, registry.Setting("use one codebook for all levels")] = False
    # An image is an entry of the leading axis. Its prefix has 1 to depth - 1 levels; the other indices are -1.
    dropout: Annotated[
        float,
        registry.Setting("share of images that train only a random prefix of the levels, usually 0 to 0.5", ge=0, le=1),
    ] = 0.0

    @property
    def channels(self) -> int:
        return self.quantizer.channels

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1, self.depth + 1))

    def setup(self):
        levels = [self.quantizer.copy(name=f"levels_{i}") for i in range(1 if self.shared else self.depth)]
        self.levels = tuple(levels * self.depth if self.shared else levels)

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        flat, finite = flatten(z, self.channels)
        if train and not self.is_initializing():
            self._initialize_shared(jax.lax.stop_gradient(flat), finite)
        flat = jnp.where(finite[:, None], flat, jnp.nan).reshape(z.shape)  # each level ignores NaN by itself
        depths = self._draw_depths(z, train)
        rest, total, carrier, loss = flat, jnp.zeros(z.shape), 0.0, 0.0
        outs = []
        for i, level in enumerate(self.levels):
            present = (i < depths)[..., None]
            out = level(jnp.where(present, rest, jnp.nan), train)
            quantized = jnp.where(present, out.z, 0.0)
            rest = rest - jax.lax.stop_gradient(quantized)
            total, carrier, loss = total + quantized, carrier + quantized, loss + out.loss
            outs.append(out.replace(indices=jnp.where(i < depths, out.indices, ABSENT)))
        metrics = [out.metrics for out in outs]
        fixed = jax.lax.stop_gradient((jnp.nan_to_num(flat), total))
        rows = [x.reshape(-1, self.channels) for x in fixed]
        return Quantized(
            z=value_of(total, carrier / depths[..., None]),
            indices=jnp.stack([out.indices for out in outs], axis=-1),
            loss=loss,
            metrics={
                "counts": jnp.stack([m["counts"] for m in metrics]),
                "nonfinite": metrics[0]["nonfinite"],
                "quantization_error": relative_error(*rows, finite),
                **sum_metrics(metrics),
            },
        )

    def lookup(self, indices: Int[AnyArray, "*b depth"]) -> Float[Array, "*b C"]:
        """Returns the sum of the embeddings; with fewer levels, or -1 for missing ones, a coarser latent."""
        depth = indices.shape[-1]
        if depth > self.depth:
            raise ValueError(f"indices have {depth} levels, the quantizer has {self.depth}")
        total = jnp.zeros((*indices.shape[:-1], self.channels))
        for i, level in enumerate(self.levels[:depth]):
            present = (indices[..., i] != ABSENT)[..., None]
            total += jnp.where(present, level.lookup(jnp.maximum(indices[..., i], 0)), 0.0)
        return total

    def change_indices(self, indices: Int[AnyArray, "*b"], key: Key[Array, ""], neighbors: int = 0) -> Int[Array, "*b"]:
        return change_each(self.levels, indices, key, neighbors)

    def innermost(self) -> Quantizer:
        return self.levels[0].innermost()

    def _initialize_shared(self, flat: Rows, finite: Mask) -> None:
        """Starts a shared codebook from latents and residuals: one from latents alone is far from all residuals."""
        if self.shared and self.depth > 1 and self.embeddings() is not None:
            keys, size = jax.random.split(self.make_rng("codes"), self.depth), -(-self.num_embeddings // self.depth)
            self.levels[0].initialize(lambda: _residuals(keys, flat, finite, size), jnp.sum(finite))

    def _draw_depths(self, z: Float[AnyArray, "*b C"], train: bool) -> Int[Array, "*b"]:
        """Returns the number of levels that each latent uses."""
        depth, shape = self.depth, z.shape[:-1]
        if not (train and self.dropout and depth > 1) or self.is_initializing():
            return jnp.full(shape, depth)
        depth_key, drop_key = jax.random.split(self.make_rng("codes"))
        depths = jax.random.randint(depth_key, shape[:1], 1, depth)
        depths = jnp.where(jax.random.uniform(drop_key, shape[:1]) < self.dropout, depths, depth)
        return jnp.broadcast_to(depths.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _residuals(
    keys: Key[Array, " depth"], z: Rows, mask: Mask, size: int
) -> tuple[Float[Array, "M C"], Bool[Array, " M"]]:
    """Returns what each level quantizes if it has `size` embeddings of its own, and the mask of these rows."""

    def quantize(rest: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        codebook, _ = kmeans(key, rest, jnp.zeros((size, rest.shape[1])), mask)
        return rest - gather_rows(codebook, nearest(rest, codebook)), rest

    _, residuals = jax.lax.scan(quantize, z, keys)
    # The row axis comes first, so that rows stay on their devices.
    return residuals.swapaxes(0, 1).reshape(-1, z.shape[1]), jnp.repeat(mask, len(keys))


def _build(context: registry.Context, quantizer: str, depth: int, shared: bool, dropout: float) -> Residual:
    return Residual(context.build(quantizer, context.channels, depth if shared else 1), depth, shared, dropout)


registry.register(
    "residual", Residual, "Zeghidour et al. 2021, arXiv:2107.03312; Lee et al. 2022, arXiv:2203.01941",
    "coarse to fine: each level refines the token, and prefixes of levels decode", build=_build,
)  # fmt: skip
