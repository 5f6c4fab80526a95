"""Gradients through the choice of a code: what z receives where the true derivative is zero.

Each has the value of the codes exactly, so that quantized latents equal what `lookup` gives. `keep` marks the latents
that count where one is compared with the others; all where it is absent.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Estimator = Literal["straight_through", "rotation", "distance_weighted"]
Keep = Bool[Array, "*b"] | None


@jax.custom_jvp
def value_of(codes: Float[Array, "*b C"], carrier: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """The value of `codes`, bit for bit, with the gradient of `carrier`, which evaluation never computes."""
    return codes


@value_of.defjvp
def _value_of_jvp(primals, tangents):
    return primals[0], tangents[1]


def straight_through(z: Float[Array, "*b C"], codes: Float[Array, "*b C"], keep: Keep = None) -> Float[Array, "*b C"]:
    """z receives the gradient unchanged (Bengio et al. 2013, arXiv:1308.3432)."""
    return value_of(codes, z)


def rotation(z: Float[Array, "*b C"], codes: Float[Array, "*b C"], keep: Keep = None) -> Float[Array, "*b C"]:
    """The rotation trick (Fifty et al. 2024, arXiv:2410.06424): the gradient is turned and scaled as z -> code.

    The code is written as lambda R z with the rotation R from z to the code and lambda = |code| / |z|, both constants.
    """
    a, b, scale = jax.lax.stop_gradient(_directions(z, codes))
    middle = a + b
    # Opposite directions have no unique rotation between them; the reflection that is left then is as good.
    middle = middle * jax.lax.rsqrt(jnp.maximum(jnp.sum(middle**2, axis=-1, keepdims=True), 1e-12))
    turned = z - 2 * _dot(z, middle) * middle + 2 * _dot(z, a) * b
    return value_of(codes, scale * turned)


def distance_weighted(z: Float[Array, "*b C"], codes: Float[Array, "*b C"], keep: Keep = None) -> Float[Array, "*b C"]:
    """Straight-through weighted by 1 / (1 + |z - code|^2 / mean |z - code|^2).

    The estimator takes the decoder's gradient at the code for that at z; the farther apart they are, the less it is
    worth (the gap analysed by Huh et al. 2023, arXiv:2305.08842).
    """
    gap = jnp.sum((z - codes) ** 2, axis=-1, keepdims=True)
    there = jnp.ones_like(gap) if keep is None else keep[..., None]
    mean = jnp.sum(gap * there) / jnp.maximum(jnp.sum(there), 1)
    weight = jax.lax.stop_gradient(1 / (1 + gap / jnp.maximum(mean, 1e-12)))
    return value_of(codes, weight * z)


ESTIMATORS: dict[str, Callable] = {
    "straight_through": straight_through,
    "rotation": rotation,
    "distance_weighted": distance_weighted,
}


def _directions(
    z: Float[Array, "*b C"], codes: Float[Array, "*b C"]
) -> tuple[Float[Array, "*b C"], Float[Array, "*b C"], Float[Array, "*b 1"]]:
    """Unit vectors along z and its code, and the ratio of the lengths."""
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12)) for x in (z, codes)]
    return z / lengths[0], codes / lengths[1], lengths[1] / lengths[0]


def _dot(a: Float[Array, "*b C"], b: Float[Array, "*b C"]) -> Float[Array, "*b 1"]:
    return jnp.sum(a * b, axis=-1, keepdims=True)
