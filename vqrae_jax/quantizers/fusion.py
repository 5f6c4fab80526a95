"""A learned combination of several layers of an encoder, in front of a quantizer."""

from typing import Annotated, Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.quantizers import registry
from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.base import Mapped, Quantized, flatten

Method = Literal["linear", "routed"]
LEARNED: tuple[str, ...] = get_args(Method)


class Fused(Mapped):
    """Layers x_1 ... x_L of an encoder become one latent by a learned combination, which starts as their mean.

    linear: z = norm(sum_l W_l x_l), where W_l is I / L at first. routed: z = norm(sum_l p_l x_l), where p is the
    softmax over layers of a linear map of all x, which is 0 at first; unlike the depth routing of DRoRAE (Zhu et al.
    2026, arXiv:2605.10780), without networks per layer, negative weights and a residual to the last layer.

    norm makes the mean 0 and the variance 1 over the channels of every latent: no loss can shrink the latents.

    `params`: fusion. The variables of the inner quantizer are under `quantizer`.
    """

    quantizer: registry.Inside
    channels: registry.Channels
    layers: Annotated[int, registry.Setting("number of layers L; the input has L C channels, layer by layer", "")]
    method: Annotated[Method, registry.Setting("a linear map of every layer, or weights of the layers per token", "")]

    def setup(self):
        self.fusion = Fusion(self.channels, self.layers, self.method)

    def __call__(self, z: Float[AnyArray, "*b LC"], train: bool = False) -> Quantized:
        return self.quantizer(self.fuse(z), train)

    def fuse(self, z: Float[AnyArray, "*b LC"]) -> Float[Array, "*b C"]:
        """Returns the latents that the quantizer inside receives; NaN where a layer is not finite."""
        flat, finite = flatten(z, self.layers * self.channels)
        # NaN bypasses the fusion: inside, it would reach the gradient of its kernels.
        return jnp.where(finite[:, None], self.fusion(flat), jnp.nan).reshape(*z.shape[:-1], -1)


class Fusion(nn.Module):
    """The combination of `Fused`, for rows of L C channels."""

    channels: int
    layers: int
    method: Method

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N LC"]) -> Float[Array, "N C"]:
        precision = jax.lax.Precision.HIGHEST
        if self.method == "linear":
            z = nn.Dense(self.channels, False, precision=precision, kernel_init=_mean_of_layers, name="linear")(x)
        else:
            zeros = nn.initializers.zeros
            p = nn.softmax(nn.Dense(self.layers, precision=precision, kernel_init=zeros, name="router")(x))
            z = jnp.einsum("nl,nlc->nc", p, x.reshape(len(x), self.layers, -1), precision=precision)
        return nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False, name="norm")(z)


def _mean_of_layers(key: jax.Array, shape: tuple[int, int], dtype: Any) -> Float[Array, "LC C"]:
    layers = shape[0] // shape[1]
    return jnp.tile(jnp.eye(shape[1], dtype=dtype), (layers, 1)) / layers
