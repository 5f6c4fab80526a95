import json
import math

import numpy as np
import pytest

from vqrae_jax.commands import plot
from vqrae_jax.data import images
from vqrae_jax.errors import DataError, UserError


def write(folder, lines):
    folder.mkdir(parents=True)
    (folder / plot.METRICS_FILE).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def workdir(tmp_path):
    lines = [{"step": s, "time": 1.0, "loss/total": 1 / s, "eval/psnr": 10.0 + s} for s in (10, 20, 30)]
    return write(tmp_path / "run", map(json.dumps, lines))


def run(workdir, output, *arguments):
    return plot.plot(plot.parser.parse_args([f"--workdir={workdir}", f"--output={output}", *arguments]))


def test_metrics_are_read_by_rising_steps_and_the_later_line_counts(tmp_path):
    lines = ['{"step": 10, "a": 1}', '{"step": 20, "a": 2}', '{"step": 10, "a": 3, "b": NaN}', '{"step": 30, "a"']
    curves = plot.read_metrics(write(tmp_path / "run", lines))
    assert curves["a"] == ([10, 20], [3, 2])
    assert curves["b"][0] == [10]
    assert math.isnan(curves["b"][1][0])


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), pytest.param(".pdf", b"%PDF", marks=pytest.mark.slow), (".SVG", b"<?xml")],
)
def test_the_command_plots_the_metrics_of_the_run(trained, tmp_path, suffix, start, capsys):
    output = tmp_path / "out" / f"curves{suffix}"
    metrics = run(trained, output)
    assert {"loss/total", "loss/pixel", "eval/psnr", "codebook/usage", "learning_rate"} <= set(metrics)
    assert output.read_bytes().startswith(start)
    assert suffix != ".png" or len(np.unique(images.read_image(output))) > 2
    assert capsys.readouterr().err == ""


def test_several_runs_share_the_panel_of_a_metric(workdir, tmp_path, monkeypatch):
    other = write(tmp_path / "other" / "run", ['{"step": 1, "eval/psnr": 3}'])
    panels = {}
    monkeypatch.setattr(plot.visualize, "curves", lambda *arguments: panels.update(arguments[0]) or b"")
    plot.plot(plot.parser.parse_args(["--workdir", str(workdir), str(other), f"--output={tmp_path / 'x.png'}"]))
    assert panels == {
        "loss/total": {str(workdir): ([10, 20, 30], [0.1, 0.05, 1 / 30])},
        "eval/psnr": {str(workdir): ([10, 20, 30], [20.0, 30.0, 40.0]), str(other): ([1], [3])},
    }


def test_another_suffix_and_a_run_without_metrics_are_errors(tmp_path):
    missing, empty = tmp_path / "missing", write(tmp_path / "run", ["{}"])
    for folder, output, field in (
        (missing, "x.tiff", "--output"), (missing, "x.png", "--workdir"), (empty, "x.png", "--show"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            run(folder, tmp_path / output)
        assert error.value.field == field


def test_a_pattern_without_a_match_is_reported_and_the_others_are_plotted(workdir, tmp_path, capsys):
    assert run(workdir, tmp_path / "x.png", "--show", "eval/*", "nothing") == ["eval/psnr"]
    message = capsys.readouterr().err
    assert "nothing" in message
    assert "eval/psnr, loss/total" in message
    with pytest.raises(DataError, match="eval/psnr"):
        run(workdir, tmp_path / "x.png", "--show=wrong/*")
