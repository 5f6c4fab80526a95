"""Product quantization: groups of channels have codebooks of their own (Jegou et al. 2011, TPAMI 33(1))."""

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vqrae_jax.errors import ConfigError
from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Quantized, Quantizer, Wrapper, change_each, sum_metrics


class Product(Wrapper):
    """G groups of C / G channels, which make K^G combinations from G codebooks of K.

    Indices are [*b, G], counts [G, K]; the loss is the mean of the groups'. A latent that is not finite in one group is
    ignored by that group only.
    """

    quantizer: registry.Inner  # for C / G channels; each group has a copy
    groups: Annotated[
        int, registry.Setting("groups of channels, each with a codebook; usually 2 to 8", ge=1, le=1024, hashed=True)
    ] = 2

    @property
    def channels(self) -> int:
        return self.groups * self.quantizer.channels

    def setup(self):
        self.parts = tuple(self.quantizer.copy(name=f"groups_{i}") for i in range(self.groups))

    def __call__(self, z: Float[AnyArray, "*b C"], train: bool = False) -> Quantized:
        outs = [part(latents, train) for part, latents in zip(self.parts, self._split(z), strict=True)]
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
        if indices.shape[-1:] != (self.groups,):
            raise ValueError(f"indices need a last axis of {self.groups} groups, got shape {indices.shape}")
        return jnp.concatenate([part.lookup(indices[..., i]) for i, part in enumerate(self.parts)], axis=-1)

    def change_indices(self, indices: Int[AnyArray, "*b"], key: Key[Array, ""], neighbors: int = 0) -> Int[Array, "*b"]:
        return change_each(self.parts, indices, key, neighbors)

    def innermost(self) -> Quantizer:
        return self.parts[0].innermost()

    def _split(self, z: Float[AnyArray, "*b C"]) -> list[Float[Array, "*b c"]]:
        if z.shape[-1] != self.channels:
            raise ValueError(f"the quantizer expects latents of {self.channels} channels, got shape {z.shape}")
        return jnp.split(z, self.groups, axis=-1)


def _build(context: registry.Context, quantizer: str, groups: int) -> Product:
    channels = context.channels
    if channels % groups:
        raise ConfigError(f"must divide the {channels} channels of the latents", field="groups", value=groups)
    return Product(context.build(quantizer, channels // groups, 1), groups)


registry.register(
    "product", Product, "Jegou et al. 2011, doi:10.1109/TPAMI.2010.57",
    "many combinations from small codebooks; several indices per token", build=_build,
)  # fmt: skip
