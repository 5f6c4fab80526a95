"""Peak signal-to-noise ratio."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def psnr(reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Decibels per picture; both in [0, 1], the reconstruction is clipped. Equal pictures give 100 dB, not infinity."""
    error = jnp.mean((jnp.clip(reconstruction, 0, 1) - image) ** 2, axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))
