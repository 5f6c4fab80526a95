import numpy as np
import pytest
from skimage.metrics import structural_similarity

from vqrae_jax.evaluation.ssim import ssim


def reference(a, b):
    return structural_similarity(
        a.astype(np.float64), b.astype(np.float64), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=1, channel_axis=-1, win_size=11,
    )  # fmt: skip


def pictures():
    """Noise, photographs, and flat bright fields, where variances are small against the constants."""
    from skimage import data

    rng = np.random.default_rng(0)
    cat = data.chelsea()[60:124, 100:164] / 255
    flat = np.full((64, 64, 3), 0.9)
    flat[:, 32:] += 0.05
    images = np.stack([rng.uniform(size=(64, 64, 3)), cat, flat]).astype(np.float32)
    noise = rng.normal(size=images.shape) * np.array([0.1, 0.05, 0.01])[:, None, None, None]
    return images, (images + noise).astype(np.float32)


def test_ssim_equals_scikit_image():
    images, painted = pictures()
    expected = [reference(np.clip(b, 0, 1), a) for a, b in zip(images, painted, strict=True)]
    np.testing.assert_allclose(ssim(painted, images), expected, atol=1e-6, rtol=0)


def test_ssim_of_sides_that_differ_and_of_equal_pictures():
    images, painted = (x[:, :40, :23] for x in pictures())
    expected = [reference(np.clip(b, 0, 1), a) for a, b in zip(images, painted, strict=True)]
    np.testing.assert_allclose(ssim(painted, images), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-6)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="windows of 11 pixels"):
        ssim(np.zeros((1, 10, 32, 3), np.float32), np.zeros((1, 10, 32, 3), np.float32))
