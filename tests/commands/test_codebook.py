import json

import jax
import numpy as np
import pytest

from vqrae_jax.commands import codebook
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, DataError
from vqrae_jax.evaluation import report as evaluation_report


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    *({"quantizer": name} for name in ("residual", "simvq", "fsq", "product", "multiscale")),
    {"encoder_params": {"layers": (0, -1), "fusion": "routed"}},
])  # fmt: skip
def test_metrics_are_those_of_the_training_log(untrained, pixels, fields):
    """Counts and error are those of the quantizer, of all levels."""
    tokenizer = untrained(**fields)
    metrics, charts = codebook.analyze(tokenizer, pixels)
    out = jax.jit(lambda v, x: tokenizer.module.apply(v, x, method="forward"))(tokenizer.variables, pixels / 255)
    expected = out.quantized.metrics
    assert metrics["quantization_error"] == pytest.approx(float(expected["quantization_error"]), rel=1e-4)
    assert metrics["usage"] == pytest.approx(np.mean(np.asarray(expected["counts"]) > 0))
    assert (metrics["images"], metrics["codes"]) == (5, tokenizer.codebook_size)
    assert all(chart.dtype == np.uint8 and chart.ndim == 3 for chart in charts.values())
    assert set(charts) == {"use", "map", "patches", "positions"}


@pytest.mark.slow
def test_a_continuous_autoencoder_has_no_report(untrained, pixels):
    with pytest.raises(ConfigError) as error:
        codebook.analyze(untrained(quantizer="none"), pixels)
    assert error.value.field == "--checkpoint"


def test_charts():
    indices = np.zeros((4, 2, 2), int)
    indices[:, 1, 1] = [0, 1, 2, 10**9]
    np.testing.assert_array_equal(codebook.position_entropy(indices), [[0, 0], [0, 2]])
    pixels = np.arange(4 * 16 * 3, dtype=np.uint8).reshape(4, 4, 4, 3)
    decoded, errors = np.full_like(pixels, 7), np.ones((4, 2, 2))
    errors[2, 0, 1] = 0
    patches = codebook.patches_chart(pixels, decoded, np.minimum(indices, 3), errors, np.asarray([13, 1, 1, 1]))
    row = patches[codebook.HEADER : codebook.HEADER + codebook.PATCH, codebook.LABEL :]
    step, scale = codebook.PATCH + codebook.visualize.GAP, codebook.PATCH // 2
    assert (row[:, : codebook.PATCH] == 7).all()
    np.testing.assert_array_equal(row[::scale, 2 * step :][:, : codebook.PATCH : scale], pixels[2, :2, 2:])
    assert patches[codebook.HEADER :, : codebook.LABEL].min() < 100, "rows have labels"


def test_the_command_writes_the_report(untrained, pixels, tmp_path, monkeypatch, capsys):
    for i, image in enumerate(pixels):
        images.write_image(tmp_path / "photos" / f"{i}.png", image)
    monkeypatch.setattr(codebook.Tokenizer, "load", lambda path, *args, **options: untrained())
    arguments = ["--checkpoint=x", f"--data={tmp_path / 'photos'}", f"--output={tmp_path / 'report'}", "--alarm=1"]
    codebook.report(codebook.parser.parse_args(arguments))
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"use.png", "map.png", "patches.png", "positions.png", "report.json", "index.html"}
    assert "ALARM" in capsys.readouterr().err
    page = (tmp_path / "report" / "index.html").read_text()
    assert "ALARM" in page
    for name, (title, explanation) in codebook.FIGURES.items():
        assert title in page
        assert explanation in page
        assert f'src="{name}.png"' in page
    for metric in json.loads((tmp_path / "report" / "report.json").read_text()):
        assert evaluation_report.describe_metric(metric)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        codebook.report(codebook.parser.parse_args([*arguments, f"--data={tmp_path / 'empty'}"]))
    assert error.value.field == "--data"
