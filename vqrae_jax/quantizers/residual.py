"""Residual quantization: each level codes what the ones before left over (Zeghidour et al. 2021, arXiv:2107.03312)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vqrae_jax.quantizers.base import Quantized, Quantizer, flatten, relative_error
from vqrae_jax.quantizers.estimators import value_of
from vqrae_jax.quantizers.kmeans import kmeans
from vqrae_jax.quantizers.lookup import look_up
from vqrae_jax.quantizers.nearest import nearest

ABSENT = -1  # the index of a level that was left out


class Residual(Quantizer):
    """A latent is the sum of one code per level; any prefix of its indices decodes to a coarser latent.

    Indices are [*b, depth], counts [depth, K]. The gradient to z is the mean of the levels', one straight-through in
    all. The loss is the sum of the levels', so that z is pulled to every prefix (Lee et al. 2022, arXiv:2203.01941).

    Attributes:
      levels: the quantizers, all of the same K and C; the same object in several places shares its codebook, which
        begins with what all levels code if it is that of all.
      channels: C.
      dropout: in training, the share of images (entries of the leading axis) that keep only a random prefix of 1 to
        depth - 1 levels; the indices of the others are -1 there. Draws from the rng stream "codes".
    """

    decodes_prefixes = True  # `lookup` takes the first levels alone

    levels: tuple[Quantizer, ...]
    channels: int
    dropout: float = 0.0

    @property
    def num_embeddings(self) -> int:
        return self.levels[0].num_embeddings

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes latents level by level."""
        flat, finite = flatten(z, self.channels)
        if train and not self.is_initializing():
            self._begin(jax.lax.stop_gradient(flat), finite)
        flat = jnp.where(finite[:, None], flat, jnp.nan).reshape(z.shape)  # each level passes over NaN by itself
        kept = self._kept_levels(z, train)
        left, total, carrier, loss = flat, jnp.zeros(z.shape), 0.0, 0.0
        outs = []
        for i, level in enumerate(self.levels):
            there = (i < kept)[..., None]
            out = level(jnp.where(there, left, jnp.nan), train)
            codes = jnp.where(there, out.z, 0.0)
            left = left - jax.lax.stop_gradient(codes)
            total, carrier, loss = total + codes, carrier + codes, loss + out.loss
            outs.append(out.replace(indices=jnp.where(i < kept, out.indices, ABSENT)))
        metrics = self._metrics([out.metrics for out in outs])
        fixed = jax.lax.stop_gradient((jnp.nan_to_num(flat), total))
        rows = [x.reshape(-1, self.channels) for x in fixed]
        return Quantized(
            z=value_of(total, carrier / kept[..., None]),
            indices=jnp.stack([out.indices for out in outs], axis=-1),
            loss=loss,
            metrics=metrics | {"quantization_error": relative_error(*rows, finite)},
        )

    def lookup(self, indices: Int[Array, "*b depth"]) -> Float[Array, "*b C"]:
        """The sum of the codes; with fewer than all levels, or -1 for the missing ones, a coarser latent.

        Raises:
          ValueError: more indices per latent than levels.
        """
        depth = indices.shape[-1]
        if depth > len(self.levels):
            raise ValueError(f"indices of {depth} levels for a residual quantizer of {len(self.levels)}")
        total = jnp.zeros((*indices.shape[:-1], self.channels))
        for i, level in enumerate(self.levels[:depth]):
            there = (indices[..., i] != ABSENT)[..., None]
            total += jnp.where(there, level.lookup(jnp.maximum(indices[..., i], 0)), 0.0)
        return total

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.levels[0].embeddings()

    def _begin(self, flat: Float[Array, "N C"], finite: Bool[Array, " N"]) -> None:
        """Codes of the latents alone would be far from all that they leave over."""
        level, depth = self.levels[0], len(self.levels)
        if depth > 1 and all(other is level for other in self.levels) and level.embeddings() is not None:
            keys, codes = jax.random.split(self.make_rng("codes"), depth), -(-self.num_embeddings // depth)
            level.initialize(lambda: _left_over(keys, flat, finite, codes), jnp.sum(finite))

    def _kept_levels(self, z: Float[Array, "*b C"], train: bool) -> Int[Array, "*b"]:
        """How many levels each latent goes through."""
        depth, shape = len(self.levels), z.shape[:-1]
        if not (train and self.dropout and depth > 1) or self.is_initializing():
            return jnp.full(shape, depth)
        count_key, drop_key = jax.random.split(self.make_rng("codes"))
        count = jax.random.randint(count_key, shape[:1], 1, depth)
        count = jnp.where(jax.random.uniform(drop_key, shape[:1]) < self.dropout, count, depth)
        return jnp.broadcast_to(count.reshape(-1, *[1] * (len(shape) - 1)), shape)

    def _metrics(self, levels: list[dict[str, Array]]) -> dict[str, Array]:
        """Counts per level; what the first level found broken; the sum of all other numbers of codes."""
        sums = {name: sum(m[name] for m in levels) for name in ("revived", "starved") if name in levels[0]}
        counts = jnp.stack([m["counts"] for m in levels])
        return {"counts": counts, "nonfinite": levels[0]["nonfinite"], **sums}


def _left_over(
    keys: PRNGKeyArray, z: Float[Array, "N C"], keep: Bool[Array, " N"], size: int
) -> tuple[Float[Array, "M C"], Bool[Array, " M"]]:
    """What the levels, one per key, would code if each had `size` codes of its own; and which rows count."""

    def code(left: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, _ = kmeans(key, left, jnp.zeros((size, left.shape[1])), keep=keep)
        return left - look_up(codes, nearest(left, codes)), left

    _, found = jax.lax.scan(code, z, keys)
    # Rows in front, which stay on their devices.
    return found.swapaxes(0, 1).reshape(-1, z.shape[1]), jnp.repeat(keep, len(keys))
