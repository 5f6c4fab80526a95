"""Accumulated metrics, for any batches and processes."""

import re

import numpy as np
import pytest

from vqrae_jax.evaluation.accumulator import Accumulator
from vqrae_jax.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from vqrae_jax.evaluation.moments import Gaussian

COUNT, WIDTH = 60, 6


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, COUNT)
    return {
        "index": np.arange(COUNT), "mask": np.ones(COUNT, bool), "label": label, "psnr": rng.uniform(10, 30, COUNT),
        "contrast": rng.uniform(0.1, 0.2, (COUNT, 2, 2)), "code": rng.normal(size=(COUNT, 4)) + 5 * label[:, None],
        "inception/image": rng.normal(size=(COUNT, WIDTH)),
        "inception/reconstruction": rng.normal(size=(COUNT, WIDTH)) + 0.5,
        "spatial/image": rng.normal(size=(COUNT, 5)), "spatial/reconstruction": rng.normal(size=(COUNT, 5)) * 2,
        "scores/reconstruction": rng.normal(size=(COUNT, 10)),
    }  # fmt: skip


def accumulated(rows, batch, **options):
    """Adds batches in a random order, the last one padded with values that must not count."""
    accumulator, rng = Accumulator(COUNT, **options), np.random.default_rng(1)
    for start in range(0, COUNT, batch):
        part = {name: values[start : start + batch] for name, values in rows.items()}
        missing = batch - len(part["mask"])
        part = {n: np.concatenate([v, np.full((missing, *v.shape[1:]), 7)]).astype(v.dtype) for n, v in part.items()}
        part["mask"][batch - missing :] = False
        order = rng.permutation(batch)
        accumulator.add({name: values[order] for name, values in part.items()})
    return accumulator


def moments(x):
    return Gaussian(x.mean(0), np.cov(x, rowvar=False))


def test_metrics_equal_those_of_all_images_at_once(rows):
    a, b = rows["inception/image"], rows["inception/reconstruction"]
    reference, spatial = (Gaussian(np.ones(width), 2 * np.eye(width), 100) for width in (WIDTH, 5))
    others = {"references": {"inception": reference, "spatial": spatial}, "manifolds": {"inception": a[:30] + 0.2}}
    metrics = accumulated(rows, 7, **others).metrics(np.array([3 * COUNT, COUNT]))
    assert metrics["images"] == COUNT
    assert metrics["psnr"] == pytest.approx(rows["psnr"].mean())
    (border, inside), (image_border, image_inside) = rows["contrast"].sum(0)
    assert metrics["seams"] == pytest.approx((border / inside) / (image_border / image_inside))
    original, reconstructed = moments(a), moments(b)
    assert metrics["rfid"] == pytest.approx(frechet_distance(original, reconstructed))
    assert metrics["fid"] == pytest.approx(frechet_distance(reference, reconstructed))
    original, reconstructed = (moments(rows[f"spatial/{side}"]) for side in ("image", "reconstruction"))
    assert metrics["rsfid"] == pytest.approx(frechet_distance(original, reconstructed))
    assert metrics["sfid"] == pytest.approx(frechet_distance(spatial, reconstructed))
    assert (metrics["rprecision"], metrics["rrecall"]) == precision_recall(a, b)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(a[:30] + 0.2, b)
    assert not [name for name in metrics if name.startswith("spatial")]
    assert metrics["inception_kernel"] == pytest.approx(kernel_distance(a, b))
    first = accumulated(rows, 7, kernel_images=10).metrics()
    assert first["inception_kernel"] == pytest.approx(kernel_distance(a[:10], b[:10]))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert metrics["inception_cosine"] == pytest.approx(1 - cosine.mean())
    assert metrics["probe_accuracy"] == 1
    assert metrics["bits_per_image"] == 4
    assert metrics["entropy_bits_per_image"] == pytest.approx(4 * (0.75 * np.log2(4 / 3) + 0.25 * 2))


@pytest.mark.parametrize("batch", [1, 13, 64])
def test_metrics_do_not_depend_on_batches_and_padding(rows, batch):
    split = accumulated(rows, batch, manifolds={})
    assert split.metrics() == pytest.approx(accumulated(rows, COUNT, manifolds={}).metrics(), rel=1e-10)
    np.testing.assert_array_equal(split.scores("index"), np.arange(COUNT))


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_merge_to_the_whole(rows, processes):
    """Each process has other rows of every batch; one of five has only padding."""
    whole, merged = accumulated(rows, COUNT, manifolds={}), Accumulator(COUNT, manifolds={})
    for process in range(processes):
        part = {name: values[process % 4 :: min(processes, 4)].copy() for name, values in rows.items()}
        part["mask"][:] = process < 4
        local = Accumulator(COUNT, manifolds={})
        for start in range(0, len(part["mask"]), 4):
            local.add({name: values[start : start + 4] for name, values in part.items()})
        merged.merge_arrays(local.arrays())
    assert merged.metrics() == pytest.approx(whole.metrics(), rel=1e-10)
    np.testing.assert_array_equal(merged.scores("psnr"), rows["psnr"])


