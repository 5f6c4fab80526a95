"""PSNR, SSIM, border contrast and codebook health against scikit-image, NumPy and closed forms."""

import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqrae_jax.evaluation.codebook_health import alarm, health
from vqrae_jax.evaluation.metrics import border_contrast, psnr, ssim


@pytest.fixture(scope="module")
def images():
    """Noise, a photograph, a flat bright image (variances below SSIM's constants); noisy copies outside [0, 1]."""
    rng = np.random.default_rng(0)
    cat = data.chelsea()[60:124, 100:164] / 255
    flat = np.full((64, 64, 3), 0.9)
    flat[:, 32:] += 0.05
    originals = np.stack([rng.uniform(size=(64, 64, 3)), cat, flat]).astype(np.float32)
    noise = rng.normal(size=originals.shape) * np.array([0.1, 0.05, 0.01])[:, None, None, None]
    return originals, (originals + noise).astype(np.float32)


def test_psnr_equals_scikit_image(images):
    originals, noisy = images
    pairs = zip(originals, np.clip(noisy, 0, 1), strict=True)
    expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    np.testing.assert_allclose(psnr(noisy, originals), expected, rtol=1e-5)
    white = np.ones((1, 4, 4, 3), np.float32)
    assert psnr(white + 0.5, white)[0] == pytest.approx(100)  # clipped, and finite


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (40, 23)])
def test_ssim_equals_scikit_image(images, size):
    originals, noisy = (x[:, : size[0], : size[1]] for x in images)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "win_size": 11}
    settings |= {"data_range": 1, "channel_axis": -1}
    pairs = zip(originals.astype(np.float64), np.clip(noisy, 0, 1).astype(np.float64), strict=True)
    expected = [structural_similarity(a, b, **settings) for a, b in pairs]
    np.testing.assert_allclose(ssim(noisy, originals), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ssim(originals, originals), 1, atol=1e-6)
    with pytest.raises(ValueError, match="11"):  # the window
        ssim(noisy[:, :10], originals[:, :10])


@pytest.mark.parametrize(("height", "width", "patch"), [(64, 64, 16), (24, 40, 8), (12, 10, 5)])
def test_border_contrast_equals_a_plain_computation(images, height, width, patch):
    for original, value in zip(images[1], border_contrast(images[1][:, :height, :width], patch), strict=True):
        pixels = np.clip(original[:height, :width].astype(np.float64), 0, 1)
        steps = {True: [], False: []}
        for y in range(height):
            for x in range(width):
                if y:
                    steps[y % patch == 0].append(np.abs(pixels[y, x] - pixels[y - 1, x]).mean())
                if x:
                    steps[x % patch == 0].append(np.abs(pixels[y, x] - pixels[y, x - 1]).mean())
        np.testing.assert_allclose(value, [np.mean(steps[True]), np.mean(steps[False])], rtol=1e-5)


def test_border_contrast_of_tiles():
    """A constant added to each patch changes only what lies across borders; a mean over no pixels is 0."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0.3, 0.5, (1, 32, 32, 3)).astype(np.float32)
    tiles = image + np.kron(rng.uniform(0, 0.5, (1, 4, 4, 1)), np.ones((1, 8, 8, 1))).astype(np.float32)
    before, after = border_contrast(image, 8)[0], border_contrast(tiles, 8)[0]
    assert after[0] > before[0]
    assert after[1] == pytest.approx(float(before[1]), rel=1e-4)
    assert border_contrast(image, 1)[0, 1] == border_contrast(image, 32)[0, 0] == 0


def test_health():
    for counts, expected in (
        ([5, 5, 5, 5], {"usage": 1.0, "perplexity": 4, "entropy_bits": 2, "dead": 0}),
        ([9, 0, 0, 0], {"usage": 0.25, "perplexity": 1, "entropy_bits": 0, "dead": 3}),
        ([0, 0, 0, 0], {"usage": 0}), ([[5, 5], [9, 0]], {"usage": 0.75, "dead": 1}),
    ):  # fmt: skip
        result = health(np.array(counts))
        assert {name: result[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("counts", "share", "message"), [
    ([3, 1, 0, 0], 0.5, None),
    ([4, 0, 0, 0], 0.5, "1 of 4 codes"),
    ([4, 0, 0, 0], 0.0, None),
    ([0] * 7 + [1] + [0] * 992, 0.5, None),  # one latent cannot use more than one code
    ([0, 0, 0, 0], 0.5, None),
    ([[2, 2], [4, 0]], 0.6, "level 1"),
])  # fmt: skip
def test_alarm(counts, share, message):
    result = alarm(np.array(counts), share)
    assert result is None if message is None else message in result
