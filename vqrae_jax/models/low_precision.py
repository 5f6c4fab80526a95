"""Matrix products in eight bits, for encoding with frozen weights.

Both sides are scaled symmetrically by their largest absolute value: activations per token, weights per output channel
(LLM.int8(), Dettmers et al. 2022, section 2.1, "vector-wise quantization"). Sums are int32 or float32.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Bits = Literal["int8", "fp8"]
TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    bits: Bits,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` without batch dimensions, its operands rounded to `bits`; takes Flax's arguments."""
    del precision, preferred_element_type
    (of_lhs, of_rhs), batch = dimension_numbers
    assert batch == ((), ()), "dense layers have no batch dimensions"
    lhs_q, lhs_scale = _rounded(lhs, of_lhs, bits)
    rhs_q, rhs_scale = _rounded(rhs, of_rhs, bits)
    sums = jax.lax.dot_general(
        lhs_q, rhs_q, dimension_numbers, preferred_element_type=jnp.int32 if bits == "int8" else jnp.float32
    )
    lhs_scale = jnp.squeeze(lhs_scale, of_lhs)
    rhs_scale = jnp.squeeze(rhs_scale, of_rhs)
    scale = lhs_scale.reshape(lhs_scale.shape + (1,) * rhs_scale.ndim) * rhs_scale
    return (sums.astype(jnp.float32) * scale).astype(lhs.dtype)


def _rounded(
    x: Float[Array, "..."], contracted: tuple[int, ...], bits: Bits
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """x / scale in eight bits and the scale, one for each vector along the contracted axes."""
    dtype = TYPES[bits]
    largest = float(jnp.iinfo(dtype).max if bits == "int8" else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=contracted, keepdims=True) / largest
    scaled = x / jnp.where(scale > 0, scale, 1.0)
    return (jnp.round(scaled) if bits == "int8" else scaled).astype(dtype), scale
