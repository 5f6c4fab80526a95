"""Gradients through the choice of an embedding, whose true derivative is zero.

Every estimator returns the embeddings bit for bit, so that quantized latents equal those of `lookup`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.quantizers.arrays import AnyArray
from vqrae_jax.quantizers.nearest import unit

Estimator = Literal["straight_through", "rotation", "diveq"]


@jax.custom_jvp
def value_of(quantized: Float[AnyArray, "*b C"], carrier: Float[AnyArray, "*b C"]) -> Float[Array, "*b C"]:
    """Returns the value of `quantized` bit for bit, with the gradient of `carrier`, which evaluation never computes."""
    return quantized


@value_of.defjvp
def _value_of_jvp(primals, tangents):
    return primals[0], tangents[1]


def straight_through(z: Float[AnyArray, "*b C"], quantized: Float[AnyArray, "*b C"]) -> Float[Array, "*b C"]:
    """Passes the gradient to z unchanged (Bengio et al. 2013, arXiv:1308.3432)."""
    return value_of(quantized, z)


def rotation(z: Float[AnyArray, "*b C"], quantized: Float[AnyArray, "*b C"]) -> Float[Array, "*b C"]:
    """Rotates and scales the gradient as z is mapped to its embedding (Fifty et al. 2024, arXiv:2410.06424).

    The embedding e is written as lambda R z, with the rotation R from z to e and lambda = |e| / |z|, both constants.
    """
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12)) for x in (z, quantized)]
    a, b, scale = jax.lax.stop_gradient((z / lengths[0], quantized / lengths[1], lengths[1] / lengths[0]))
    middle = a + b
    # Opposite directions have no unique rotation between them; the remaining reflection serves as well.
    middle = middle * jax.lax.rsqrt(jnp.maximum(jnp.sum(middle**2, axis=-1, keepdims=True), 1e-12))
    rotated = z - 2 * _dot(z, middle) * middle + 2 * _dot(z, a) * b
    return value_of(quantized, scale * rotated)


def diveq(z: Float[AnyArray, "*b C"], quantized: Float[AnyArray, "*b C"]) -> Float[Array, "*b C"]:
    """Shares the gradient between the embedding and z (DiVeQ, Vali et al. 2025, arXiv:2509.26469).

    The embedding e is written as z + |e - z| u, with the direction u of e - z as a constant: of the decoder's gradient
    g, e receives the part along u, (g . u) u, and z the rest. So embeddings train without a codebook loss. The paper
    adds a little noise to u; this is its variant without noise ("detach"), which needs no random numbers.
    """
    error = quantized - z
    direction = jax.lax.stop_gradient(unit(error))
    # error . u is |e - z| with the same gradient, which is finite at zero.
    return value_of(quantized, z + _dot(error, direction) * direction)


ESTIMATORS: dict[str, Callable] = {"straight_through": straight_through, "rotation": rotation, "diveq": diveq}


def _dot(a: Float[AnyArray, "*b C"], b: Float[AnyArray, "*b C"]) -> Float[Array, "*b 1"]:
    return jnp.sum(a * b, axis=-1, keepdims=True)
