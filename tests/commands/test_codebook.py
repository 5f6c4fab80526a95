import jax
import numpy as np
import pytest

from vqrae_jax.commands import codebook
from vqrae_jax.data import images
from vqrae_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("quantizer", [
    "simvq", "multiscale", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fsq", "product", "residual")),
])  # fmt: skip
def test_metrics_are_those_of_the_training_log(untrained, pixels, quantizer):
    """Counts and error are those of the quantizer, of all levels."""
    tokenizer = untrained(quantizer=quantizer)
    metrics, charts = codebook.analyze(tokenizer, pixels)
    out = jax.jit(lambda v, x: tokenizer.module.apply(v, x, method="forward"))(tokenizer.variables, pixels / 255)
    expected = out.quantized.metrics
    assert metrics["quantization_error"] == pytest.approx(float(expected["quantization_error"]), rel=1e-4)
    assert metrics["usage"] == pytest.approx(np.mean(np.asarray(expected["counts"]) > 0))
    assert (metrics["images"], metrics["codes"]) == (5, tokenizer.codebook_size)
    assert all(chart.dtype == np.uint8 and chart.ndim == 3 for chart in charts.values())
    assert set(charts) == {"use", "map", "patches", "positions"}


def test_a_continuous_autoencoder_has_no_report(untrained, pixels):
    with pytest.raises(ConfigError) as error:
        codebook.analyze(untrained(quantizer="none"), pixels)
    assert error.value.field == "--checkpoint"


def test_charts():
    indices = np.zeros((4, 2, 2), int)
    indices[:, 1, 1] = [0, 1, 2, 3]
    positions = codebook.positions_chart(indices, 4)
    assert positions[0, 0, 0] == 0
    assert positions[-1, -1, 0] == 255
    pixels = np.arange(4 * 16 * 3, dtype=np.uint8).reshape(4, 4, 4, 3)
    errors = np.ones((4, 2, 2))
    errors[2, 0, 1] = 0
    patches = codebook.patches_chart(pixels, indices, errors, np.asarray([13, 1, 1, 1]))
    np.testing.assert_array_equal(patches[:2, :2], pixels[2, :2, 2:])


def test_the_command_writes_the_report(untrained, pixels, tmp_path, monkeypatch, capsys):
    for i, image in enumerate(pixels):
        images.write_image(tmp_path / "photos" / f"{i}.png", image)
    monkeypatch.setattr(codebook.Tokenizer, "load", lambda path, step: untrained())
    arguments = ["--checkpoint=x", f"--data={tmp_path / 'photos'}", f"--output={tmp_path / 'report'}", "--alarm=1"]
    codebook.report(codebook.parser.parse_args(arguments))
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"use.png", "map.png", "patches.png", "positions.png", "report.json"}
    assert "ALARM" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        codebook.report(codebook.parser.parse_args([*arguments, f"--data={tmp_path / 'empty'}"]))
    assert error.value.field == "--data"
