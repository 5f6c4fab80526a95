"""Metrics of one reconstruction: PSNR and SSIM."""

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03

Images = Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"]


def psnr(reconstruction: Images, image: Images) -> Float[Array, " B"]:
    """Returns the peak signal-to-noise ratio of each image in [0, 1] in dB, at most 100; clips reconstructions."""
    return jnp.minimum(dm_pix.psnr(jnp.clip(reconstruction, 0, 1), image), 100.0)


def ssim(reconstruction: Images, image: Images) -> Float[Array, " B"]:
    """Returns the mean structural similarity of each image (Wang et al. 2004, doi:10.1109/TIP.2003.819861), at most 1.

    Both arguments are in [0, 1]; the reconstruction is clipped. Computed per channel over the positions where the whole
    window lies inside the image, with population variances, as scikit-image (gaussian_weights=True,
    use_sample_covariance=False) and torchmetrics do.
    """
    if min(image.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {image.shape[1:3]}")
    reconstruction = jnp.clip(reconstruction, 0, 1)
    return dm_pix.ssim(reconstruction, image, k1=K1, k2=K2, filter_fn=_gaussian_blur)


def _gaussian_blur(x: Images) -> Float[Array, "B h w 3"]:
    """Applies the window where it fits, as shifted sums: dm_pix's own filter is four times slower on a CPU and less
    exact on flat images."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offset / SIGMA) ** 2)
    weights, x = (weights / weights.sum()).astype(np.float32), jnp.asarray(x)
    for axis in (1, 2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights))
    return x
