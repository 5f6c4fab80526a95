"""ConvNeXt classifiers (Liu et al. 2022, arXiv:2201.03545), for a perceptual distance of their logits."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.models.vit import LayerScale, matmul_precision


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """One stage per number: its blocks and its channels."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    dtype: str = "float32"  # of activations; norms stay float32
    norm_eps: float = 1e-6
    final_norm_eps: float = 1e-12


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two-layer perceptron, scale per channel, residual."""

    dtype: str
    norm_eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        width, precision = x.shape[-1], matmul_precision(self.dtype)
        conv = nn.Conv(
            width, (7, 7), padding=3, feature_group_count=width, dtype=self.dtype, precision=precision, name="conv"
        )
        y = nn.LayerNorm(self.norm_eps, self.dtype, use_fast_variance=False, name="norm")(conv(x))
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, precision=precision, name="up")(y), approximate=False)
        return x + LayerScale(name="scale")(nn.Dense(width, dtype=self.dtype, precision=precision, name="down")(y))


class ConvNeXt(nn.Module):
    """Normalised pixels -> logits, float32."""

    cfg: ConvNeXtConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B K"]:
        c = self.cfg
        precision = matmul_precision(c.dtype)
        for i, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True)):
            norm = nn.LayerNorm(c.norm_eps, c.dtype, use_fast_variance=False, name=f"norm{i}")
            side = 2 if i else 4
            shrink = nn.Conv(
                width, (side, side), (side, side), "VALID", dtype=c.dtype, precision=precision, name=f"conv{i}"
            )
            x = shrink(norm(x)) if i else norm(shrink(x))
            for j in range(depth):
                x = ConvNeXtBlock(c.dtype, c.norm_eps, name=f"stage{i}_block{j:02d}")(x)
        x = x.astype(jnp.float32).mean((1, 2))
        x = nn.LayerNorm(c.final_norm_eps, use_fast_variance=False, name="norm")(x)
        return nn.Dense(c.classes, precision=jax.lax.Precision.HIGHEST, name="logits")(x)
