"""Losses on a learned codebook as a whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.quantizers.nearest import unit


def orthogonality(codebook: Float[Array, "K C"]) -> Float[Array, ""]:
    """Mean squared cosine between codes, |U U^T - I|^2 / K^2 for the unit codes U (Shin et al. 2021, arXiv:2112.00384).

    Computed as (|U^T U|^2 - K) / K^2, which needs a C x C matrix instead of K x K. In [0, 1].
    """
    codes = unit(codebook)
    gram = jnp.dot(codes.T, codes, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(gram**2) - len(codes), 0.0) / len(codes) ** 2
