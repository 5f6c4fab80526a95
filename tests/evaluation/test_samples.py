"""Generated samples against references: metrics on any mesh equal a plain computation, files are checked first."""

import hashlib

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.linalg

from vqrae_jax import sharding
from vqrae_jax.build import judges
from vqrae_jax.config import DataConfig, EvaluationConfig
from vqrae_jax.data.images import write_image
from vqrae_jax.errors import ConfigError, DataError, WeightsError
from vqrae_jax.evaluation.distances import precision_recall
from vqrae_jax.evaluation.evaluator import SampleEvaluator

COUNT, WIDTH, SPATIAL = 90, 6, 4
RNG = np.random.default_rng(0)
REFERENCE = RNG.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
SAMPLES = RNG.integers(0, 200, (COUNT + 6, 8, 8, 3), dtype=np.uint8)
PROJECTION = RNG.normal(size=(192, WIDTH + 5 + SPATIAL)).astype(np.float32)
METRICS = ("inception", "sfid", "precision_recall", "linear_probe")


class Projection(nn.Module):
    """In place of Inception: features, class scores and spatial features are random projections of the pixels."""

    def __call__(self, image):
        rows = image[:, :8, :8].reshape(len(image), -1) @ PROJECTION
        return rows[:, :WIDTH], rows[:, WIDTH : WIDTH + 5], rows[:, -SPATIAL:]


@pytest.fixture(autouse=True)
def _projection(monkeypatch):
    def load(config, metrics):
        modules, none = {"inception": Projection()}, {"inception": {}}
        return judges.MetricNetworks(modules, none, none, spatial="sfid" in metrics)

    monkeypatch.setattr(judges, "load_metric_networks", load)


def project(images):
    rows = (images.reshape(len(images), -1) / np.float32(255)) @ PROJECTION
    return np.split(rows.astype(np.float64), [WIDTH, WIDTH + 5], axis=1)


@pytest.fixture
def reference(tmp_path):
    pooled, _, spatial = project(np.concatenate([REFERENCE, SAMPLES[:40]]))  # statistics are of more images than arr_0
    arrays = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False), "arr_0": REFERENCE}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **arrays)
    return tmp_path / "reference.npz"


def open_evaluator(path, devices=1, metrics=METRICS, count=COUNT):
    settings = EvaluationConfig(metrics=metrics, inception_reference=str(path))
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return SampleEvaluator(settings, DataConfig(image_size=8, eval_batch_size=16), mesh, metrics, count)


def batches(size, samples=SAMPLES):
    return (samples[i : i + size] for i in range(0, len(samples), size))


@pytest.fixture
def expected(reference):
    """The metrics of the samples, computed plainly."""
    (pooled, scores, spatial), file = project(SAMPLES[:COUNT]), np.load(reference)
    values = {"eval/images": COUNT}
    for name, x, suffix in (("fid", pooled, ""), ("sfid", spatial, "_s")):
        mu, sigma, covariance = file[f"mu{suffix}"], file[f"sigma{suffix}"], np.cov(x, rowvar=False)
        root = scipy.linalg.sqrtm(sigma @ covariance).real
        values[f"eval/{name}"] = ((mu - x.mean(0)) ** 2).sum() + np.trace(sigma + covariance - 2 * root)
    values["eval/precision"], values["eval/recall"] = precision_recall(project(REFERENCE)[0], pooled)
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    values["eval/inception_score"] = np.exp((share * np.log(share / share.mean(0))).sum(1).mean())
    return values | {"eval/inception_score_deviation": 0}


@pytest.mark.parametrize(("devices", "size"), [(1, 32), (8, 16)])
def test_metrics_equal_a_plain_computation(reference, expected, devices, size):
    """Samples after the first `count` are ignored; a second set has its own metrics."""
    evaluator = open_evaluator(reference, devices)
    result = evaluator.compare(batches(size))
    assert result.metrics == pytest.approx(expected, rel=1e-5)
    assert 0 < result.metrics["eval/precision"] < 1
    protocol = evaluator.protocol()
    assert protocol["samples"] == COUNT
    digest = hashlib.sha256(reference.read_bytes()).hexdigest()
    statistics = {"source": str(reference), "images": None, "sha256": digest}
    assert protocol["networks"]["inception"]["reference"] == statistics
    assert evaluator.compare(batches(size, SAMPLES[::-1])).metrics["eval/fid"] != result.metrics["eval/fid"]


def test_fewer_samples_than_a_batch_are_padded_for_all_devices(reference, expected):
    metrics = open_evaluator(reference, 8).compare(batches(96, SAMPLES[:COUNT]), 96).metrics
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_folder_of_images_is_a_reference(tmp_path):
    for number, image in enumerate(SAMPLES[:COUNT]):
        write_image(tmp_path / f"{number:02d}.png", image)
    evaluator = open_evaluator(tmp_path)
    assert evaluator.references.listings()["evaluation.inception_reference"]["images"] == COUNT
    metrics = evaluator.compare(batches(32)).metrics
    assert [metrics[f"eval/{name}"] for name in ("fid", "sfid", "precision", "recall")] == pytest.approx([0, 0, 1, 1])


def test_only_50000_samples_are_called_fid_50k(reference):
    names = {count: open_evaluator(reference, count=count).protocol()["fid"] for count in (COUNT, 50_000)}
    assert names[50_000] == "FID-50k"
    assert f"{COUNT} samples" in names[COUNT]


@pytest.mark.parametrize(
    ("options", "kind", "field"),
    [
        ({"metrics": ("lpips",)}, ConfigError, "evaluation.metrics"),
        ({"path": "None"}, ConfigError, "evaluation.inception_reference"),
        ({"count": 3}, DataError, "count"),
        ({"count": 1, "metrics": ("inception",)}, DataError, "count"),
    ],
)
def test_what_cannot_be_compared_is_an_error(reference, options, kind, field):
    with pytest.raises(kind) as error:
        open_evaluator(**({"path": reference} | options))
    assert error.value.field == field


def test_references_without_what_the_metrics_need_are_errors(reference):
    arrays = dict(np.load(reference))
    for changed in ({"mu_s": None}, {"arr_0": None}, {"arr_0": REFERENCE[:3]}):
        np.savez(reference, **{name: x for name, x in (arrays | changed).items() if x is not None})
        with pytest.raises((WeightsError, DataError)) as error:
            open_evaluator(reference)
        assert error.value.field == "evaluation.inception_reference"
        assert "eval/fid" in open_evaluator(reference, metrics=("inception",)).compare(batches(32)).metrics


def test_fewer_samples_and_floats_are_errors(reference):
    evaluator = open_evaluator(reference)
    with pytest.raises(DataError) as error:
        evaluator.compare(batches(32, SAMPLES[: COUNT - 1]))
    assert (error.value.field, error.value.value) == ("count", COUNT)
    with pytest.raises(DataError, match="float32"):
        evaluator.compare(batches(32, SAMPLES.astype(np.float32) / 255))
