"""Distances, precision and recall, Inception score and linear probe against closed forms, SciPy and ADM's evaluator."""

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from vqrae_jax.evaluation.distances import (
    InceptionScore,
    frechet_distance,
    kernel_distance,
    linear_probe,
    precision_recall,
)  # fmt: skip
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


def defined_precision_recall(images, samples, k=3):
    """The definition of Kynkaanniemi et al., equations 1 and 2, with all distances at once."""

    def cover(points, others):
        radii = [np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(cdist(points, points))]
        return np.mean([any(row <= radii) for row in cdist(others, points)])

    return cover(images, samples), cover(samples, images)


def batched_precision_recall(images, samples, rows, columns, k=3):
    """The steps of ADM's evaluator in float32: radii by rows, and flags of both sets that blocks of pairs switch on."""

    def squared(u, v):
        return np.maximum((u * u).sum(1)[:, None] - 2 * (u @ v.T) + (v * v).sum(1), 0)

    def batches(x, size):
        return [slice(i, i + size) for i in range(0, len(x), size)]

    def radii(x):
        distances = np.concatenate(
            [np.concatenate([squared(x[r], x[c]) for c in batches(x, columns)], 1) for r in batches(x, rows)]
        )
        return np.partition(distances, np.arange(k + 1), axis=1)[:, k]

    images, samples = images.astype(np.float32), samples.astype(np.float32)
    image_radii, sample_radii = radii(images), radii(samples)
    recalled, precise = np.zeros(len(images), bool), np.zeros(len(samples), bool)
    for r in batches(images, rows):
        for c in batches(samples, columns):
            distances = squared(images[r], samples[c])
            recalled[r] |= (distances <= sample_radii[c]).any(1)
            precise[c] |= (distances <= image_radii[r, None]).any(0)
    return precise.mean(), recalled.mean()


@pytest.mark.parametrize(("count", "shift"), [(60, 0.0), (35, 0.6), (200, 2.0)])
def test_precision_and_recall_equal_definition_and_published_evaluator(count, shift, monkeypatch):
    rng = np.random.default_rng(count)
    images, samples = rng.normal(size=(90, 8)) + 5, rng.normal(size=(count, 8)) * 0.8 + 5 + shift
    expected = defined_precision_recall(images, samples)
    assert 0 < min(expected) < max(expected) < 1
    assert precision_recall(images, samples) == pytest.approx(expected, abs=1e-12)
    assert batched_precision_recall(images, samples, 40, 17) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("vqrae_jax.evaluation.distances.BLOCK", 7)
    assert precision_recall(images.astype(np.float32), samples) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_equal_and_distant_images():
    """Copies of four equal images have radius 0, and still cover each other."""
    images = np.random.default_rng(0).normal(size=(20, 6)) + 100
    assert precision_recall(images, images) == (1, 1)
    assert precision_recall(images, images + 1e3) == (0, 0)
    assert precision_recall(images, np.repeat(images[:1], 4, axis=0)) == (1, 1 / 20)


def test_inception_score_equals_the_published_evaluator():
    """Splits are successive samples, in batches of any order; the last split may be smaller."""
    logits = np.random.default_rng(1).normal(size=(23, 6)) * 3
    score = InceptionScore(splits=3, block=10)
    for part in (np.arange(15, 23), np.arange(15)):
        score.add(logits[part], part)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = []
    for i in range(0, 23, 10):
        part = share[i : i + 10]
        expected.append(np.exp((part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    assert score.result()[0] == pytest.approx(np.mean(expected), rel=1e-9)


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
