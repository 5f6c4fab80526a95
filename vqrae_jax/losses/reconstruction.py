"""Distances between images, and between feature maps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(a: Float[Array, "*b C"], b: Float[Array, "*b C"]) -> Float[Array, ""]:
    """Returns the mean absolute difference."""
    return jnp.mean(jnp.abs(a - b))


def l2(a: Float[Array, "*b C"], b: Float[Array, "*b C"]) -> Float[Array, ""]:
    """Returns the mean squared difference."""
    return jnp.mean((a - b) ** 2)


def cosine(a: Float[Array, "*b C"], b: Float[Array, "*b C"]) -> Float[Array, ""]:
    """Returns the mean of 1 - cosine; the product of the lengths is at least 1e-4, which bounds the gradient."""
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.mean(1 - jnp.sum(a * b, -1) / jnp.sqrt(jnp.maximum(squares, 1e-8)))


def gradient_difference(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Returns the mean absolute difference of the steps between neighboring pixels (Mathieu et al. 2016).

    It counts edges that only one of the images has (arXiv:1511.05440, with alpha = 1 and the sign of the steps).
    """
    return sum(l1(jnp.diff(a, axis=axis), jnp.diff(b, axis=axis)) for axis in (1, 2)) / 2


def gram_distance(a: Float[Array, "B H W *l C"], b: Float[Array, "B H W *l C"]) -> Float[Array, " B *l"]:
    """Returns |G(a) - G(b)|^2 of unit vectors, in [0, 2]; G(x) is the mean of x x^T over positions, [C, C].

    These are the Gram matrices of Gatys et al. (2015, arXiv:1508.06576), which keep the texture of an image and not
    where it is. There G is the sum of vectors of any length, and the distance is divided by 4 H^2 W^2 C^2; a mean of
    unit vectors has the trace 1, so that the size of this distance depends neither on resolution nor on channels.
    """
    precision = jax.lax.Precision.HIGHEST
    first, second = (jnp.einsum("bhw...c,bhw...d->b...cd", x, x, precision=precision) for x in (a, b))
    return jnp.sum(((first - second) / (a.shape[1] * a.shape[2])) ** 2, axis=(-2, -1))


PIXEL = {"l1": l1, "l2": l2}
FEATURES = {"cosine": cosine, "l2": l2}


def feature_distance(name: str, a: Float[Array, "*b F"], b: Float[Array, "*b F"], layers: int) -> Float[Array, ""]:
    """Returns the mean over layers, concatenated in the last axis, of the distance `name` in FEATURES; float32."""
    a, b = (x.astype(jnp.float32).reshape(*x.shape[:-1], layers, -1) for x in (a, b))
    return FEATURES[name](a, b)
