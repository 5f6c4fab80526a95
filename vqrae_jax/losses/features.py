"""Distances between feature maps: what a decoder's extra head says of its encoder, a student of its teacher."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cosine(ours: Float[Array, "*b C"], theirs: Float[Array, "*b C"]) -> Float[Array, ""]:
    """Mean of one minus the cosine; a vector shorter than 1e-4 is orthogonal to all and has no large gradient."""
    product = jnp.sum(ours * theirs, -1)
    squares = jnp.sum(ours * ours, -1) * jnp.sum(theirs * theirs, -1)
    return jnp.mean(1 - product / jnp.sqrt(jnp.maximum(squares, 1e-8)))


def l2(ours: Float[Array, "*b C"], theirs: Float[Array, "*b C"]) -> Float[Array, ""]:
    """Mean squared difference."""
    return jnp.mean((ours - theirs) ** 2)


DISTANCES = {"cosine": cosine, "l2": l2}


def layered(name: str, ours: Float[Array, "*b F"], theirs: Float[Array, "*b F"], layers: int) -> Float[Array, ""]:
    """The mean of the distance `name` over layers whose features lie side by side in the last axis, in float32."""
    ours, theirs = (x.astype(jnp.float32).reshape(*x.shape[:-1], layers, -1) for x in (ours, theirs))
    return DISTANCES[name](ours, theirs)
