import json
import math

import numpy as np
import pytest

from vqrae_jax.commands import plot
from vqrae_jax.data import images
from vqrae_jax.errors import DataError


def write(folder, lines):
    folder.mkdir(parents=True)
    (folder / plot.METRICS_FILE).write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(folder, scale=1.0):
    lines = [{"step": s, "time": 1.0, "loss/total": scale / s, "eval/psnr": 10.0 + s} for s in (10, 20, 30)]
    return write(folder, map(json.dumps, lines))


def test_a_log_is_read_by_rising_steps_the_later_line_counting(tmp_path):
    lines = ['{"step": 10, "a": 1}', '{"step": 20, "a": 2}', '{"step": 10, "a": 3, "b": NaN}', '{"step": 30, "a"']
    series = plot.read(write(tmp_path / "run", lines))
    assert series["a"] == ([10, 20], [3, 2])
    assert series["b"][0] == [10]
    assert math.isnan(series["b"][1][0])


def test_the_command_draws_what_the_log_has(tmp_path, capsys):
    output = tmp_path / "out" / "curves.png"
    drawn = plot.plot(plot.parse([f"--workdir={run(tmp_path / 'run')}", f"--output={output}"]))
    assert drawn == ["loss", "validation PSNR (dB)"]
    assert len(np.unique(images.read_image(output))) > 2
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_a_figure_for_a_paper_is_lines_and_letters(tmp_path, suffix, start):
    output = tmp_path / "out" / f"curves{suffix}"
    plot.plot(plot.parse([f"--workdir={run(tmp_path / 'run')}", f"--output={output}"]))
    assert output.read_bytes().startswith(start)


def test_a_suffix_of_no_picture_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match=r"--output=x\.tiff: its suffix must be one of .*\.png.*\.pdf, \.svg"):
        plot.plot(plot.parse([f"--workdir={tmp_path}", "--output=x.tiff"]))


def test_several_runs_share_a_chart(tmp_path):
    first, second = run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", 2.0)
    names = plot._names([str(first), str(second)])
    assert names == [str(first), str(second)]
    lines = plot._lines({n: plot.read(n) for n in names}, ("loss/*",))
    assert list(lines) == [f"{n}: loss/total" for n in names]


@pytest.mark.parametrize(("lines", "message"), [(None, "has no metrics.jsonl"), (["{}"], "nothing to draw")])
def test_what_cannot_be_drawn_is_said(tmp_path, lines, message):
    folder = tmp_path / "none" if lines is None else write(tmp_path / "run", lines)
    with pytest.raises(DataError, match=message):
        plot.plot(plot.parse([f"--workdir={folder}", f"--output={tmp_path / 'x.png'}"]))
    path = run(tmp_path / "other")
    with pytest.raises(DataError, match="eval/psnr"):
        plot.plot(plot.parse([f"--workdir={path}", f"--output={tmp_path / 'x.png'}", "--show=wrong/*"]))


def test_a_pattern_without_a_match_is_told_and_the_others_drawn(tmp_path, capsys):
    given = [f"--workdir={run(tmp_path / 'run')}", f"--output={tmp_path / 'x.png'}"]
    assert plot.plot(plot.parse([*given, "--show", "eval/*", "nothing"])) == ["eval/*"]
    assert (
        capsys.readouterr().err == "--show: nothing in metrics.jsonl is called nothing; it has: eval/psnr, loss/total\n"
    )
    plot.plot(plot.parse(given))
    assert capsys.readouterr().err == ""


def test_a_real_run_can_be_drawn(trained, tmp_path):
    drawn = plot.plot(plot.parse([f"--workdir={trained}", f"--output={tmp_path / 'x.png'}"]))
    assert {"loss", "validation PSNR (dB)", "share of the codes in use", "learning rate"} <= set(drawn)
