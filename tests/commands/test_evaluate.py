import json
from unittest import mock

import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.commands import evaluate
from vqrae_jax.data import images
from vqrae_jax.errors import UserError
from vqrae_jax.evaluation import report


def run(*arguments):
    return evaluate.evaluate(evaluate.parser.parse_args([*map(str, arguments)]))


def test_the_command_measures_tokenizers_and_codecs(trained, photos, tmp_path, capsys):
    output = tmp_path / "new" / "folder.v2"
    arguments = ["--checkpoint", trained, f"{trained}/", f"--images={photos}", "--batch=8", "--limit=13"]
    result = run(*arguments, "--frontier", f"--output={output}")
    written = json.loads((output / "frontier.json").read_text())
    assert written == result
    assert images.read_image(output / "frontier.png").shape[1] > 1000
    first, second = (point for point in written["points"] if "length" in point)
    assert written["protocol"]["checkpoints"] == {first["name"]: str(trained), second["name"]: f"{trained}/"}
    assert first["bits_per_image"] == Tokenizer.load(trained).bits_per_image
    assert first | {"name": ""} == second | {"name": ""}
    assert {point["name"] for point in written["points"]} == {first["name"], second["name"], "JPEG", "WebP"}
    metrics = {"psnr", "ssim", "feature_distance", "seams", "bits_per_image", "images"}
    assert set(first) == {"name", "length", *metrics}
    assert all(report.describe_metric(name) for name in metrics)
    capsys.readouterr()
    (point,) = run(*arguments[:2], *arguments[3:])["points"]
    assert point["psnr"] == pytest.approx(first["psnr"])
    assert f"psnr {point['psnr']:.5g}" in capsys.readouterr().out


def test_the_chart_shows_complete_points_and_curves_near_the_rates():
    """A codec is shown from its lowest quality on, however large its files are."""
    values = {"psnr": 20.0, "feature_distance": 0.1}
    points = [{"name": "one", "length": n, "bits_per_image": 100.0 * n, **values} for n in (1, 2)]
    points += [{"name": "JPEG", "quality": n, "bits_per_image": 1000.0 * n, **values} for n in (1, 2, 9)]
    points += [
        {"name": "JPEG", "limit": 100, "images": 1},
        {"name": "JPEG", "limit": 200, "bits_per_image": 190.0, **values},
    ]
    curves = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.visualize, "curves", lambda *args: curves.update(args=args) or b"")
        evaluate.chart(points)
    panels, _, units, marks = curves["args"]
    assert list(panels) == list(marks) == ["PSNR", "Feature distance"]
    assert set(panels) <= set(units)
    assert panels["PSNR"] == {"one": ([100, 200], [20.0, 20.0]), "JPEG": ([1000, 2000], [20.0, 20.0])}
    assert marks["PSNR"] == {"one": ([100, 200], [20.0, 20.0]), "JPEG": ([190], [20.0])}
    assert np.unique(np.frombuffer(evaluate.chart(points), np.uint8)).size > 1


def test_invalid_arguments(trained, photos, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    tokenizers = {"run": Tokenizer.load(trained), "continuous": mock.Mock(spec=Tokenizer, has_codes=False)}
    tokenizers["large"] = mock.Mock(spec=Tokenizer, has_codes=True, image_size=64)
    monkeypatch.setattr(evaluate.Tokenizer, "load", lambda path, *args, **options: tokenizers[path])
    for field, arguments in (
        ("--output", ["--frontier"]), ("--output", [f"--output={tmp_path}"]), ("--images", ["--images="]),
        ("--images", [f"--images={tmp_path / 'missing'}"]), ("--images", [f"--images={tmp_path / 'empty'}"]),
        ("--lpips", ["--lpips", "none/such.safetensors", "none/such.pth"]),
        ("--checkpoint", ["--checkpoint=continuous"]), ("--checkpoint", ["--checkpoint", "run", "large"]),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            run("--checkpoint=run", f"--images={photos}", *arguments)
        assert error.value.field == field
