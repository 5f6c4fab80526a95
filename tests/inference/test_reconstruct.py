import numpy as np
import pytest

from vqrae_jax.data import images
from vqrae_jax.data.errors import DataError
from vqrae_jax.inference import reconstruct


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
    assert "a.png: PSNR" in capsys.readouterr().out
    assert images.read_image(out).shape == (136, 396, 3)  # three tiles of 128, gaps and frame


def test_a_folder_into_one_picture_and_into_many(trained, folder, tmp_path, capsys):
    run(trained, "--image", folder, "--output", tmp_path / "all.jpg")
    assert "skipped 1 unreadable" in capsys.readouterr().err
    written = run(trained, "--image", folder, "--output", tmp_path / "many", "--only")
    assert [p.name for p in written] == ["00000_a.png", "00001_c.png", "00002_ü b.png"]
    assert images.read_image(written[0]).shape == (32, 32, 3)


def test_nothing_readable(trained, folder, tmp_path):
    with pytest.raises(DataError, match="none of 1 files is a readable picture"):
        run(trained, "--image", folder / "broken.png", "--output", tmp_path / "x.png")


def test_unknown_output_format(trained, folder, tmp_path):
    with pytest.raises(DataError, match=r"--output=.*x\.txt"):
        run(trained, "--image", folder / "a.png", "--output", tmp_path / "x.txt")
