import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from vqrae_jax import Tokenizer
from vqrae_jax.build.tokenizer import build_tokenizer, initial_variables
from vqrae_jax.commands import reconstruct
from vqrae_jax.data import images
from vqrae_jax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "ü b.jpg", "c.webp")):
        images.write_image(tmp_path / "in" / name, rng.integers(0, 255, (40 + i, 50, 3), np.uint8))
    (tmp_path / "in" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "in"


def run(trained, *arguments):
    return reconstruct.reconstruct(reconstruct.parse(["--checkpoint", str(trained), *map(str, arguments)]))


def test_one_picture(trained, folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert run(trained, "--image", folder / "a.png", "--output", out) == [out]
    told = capsys.readouterr().out
    assert "a.png: PSNR" in told
    square = images.center_crop(images.read_image(folder / "a.png"), 32)
    distinct = len(np.unique(Tokenizer.load(trained).encode_to_indices(square[None])))
    assert f", 16 tokens, {distinct} distinct of 32 codes\n" in told
    assert images.read_image(out).shape == (136, 396, 3)  # three tiles of 128, gaps and frame


def test_a_folder_into_one_picture_and_into_many(trained, folder, tmp_path, capsys):
    run(trained, "--image", folder, "--output", tmp_path / "all.jpg")
    assert "skipped 1 unreadable" in capsys.readouterr().err
    written = run(trained, "--image", folder, "--output", tmp_path / "many", "--only")
    assert [p.name for p in written] == ["00000_a.png", "00001_c.png", "00002_ü b.png"]
    assert images.read_image(written[0]).shape == (32, 32, 3)


def test_a_name_that_is_no_utf_8(trained, tmp_path):
    file = tmp_path / "caf\udce9.png"
    images.write_image(file, np.zeros((32, 32, 3), np.uint8))
    given = [f"--checkpoint={trained}", f"--image={file}", f"--output={tmp_path}", f"--metrics={tmp_path / 'a.json'}"]
    command = [sys.executable, "-m", "vqrae_jax.commands.reconstruct", *given]
    told = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert told.returncode == 0, told.stderr
    assert rb"caf\udce9.png: PSNR" in told.stdout
    assert list(json.loads((tmp_path / "a.json").read_text())["pictures"]) == [str(file)]


def test_nothing_readable(trained, folder, tmp_path):
    with pytest.raises(DataError, match="none of 1 files is a readable picture"):
        run(trained, "--image", folder / "broken.png", "--output", tmp_path / "x.png")


def test_unknown_output_format(trained, folder, tmp_path):
    with pytest.raises(DataError, match=r"--output=.*x\.txt"):
        run(trained, "--image", folder / "a.png", "--output", tmp_path / "x.txt")


def test_patterns_panels_and_figures(trained, folder, tmp_path):
    report = tmp_path / "new folder" / "figures.json"
    arguments = ["--show=input,difference", f"--metrics={report}", "--format=webp", "--fit=pad"]
    written = run(trained, "--image", folder / "*.[pj]*g", "--output", tmp_path / "out", *arguments)
    assert [p.name for p in written] == ["00000_a.webp", "00001_ü b.webp"]
    assert images.read_image(written[0]).shape == (136, 266, 3)  # two tiles of 128
    told = json.loads(report.read_text())
    assert set(told["pictures"]) == {str(folder / "a.png"), str(folder / "ü b.jpg")}
    assert told["mean"]["psnr"] == pytest.approx(np.mean([p["psnr"] for p in told["pictures"].values()]))
    assert len(told["skipped"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image=*.tiff"], "no file is called like this"),
        (["--image=a.png", "--show=inputs"], "inputs is none of"),
        (["--image=a.png", "--only", "--show=difference"], "--only and --show=difference: .* leave one of them out"),
    ],
)
def test_arguments_that_mean_nothing(trained, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(trained, *arguments, "--output", tmp_path / "x.png")


def test_a_continuous_autoencoder_reconstructs(tiny, folder, tmp_path):
    config = tiny(model={"quantizer": "none"}).model
    built = build_tokenizer(config)
    variables = initial_variables(built, jax.random.key(0), ["encoder", "quantizer", "decoder"])
    Tokenizer(built.module, variables, config).save_pretrained(tmp_path / "rae", np.zeros((1, 32, 32, 3), np.uint8))
    written = run(tmp_path / "rae", "--image", folder / "a.png", "--output", tmp_path / "out.png")
    assert images.read_image(written[0]).shape == (136, 266, 3)  # no code map


def test_the_command_says_errors_in_one_line(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vqrae_jax.commands.reconstruct", f"--checkpoint={tmp_path / 'none'}", "--image",
         str(folder), "--output=out.png"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error: ")
