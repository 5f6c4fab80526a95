"""Product quantization: groups of channels with codes of their own (Jegou et al. 2011, doi:10.1109/TPAMI.2010.57)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.quantizers.base import Quantized, Quantizer


class Product(Quantizer):
    """G groups of C / G channels give K^G combinations from G codebooks of K.

    Indices are [*b, G], counts [G, K]; the loss is the mean of the groups'. A latent that is not finite in one group is
    passed over by that group alone.

    Attributes:
      groups: the quantizers, each for C / G channels; the same object in several places shares its codebook.
      channels: C, divisible by G.
    """

    groups: tuple[Quantizer, ...]
    channels: int

    def __post_init__(self):
        if not self.groups or self.channels % len(self.groups):
            raise ValueError(f"{len(self.groups)} groups do not divide {self.channels} channels")
        super().__post_init__()

    @property
    def num_embeddings(self) -> int:
        return self.groups[0].num_embeddings

    def __call__(self, z: Float[Array, "*b C"], train: bool = False) -> Quantized:
        """Quantizes every group of channels by itself."""
        outs = [group(part, train) for group, part in zip(self.groups, self._split(z), strict=True)]
        metrics = [out.metrics for out in outs]
        means = {n: sum(m[n] for m in metrics) / len(outs) for n in ("quantization_error",)}
        sums = {n: sum(m[n] for m in metrics) for n in ("revived", "starved") if n in metrics[0]}
        return Quantized(
            z=jnp.concatenate([out.z for out in outs], axis=-1),
            indices=jnp.stack([out.indices for out in outs], axis=-1),
            loss=sum(out.loss for out in outs) / len(outs),
            metrics={
                "counts": jnp.stack([m["counts"] for m in metrics]),
                "nonfinite": jnp.max(jnp.stack([m["nonfinite"] for m in metrics])),
                **means,
                **sums,
            },
        )

    def lookup(self, indices: Int[Array, "*b G"]) -> Float[Array, "*b C"]:
        """The codes of all groups side by side.

        Raises:
          ValueError: the last axis of the indices is not the groups'.
        """
        if indices.shape[-1:] != (len(self.groups),):
            raise ValueError(f"indices of shape {indices.shape} for a product quantizer of {len(self.groups)} groups")
        return jnp.concatenate([group.lookup(indices[..., i]) for i, group in enumerate(self.groups)], axis=-1)

    def embeddings(self) -> Float[Array, "K c"] | None:
        return self.groups[0].embeddings()

    def _split(self, z: Float[Array, "*b C"]) -> list[Float[Array, "*b c"]]:
        if z.shape[-1] != self.channels:
            raise ValueError(f"the quantizer takes latents of {self.channels} channels, got shape {z.shape}")
        return jnp.split(z, len(self.groups), axis=-1)
