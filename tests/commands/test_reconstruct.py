import io
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vqrae_jax import Tokenizer
from vqrae_jax.commands import command_line, reconstruct
from vqrae_jax.data import images
from vqrae_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "ü b.jpg", "c.webp", "d.avif")):
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def run(checkpoint, *arguments):
    arguments = ["--checkpoint", str(checkpoint), *map(str, arguments)]
    return reconstruct.reconstruct(reconstruct.parser.parse_args(arguments))


def test_one_image(trained, folder, tmp_path, capsys):
    output = tmp_path / "out.png"
    assert run(trained, "--image", folder / "a.png", "--output", output) == [output]
    text = capsys.readouterr().out
    assert "a.png: PSNR" in text
    square = images.center_crop(images.read_image(folder / "a.png"), 32)
    different = len(np.unique(Tokenizer.load(trained).encode_to_indices(square[None])))
    assert f", 16 codes, {different} different of 32\n" in text
    assert images.read_image(output).shape == (198, 512, 3)  # three images of 160 pixels with titles


def test_a_folder_into_one_image_and_into_many(trained, folder, tmp_path, capsys):
    run(trained, "--image", folder, "--output", tmp_path / "all.jpg")
    message = capsys.readouterr().err
    assert "skipped 1 unreadable" in message
    assert "broken.png" in message
    written = run(trained, "--image", folder, "--output", tmp_path / "many.v2", "--only")
    assert [path.name for path in written] == ["00000_a.png", "00001_c.png", "00002_d.png", "00003_ü b.png"]
    assert images.read_image(written[0]).shape == (32, 32, 3)


@pytest.mark.slow
def test_fit_model_equals_the_model_on_images_of_any_size(trained, folder, tmp_path):
    """The script of the PyTorch VQRAE passes the file to the model as it is."""
    written = run(trained, "--image", folder / "[ac].*", "--output", tmp_path / "many", "--only", "--fit=model")
    tokenizer = Tokenizer.load(trained)
    apply = jax.jit(tokenizer.module.apply)
    for path, name in zip(written, ("a.png", "c.webp"), strict=True):
        image = images.read_image(folder / name)[None] / np.float32(255)
        decoded = np.clip(apply(tokenizer.variables, image), 0, 1)[0] * 255
        assert np.abs(images.read_image(path) - decoded).max() <= 0.5 + 1e-3


@pytest.mark.slow
def test_proportions_are_kept_in_files_and_in_a_picture_of_one_shape(trained, tmp_path, capsys):
    for i, shape in enumerate(((32, 48), (40, 60), (48, 32), (10, 90))):
        images.write_image(tmp_path / f"{i}.png", np.full((*shape, 3), 60 * i, np.uint8))
    written = run(trained, "--image", tmp_path / "*.png", "--output", tmp_path / "many", "--only", "--fit=keep")
    assert [images.read_image(path).shape for path in written] == [(32, 48, 3), (32, 48, 3), (48, 32, 3)]
    output = capsys.readouterr()
    assert "24 codes" in output.out
    assert "3.png: the image has 10 x 90" in output.err
    (picture,) = run(trained, "--image", tmp_path / "[01].png", "--output", tmp_path / "two.png", "--fit=keep")
    assert images.read_image(picture).shape[1] > 6 * 240  # three parts of each example
    with pytest.raises(UserError) as error:
        run(trained, "--image", tmp_path / "[12].png", "--output", tmp_path / "two.png", "--fit=keep")
    assert error.value.field == "--output"


def test_a_name_that_is_not_utf_8(trained, tmp_path, monkeypatch):
    file, report = tmp_path / "caf\udce9.png", tmp_path / "metrics.json"
    images.write_image(file, np.zeros((32, 32, 3), np.uint8))
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(command_line.runtime, "start", lambda: None)
    arguments = [f"--image={file}", f"--output={tmp_path}", f"--metrics={report}"]
    command_line.run(lambda: run(trained, *arguments))
    output.flush()
    assert rb"caf\udce9.png: PSNR" in output.buffer.getvalue()
    assert list(json.loads(report.read_text())["images"]) == [str(file)]


def test_patterns_panels_and_metrics(trained, folder, tmp_path):
    report = tmp_path / "new folder" / "metrics.json"
    (tmp_path / "out.png").mkdir()
    arguments = ["--show=input,difference", f"--metrics={report}", "--format=webp", "--fit=pad"]
    written = run(trained, "--image", folder / "*.[pj]*g", "--output", tmp_path / "out.png", *arguments)
    assert [path.name for path in written] == ["00000_a.webp", "00001_ü b.webp"]
    assert images.read_image(written[0]).shape == (198, 348, 3)  # two images of 160 pixels with titles
    values = json.loads(report.read_text())
    assert set(values["images"]) == {str(folder / "a.png"), str(folder / "ü b.jpg")}
    assert values["mean"]["psnr"] == pytest.approx(np.mean([x["psnr"] for x in values["images"].values()]))
    assert len(values["skipped"]) == 1


def test_invalid_arguments(trained, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for field, arguments in (
        ("--image", ["--image=broken.png"]), ("--image", ["--image=*.tiff"]),
        ("--show", ["--image=a.png", "--show=inputs"]), ("--show", ["--image=a.png", "--only", "--show=difference"]),
        ("--output", ["--image=a.png", "--output=x.tiff"]), ("--output", ["--image=a.png", "--output=a.png/"]),
        ("--metrics", ["--image=a.png", f"--metrics={folder}"]),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            run(trained, "--output", tmp_path / "x.png", *arguments)
        assert error.value.field == field


@pytest.mark.slow
def test_a_continuous_autoencoder_reconstructs(untrained, folder, tmp_path):
    checkpoint = untrained(quantizer="none").save_pretrained(tmp_path / "rae", np.zeros((1, 32, 32, 3), np.uint8))
    written = run(checkpoint, "--image", folder / "a.png", "--output", tmp_path / "out.png")
    assert images.read_image(written[0]).shape == (198, 348, 3)  # no code map
