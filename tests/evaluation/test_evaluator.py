import numpy as np
import pytest

from vqrae_jax.evaluation.evaluator import Evaluator
from vqrae_jax.evaluation.frechet import frechet_distance
from vqrae_jax.evaluation.kernel_distance import kernel_distance
from vqrae_jax.evaluation.moments import Gaussian

COUNT, WIDTH = 60, 6


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, COUNT)
    return {
        "index": np.arange(COUNT),
        "mask": np.ones(COUNT, bool),
        "label": label,
        "psnr": rng.uniform(10, 30, COUNT),
        "code": rng.normal(size=(COUNT, 4)) + 5 * label[:, None],
        "inception/image": rng.normal(size=(COUNT, WIDTH)),
        "inception/reconstruction": rng.normal(size=(COUNT, WIDTH)) + 0.5,
        "scores/reconstruction": rng.normal(size=(COUNT, 10)),
    }


def evaluated(rows, batch, **options):
    """In batches whose order within is not that of the data, the last one padded with what must not count."""
    evaluator, rng = Evaluator(COUNT, **options), np.random.default_rng(1)
    for start in range(0, COUNT, batch):
        part = {name: values[start : start + batch] for name, values in rows.items()}
        missing = batch - len(part["mask"])
        part = {n: np.concatenate([v, np.full((missing, *v.shape[1:]), 7)]).astype(v.dtype) for n, v in part.items()}
        part["mask"][batch - missing :] = False
        order = rng.permutation(batch)
        evaluator.add({name: values[order] for name, values in part.items()})
    return evaluator


def gaussian(x):
    return Gaussian(x.mean(0), np.cov(x, rowvar=False))


def test_figures_are_those_of_all_pictures_at_once(rows):
    a, b = rows["inception/image"], rows["inception/reconstruction"]
    other = Gaussian(np.ones(WIDTH), 2 * np.eye(WIDTH), 100)
    figures = evaluated(rows, 7, references={"inception": other}).figures(np.array([3 * COUNT, COUNT]))
    assert figures["images"] == COUNT
    assert figures["psnr"] == pytest.approx(rows["psnr"].mean())
    assert figures["rfid"] == pytest.approx(frechet_distance(gaussian(a), gaussian(b)))
    assert figures["fid"] == pytest.approx(frechet_distance(other, gaussian(b)))
    assert figures["inception_kernel"] == pytest.approx(kernel_distance(a, b))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert figures["inception_cosine"] == pytest.approx(1 - cosine.mean())
    assert figures["probe_accuracy"] == 1
    assert figures["bits_per_image"] == 4
    assert figures["entropy_bits_per_image"] == pytest.approx(4 * (0.75 * np.log2(4 / 3) + 0.25 * 2))


@pytest.mark.parametrize("batch", [1, 13, 64])
def test_batches_and_padding_change_nothing(rows, batch):
    whole, split = (evaluated(rows, size) for size in (COUNT, batch))
    assert split.figures() == pytest.approx(whole.figures(), rel=1e-10)
    np.testing.assert_array_equal(split.scores("index"), np.arange(COUNT))


@pytest.mark.parametrize("places", [2, 5])
def test_places_merge_to_the_whole(rows, places):
    """As processes do that each saw other rows of every batch; one of five saw nothing but padding."""
    whole, merged = evaluated(rows, COUNT), Evaluator(COUNT)
    for place in range(places):
        part = {name: values[place % 4 :: min(places, 4)].copy() for name, values in rows.items()}
        part["mask"][:] = place < 4
        seen = Evaluator(COUNT)
        for start in range(0, len(part["mask"]), 4):
            seen.add({name: values[start : start + 4] for name, values in part.items()})
        merged.merge(seen.arrays())
    assert merged.figures() == pytest.approx(whole.figures(), rel=1e-10)
    np.testing.assert_array_equal(merged.scores("psnr"), rows["psnr"])


def test_best_median_and_worst(rows):
    evaluator = evaluated(rows, 16)
    chosen = {kind: rows["psnr"][which] for kind, which in evaluator.pick(3).items()}
    ranked = np.sort(rows["psnr"])[::-1]
    np.testing.assert_array_equal(chosen["best"], ranked[:3])
    np.testing.assert_array_equal(chosen["worst"], ranked[-3:])
    assert ranked[31] in chosen["median"] or ranked[29] in chosen["median"]
    assert {kind: len(which) for kind, which in evaluator.pick(100).items()} == dict.fromkeys(chosen, COUNT)


def test_too_few_pictures_are_told(rows, caplog):
    few = Evaluator(4)
    few.add({name: values[:4] for name, values in rows.items() if name not in ("code", "label")})
    figures = few.figures()
    assert "rfid" in figures
    assert "4 pictures, fewer than the 6 dimensions" in few.remarks[0]
    assert few.remarks[0] in caplog.text
    one = Evaluator(1)
    one.add({name: values[:1] for name, values in rows.items()})
    assert "rfid" not in one.figures()
    assert any("no distribution" in remark for remark in one.remarks)
    assert any("linear probe" in remark for remark in one.remarks)


def test_unlabelled_pictures_have_no_probe(rows):
    evaluator = Evaluator(COUNT)
    evaluator.add(rows | {"label": np.full(COUNT, -1)})
    assert "probe_accuracy" not in evaluator.figures()
    assert "linear probe" in evaluator.remarks[0]


def test_the_kernel_distance_looks_at_the_first_pictures(rows):
    figures = evaluated(rows, 7, kernel_images=10).figures()
    expected = kernel_distance(rows["inception/image"][:10], rows["inception/reconstruction"][:10])
    assert figures["inception_kernel"] == pytest.approx(expected)
