"""Distances between pictures."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, ""]:
    """Mean absolute difference."""
    return jnp.mean(jnp.abs(reconstruction - image))


def l2(reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, ""]:
    """Mean squared difference."""
    return jnp.mean((reconstruction - image) ** 2)


LOSSES = {"l1": l1, "l2": l2}
