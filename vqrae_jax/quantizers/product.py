"""Product quantization: groups of channels have codebooks of their own (Jegou et al. 2011, TPAMI 33(1))."""

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantized, Quantizer, Wrapper, sum_metrics


class Product(Wrapper):
    """G groups of C / G channels, which make K^G combinations from G codebooks of K.

    Indices are [*b, G], counts [G, K]; the loss is the mean of the groups'. A latent that is not finite in one group is
    ignored by that group only.
    """

    groups: tuple[Quantizer, ...]  # each for C / G channels; the same object in several places shares its codebook
    channels: int

    def __post_init__(self):
        if not self.groups or self.channels % len(self.groups):
            raise ValueError(f"{len(self.groups)} groups do not divide {self.channels} channels")
        super().__post_init__()

    quantizer = property(lambda self: self.groups[0])

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        outs = [group(part, train) for group, part in zip(self.groups, self._split(z), strict=True)]
        metrics = [out.metrics for out in outs]
        return Quantized(
            z=jnp.concatenate([out.z for out in outs], axis=-1),
            indices=jnp.stack([out.indices for out in outs], axis=-1),
            loss=sum(out.loss for out in outs) / len(outs),
            metrics={
                "counts": jnp.stack([m["counts"] for m in metrics]),
                "nonfinite": jnp.max(jnp.stack([m["nonfinite"] for m in metrics])),
                "quantization_error": sum(m["quantization_error"] for m in metrics) / len(outs),
                **sum_metrics(metrics),
            },
        )

    def lookup(self, indices: Int[AnyArray, "*b G"]) -> Float[Array, "*b C"]:
        if indices.shape[-1:] != (len(self.groups),):
            raise ValueError(f"indices need a last axis of {len(self.groups)} groups, got shape {indices.shape}")
        return jnp.concatenate([group.lookup(indices[..., i]) for i, group in enumerate(self.groups)], axis=-1)

    def _split(self, z: Float[AnyArray, "*b C"]) -> list[Float[Array, "*b c"]]:
        if z.shape[-1] != self.channels:
            raise ValueError(f"the quantizer expects latents of {self.channels} channels, got shape {z.shape}")
        return jnp.split(z, len(self.groups), axis=-1)


def _build(
    context: registry.Context,
    inner: registry.Inner = "ema",
    groups: Annotated[int, registry.Setting("groups of channels", ge=1, le=1024, hashed=True)] = 2,
) -> Product:
    channels = context.channels
    if channels % groups:
        raise ConfigError(f"must divide the {channels} channels of the latents", field="groups", value=groups)
    return Product(tuple(context.build_inner(channels // groups, 1) for _ in range(groups)), channels)


registry.register(
    "product", _build, "Jegou et al. 2011, doi:10.1109/TPAMI.2010.57",
    "many combinations from small codebooks; several indices per token",
)  # fmt: skip
