"""Metrics of one reconstruction: PSNR, SSIM and the contrast of patch borders."""

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03

Images = Float[Array | np.ndarray, "B H W C"]


def compare_pixels(reconstruction: Images, image: Images, patch: int | None = None) -> dict[str, Float[Array, "B ..."]]:
    """Returns `psnr`, `ssim` for images that are large enough, and with `patch` the `contrast` [B, 2, 2].

    It is the `border_contrast` of the reconstruction and of the image.
    """
    values = {"psnr": psnr(reconstruction, image)}
    if min(image.shape[1:3]) >= WINDOW:
        values["ssim"] = ssim(reconstruction, image)
    if patch is not None:
        values["contrast"] = jnp.stack([border_contrast(x, patch) for x in (reconstruction, image)], axis=1)
    return values


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
    # Moments about the mean of the image keep more digits than dm_pix's, which differ from scikit-image by 8e-6.
    center = jnp.mean(image, (1, 2), keepdims=True)
    x, y = jnp.clip(reconstruction, 0, 1) - center, image - center
    mean_x, mean_y, xx, yy, xy = (_gaussian_blur(z) for z in (x, y, x * x, y * y, x * y))
    variance, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + center, mean_y + center
    similarity = (2 * mean_x * mean_y + K1**2) * (2 * covariance + K2**2)
    return (similarity / ((mean_x**2 + mean_y**2 + K1**2) * (variance + K2**2))).mean((1, 2, 3))


def border_contrast(images: Images, patch: int) -> Float[Array, "B 2"]:
    """Returns the mean absolute difference of neighboring pixels across patch borders, and inside patches.

    Rows and columns count together; a mean over no pixels (one patch, or patches of one pixel) is 0.

    Args:
      images: values are clipped to [0, 1].
      patch: side of a patch in pixels.
    """
    images, totals, counts = jnp.clip(images, 0, 1), 0.0, 0
    for axis in (1, 2):
        across = np.arange(1, images.shape[axis]) % patch == 0
        kinds = np.stack([across, ~across], axis=1).astype(np.float32)
        steps = jnp.abs(jnp.diff(images, axis=axis)).mean((3 - axis, 3))
        totals += jnp.dot(steps, kinds, precision=jax.lax.Precision.HIGHEST) * images.shape[3 - axis]
        counts += kinds.sum(0) * images.shape[3 - axis]
    return totals / np.maximum(counts, 1)


def _gaussian_blur(x: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
    """Applies the window where it fits, as shifted sums: exact in float32 on every device."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offset / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights))
    return x