def test_precision_and_recall_use_evenly_spaced_images(rows, monkeypatch):
    a, b = rows["inception/image"], rows["inception/reconstruction"]
    monkeypatch.setattr("vqrae_jax.evaluation.accumulator.LIMITS", {"image": 12, "reconstruction": 25})
    accumulator = accumulated(rows, 7, manifolds={})
    assert len(accumulator.compared("inception/reconstruction")) == 25
    metrics = accumulator.metrics()
    images, samples = (np.unique(np.ceil(np.arange(n) * COUNT / n).astype(int)) for n in (12, 25))
    assert (metrics["rprecision"], metrics["rrecall"]) == precision_recall(a[images], b[samples])
    samples = accumulated(rows, 7, manifolds={}, ordered=True)  # whose classes come in turn
    np.testing.assert_array_equal(np.sort(samples.compared("inception/reconstruction"), 0), np.sort(b[:25], 0))


def test_samples_without_images_are_compared_with_references_only(rows):
    """The splits of the Inception score are successive samples."""
    samples = {name: x for name, x in rows.items() if name in ("index", "mask") or name.endswith("reconstruction")}
    reference = moments(rows["inception/image"])
    metrics = accumulated(samples, 7, references={"inception": reference}, kernel_images=0, ordered=True).metrics()
    assert metrics.keys() == {"images", "fid", "inception_score", "inception_score_deviation"}
    assert metrics["fid"] == pytest.approx(accumulated(rows, 7).metrics()["rfid"])


def test_best_median_and_worst(rows):
    accumulator = accumulated(rows, 16)
    examples = {group: rows["psnr"][members] for group, members in accumulator.select_examples(3).items()}
    ranked = np.sort(rows["psnr"])[::-1]
    np.testing.assert_array_equal(examples["best"], ranked[:3])
    np.testing.assert_array_equal(examples["worst"], ranked[-3:])
    assert ranked[31] in examples["median"] or ranked[29] in examples["median"]
    assert [len(members) for members in accumulator.select_examples(100).values()] == [COUNT] * 3


def test_seams_of_the_originals_are_one_and_may_be_undefined(rows):
    """Flat images, one patch, and patches of one pixel have no differences across borders or none inside."""
    contrast = rows["contrast"].copy()
    contrast[:, 0] = contrast[:, 1]
    assert accumulated(rows | {"contrast": contrast}, 7).metrics()["seams"] == 1
    for part in ((slice(None), 1), (slice(None), slice(None), 0), (slice(None), slice(None), 1)):
        contrast = rows["contrast"].copy()
        contrast[part] = 0
        undefined = accumulated(rows | {"contrast": contrast}, 7)
        assert "seams" not in undefined.metrics()
        assert "seams" in "".join(undefined.warnings)


def test_too_few_images_and_missing_labels_are_warnings(rows, caplog):
    few = Accumulator(4)
    few.add({name: values[:4] for name, values in rows.items() if name not in ("code", "label")})
    three = Accumulator(3, manifolds={"inception": rows["inception/image"]})
    three.add({name: values[:3] for name, values in rows.items()})
    assert "rprecision" not in three.metrics()
    assert [text for text in three.warnings if "precision" in text]
    assert "rfid" in few.metrics()
    assert re.search(r"inception.* 4 .* 6 ", few.warnings[0])
    assert few.warnings[0] in caplog.text
    one = Accumulator(1)
    one.add({name: values[:1] for name, values in rows.items()})
    assert "rfid" not in one.metrics()
    assert [warning.partition(":")[0] for warning in one.warnings] == ["inception", "spatial", "linear probe"]
    unlabelled = Accumulator(COUNT)
    unlabelled.add(rows | {"label": np.full(COUNT, -1)})
    assert "probe_accuracy" not in unlabelled.metrics()
    assert "linear probe" in unlabelled.warnings[0]
    single = Accumulator(COUNT)
    single.add(rows | {"label": np.arange(COUNT) // (COUNT - 1)})  # the second class has one image
    assert "probe_accuracy" not in single.metrics()
