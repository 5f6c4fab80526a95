"""Frechet and kernel distance, Inception score and linear probe against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.linalg

from vqrae_jax.evaluation.distances import InceptionScore, frechet_distance, kernel_distance, linear_probe
from vqrae_jax.evaluation.moments import Gaussian


def gaussian(seed, count, width=24):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def moments(rows):
    return Gaussian(rows.mean(0), np.cov(rows, rowvar=False))


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_equals_scipy(seed):
    (m, s, _), (n, t, _) = a, b = moments(gaussian(seed, 200)), moments(gaussian(seed + 10, 300))
    expected = (m - n) @ (m - n) + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances():
    """The distance is |m - m'|^2 + sum of (sqrt(s) - sqrt(s'))^2, also for singular covariances."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    s, t = np.array([4.0, 1, 0.25, 0, 1e-3]), np.array([1.0, 1, 4, 9, 0])
    expected = 25 + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    distance = frechet_distance(Gaussian(np.zeros(5), axes * s @ axes.T), Gaussian(5 * axes[0], axes * t @ axes.T))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions():
    """A set has distance 0 from itself; pairs of points on orthogonal lines have the sum of their variances."""
    few = gaussian(0, 6)
    tolerance = 1e-9 * np.trace(moments(few).covariance)
    assert frechet_distance(moments(few), moments(few)) == pytest.approx(0, abs=tolerance)
    a, b = (scale * np.eye(24)[[i]] * np.array([[1.0], [-1.0]]) for i, scale in ((0, 1), (1, 2)))
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(2 + 8)


def test_kernel_distance_is_unbiased(monkeypatch):
    x, y = gaussian(0, 7, 5), gaussian(1, 9, 5) + 1
    within = sum(((a @ a.T / 5 + 1) ** 3)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y))
    expected = within - 2 * ((x @ y.T / 5 + 1) ** 3).mean()
    assert kernel_distance(x, y) == pytest.approx(expected)
    monkeypatch.setattr("vqrae_jax.evaluation.distances.BLOCK", 2)
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_inception_score_equals_its_definition():
    """It is the number of classes for certain predictions."""
    certain, uncertain = InceptionScore(splits=2), InceptionScore(splits=1)
    for part in np.split(np.arange(20), 4):
        certain.add(np.eye(5)[part // 4] * 100, part)
    uncertain.add(np.zeros((8, 5)), np.arange(8))
    assert certain.result() == pytest.approx((5, 0))
    assert uncertain.result() == pytest.approx((1, 0))
    logits = np.random.default_rng(0).normal(size=(30, 6)) * 2
    score = InceptionScore(splits=3)
    score.add(logits[11:], np.arange(11, 30))
    score.add(logits[:11], np.arange(11))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[i::3] for i in range(3))]
    assert score.result() == pytest.approx((np.mean(parts), np.std(parts)))


def test_linear_probe_finds_linear_classes_only():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    features = np.eye(4)[labels] @ rng.normal(size=(4, 10)) * 3 + rng.normal(size=(400, 10))
    assert linear_probe(features, labels)["accuracy"] > 0.9
    assert linear_probe(rng.normal(size=(400, 10)), labels)["accuracy"] < 0.4
    assert linear_probe(features, labels) == linear_probe(features * 1000 + 5, labels)
    labels = np.repeat([0, 1], 20)  # more features than images
    features = rng.normal(size=(40, 100)) + 2 * labels[:, None]
    assert linear_probe(features, labels)["accuracy"] == 1
