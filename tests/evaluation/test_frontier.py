"""Rates of tokenizers, files of codecs at equal bytes, and the metrics of both."""

import types

import numpy as np
import pytest

from vqrae_jax.build.judges import MetricNetworks
from vqrae_jax.config import DataConfig, QuantizerParams
from vqrae_jax.data import images as image_files
from vqrae_jax.data.pipeline import evaluation_batches
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import frontier
from vqrae_jax.evaluation.metrics import border_contrast, psnr
from vqrae_jax.evaluation.visualize import to_uint8
from vqrae_jax.quantizers.ema import EMAQuantizer
from vqrae_jax.quantizers.multiscale import MultiScale
from vqrae_jax.quantizers.product import Product
from vqrae_jax.quantizers.residual import Residual
from vqrae_jax.quantizers.wrappers import Projected

NO_NETWORKS = MetricNetworks({}, {}, {})


@pytest.fixture(scope="module")
def pixels():
    """Noise that is smooth in one image, so that files differ in size."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    noise[1] = noise[1, :4, :4].repeat(8, 0).repeat(8, 1)
    return noise


@pytest.fixture(scope="module")
def batches(pixels, tmp_path_factory):
    """A function that returns the images in batches; one file is broken."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(pixels):
        image_files.write_image(folder / f"{i}.png", image)
    (folder / "1 broken.png").write_bytes(b"")
    data = DataConfig(source="folder", eval_path=str(folder), image_size=32)
    return lambda size: evaluation_batches(data.model_copy(update={"eval_batch_size": size}))


@pytest.fixture(scope="module")
def tokenizer(untrained):
    """Indices of two levels."""
    return untrained(quantizer="residual", quantizer_params=QuantizerParams(depth=2))


def test_rates_are_those_of_all_prefixes(tokenizer):
    plain = EMAQuantizer(32, 6)
    rates = frontier.list_rates(tokenizer)
    assert [length for _, length in rates] == [1, 2]
    assert [bits for bits, _ in rates] == pytest.approx([n / 2 * tokenizer.bits_per_image for n in (1, 2)])
    for quantizer, shape, expected in (
        (plain, (4, 4), [(80, 4)]), (Product(plain, 2), (4, 4, 2), [(160, 2)]),
        (MultiScale(plain, (1, 2, 4)), (21,), [(5, 1), (25, 5), (105, 21)]),
        (Projected(Residual(plain, 2), 12), (16, 2), [(80, 1), (160, 2)]),
    ):  # fmt: skip
        module = types.SimpleNamespace(quantizer=quantizer)
        assert frontier.list_rates(types.SimpleNamespace(code_shape=shape, codebook_size=32, module=module)) == expected


@pytest.mark.parametrize("codec", frontier.CODECS)
def test_files_have_the_largest_quality_that_fits(pixels, codec):
    suffix, qualities, options = frontier.CODECS[codec]

    def sizes(quality):
        return np.array([8 * len(image_files.encode_image(x, suffix, quality=quality, **options)) for x in pixels])

    limits = [8.0, float(np.median(sizes(20))), 1e7]
    points = {key[1:]: rest for key, *rest in frontier.compress(codec, limits, pixels)}
    for quality in (qualities[i] for i in frontier.CURVE):
        np.testing.assert_array_equal(points["quality", quality][1], sizes(quality))
    decoded, bits = points["limit", 8]
    assert not decoded.any()
    assert not bits.any()
    np.testing.assert_array_equal(points["limit", 1e7][1], sizes(100))
    bits, by_quality = points["limit", limits[1]][1], np.stack([sizes(quality) for quality in qualities])
    best = np.where(by_quality <= limits[1], by_quality, 0).max(0)
    np.testing.assert_allclose(bits, best, rtol=0.03)  # sizes need not increase with every single step of the quality
    assert (bits <= limits[1]).all()
    assert (bits > 0).any()


@pytest.mark.slow
def test_metrics_are_those_of_the_prefixes_and_do_not_depend_on_batches(tokenizer, pixels, batches):
    result = frontier.measure({"one": tokenizer}, batches(4), NO_NETWORKS)
    points = {point["length"]: point for point in result["points"] if point["name"] == "one"}
    indices = tokenizer.encode_to_indices(pixels)
    for length, point in points.items():
        decoded = to_uint8(tokenizer.decode_from_indices(indices[..., :length])) / np.float32(255)
        assert point["psnr"] == pytest.approx(float(psnr(decoded, pixels / np.float32(255)).mean()), rel=1e-5)
        contrast = [np.asarray(border_contrast(x, 8)).sum(0) for x in (decoded, pixels / np.float32(255))]
        assert point["seams"] == pytest.approx(np.divide(*contrast[0]) / np.divide(*contrast[1]), rel=1e-4)
    rates = [bits for bits, _ in frontier.list_rates(tokenizer)]
    assert [point["bits_per_image"] for point in points.values()] == rates
    assert (result["protocol"]["images"], result["protocol"]["images_unreadable"]) == (3, 1)
    assert all("psnr" in point for point in result["points"] if "quality" in point)
    # All files are larger than the codes of these small images.
    assert [x for x in result["points"] if "limit" in x] == [
        {"name": codec, "limit": bits, "images": 0} for codec in frontier.CODECS for bits in rates
    ]
    (point,) = frontier.measure({"one": tokenizer}, batches(2), NO_NETWORKS, codecs=False)["points"]
    assert {**point, "name": 0} == pytest.approx({**points[2], "name": 0}, rel=1e-4)


def test_an_image_has_no_distance_to_itself(tokenizer, pixels):
    compare = frontier.build_comparison(tokenizer, NO_NETWORKS)(pixels)
    scores = compare(pixels, 8)
    np.testing.assert_array_equal(scores["psnr"], 100)
    np.testing.assert_allclose(scores["feature_distance"], 0, atol=1e-6)
    np.testing.assert_allclose(scores["contrast"][:, 0], scores["contrast"][:, 1], rtol=1e-6)
    others = compare(pixels[::-1], 8)
    assert (others["feature_distance"][[0, 2]] > 1e-3).all()


@pytest.mark.slow
def test_images_that_cannot_be_read_are_an_error(tokenizer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    data = DataConfig(source="folder", eval_path=str(tmp_path), image_size=32, eval_batch_size=4)
    with pytest.raises(DataError) as error:
        frontier.measure({"one": tokenizer}, evaluation_batches(data), NO_NETWORKS, codecs=False)
    assert error.value.field == "data.eval_path"
