import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from vqrae_jax.evaluation.codebook_health import alarm, health
from vqrae_jax.evaluation.psnr import psnr


def test_psnr_equals_scikit_image():
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(3, 8, 8, 3)).astype(np.float32)
    noisy = np.clip(image + rng.normal(scale=0.1, size=image.shape), 0, 1).astype(np.float32)
    expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(image, noisy, strict=True)]
    np.testing.assert_allclose(psnr(noisy, image), expected, rtol=1e-5)


def test_psnr_of_equal_pictures_is_finite_and_clips():
    image = np.ones((1, 4, 4, 3), np.float32)
    assert psnr(image + 0.5, image)[0] == pytest.approx(100)


def test_health():
    even = health(np.array([5, 5, 5, 5]))
    assert even == {"usage": 1.0, "perplexity": pytest.approx(4), "entropy_bits": pytest.approx(2), "dead": 0}
    one = health(np.array([9, 0, 0, 0]))
    assert one == {"usage": 0.25, "perplexity": pytest.approx(1), "entropy_bits": 0, "dead": 3}
    assert health(np.zeros(4, int))["usage"] == 0
    levels = health(np.array([[5, 5], [9, 0]]))
    assert levels["usage"] == 0.75
    assert levels["dead"] == 1


def test_the_alarm_asks_for_no_more_codes_than_there_were_latents():
    assert alarm(np.array([3, 1, 0, 0]), 0.5) is None
    assert "1 of 4 codes are in use" in alarm(np.array([4, 0, 0, 0]), 0.5)
    assert alarm(np.array([4, 0, 0, 0]), 0.0) is None
    assert alarm(np.bincount([7], minlength=1000), 0.5) is None
    assert alarm(np.zeros(4, int), 0.5) is None
    assert "codes of level 1" in alarm(np.array([[2, 2], [4, 0]]), 0.6)
