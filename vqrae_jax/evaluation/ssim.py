"""Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861), with their Gaussian window."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def ssim(reconstruction: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean similarity per picture, at most 1; both in [0, 1], the reconstruction is clipped.

    Per channel, over the positions where the whole window lies inside the picture, population variances: the form on
    which scikit-image (gaussian_weights=True, use_sample_covariance=False) and torchmetrics agree.

    Raises:
      ValueError: a side is shorter than the window.
    """
    if min(image.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM looks at windows of {WINDOW} pixels; the pictures have {image.shape[1:3]}")
    # Moments are taken about the picture's mean, so that their differences keep more digits.
    centre = image.mean((1, 2), keepdims=True)
    x, y = jnp.clip(reconstruction, 0, 1) - centre, image - centre
    mean_x, mean_y, xx, yy, xy = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    variance = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    mean_x, mean_y = mean_x + centre, mean_y + centre
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance + c2)
    return similarity.mean((1, 2, 3))


def _blur(x: Float[Array, "*b H W C"]) -> Float[Array, "*b h w C"]:
    """The Gaussian window at every position where it fits, as shifted sums: exact in float32 on every device."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offset / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (-3, -2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights))
    return x
