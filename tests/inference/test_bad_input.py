"""A folder with files of many kinds: readable images are used, the other files are skipped and listed."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vqrae_jax import Tokenizer
from vqrae_jax.commands import reconstruct, tokenize
from vqrae_jax.data import codes, images

BROKEN = ("bomb.png", "cut.jpg", "empty.png", "text.jpeg")


def bomb():
    """A PNG of a hundred bytes whose header has 3.6 thousand million pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, pixels = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a space and an umlaut, the image that its files show, and {file: exact pixels or None}."""
    folder = tmp_path_factory.mktemp("alle Bilder ü")
    rows, columns = np.mgrid[:48, :40] * 5
    pixels = np.stack([rows, columns, 255 - rows], -1).astype(np.uint8)
    image, gray = Image.fromarray(pixels), pixels[..., :1].repeat(3, -1)
    kinds = {
        "plain.png": (image, pixels, {}),
        "animated.gif": (image.quantize(64), None, {"save_all": True, "append_images": [Image.new("P", (40, 48))]}),
        "cmyk.jpg": (image.convert("CMYK"), None, {"quality": 100}),
        "sixteen bits.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), gray, {}),
        "palette.png": (image.quantize(64), None, {}),
        "alpha ü.png": (Image.fromarray(np.dstack([pixels, np.full((48, 40), 255, np.uint8)])), pixels, {}),
        "on its side.jpg": (image.transpose(Image.Transpose.ROTATE_90), None, {"quality": 100}),
        "modern.avif": (image, None, {"quality": 100}),
        "gray.webp": (Image.fromarray(pixels[..., 0]), gray, {"lossless": True}),
    }
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise when shown
    expected = {}
    for name, (pil_image, exact, options) in kinds.items():
        pil_image.save(folder / name, **options, **({"exif": exif} if name == "on its side.jpg" else {}))
        expected[name] = exact
    whole = (folder / "cmyk.jpg").read_bytes()
    for name, content in zip(BROKEN, (bomb(), whole[: len(whole) // 2], b"", b"not an image"), strict=True):
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not an image")
    return folder, pixels, expected


def test_pixels_are_read(files):
    folder, pixels, expected = files
    for name, exact in expected.items():
        read = images.read_image(folder / name)
        if exact is None:  # through a palette, inks or JPEG
            assert np.abs(read.astype(int) - pixels).mean() < 8, name
        else:
            np.testing.assert_array_equal(read, exact, err_msg=name)


def test_folder_is_tokenized(trained, files, tmp_path, capsys):
    folder, _, expected = files
    arguments = [f"--checkpoint={trained}", f"--data={folder}", f"--output={tmp_path / 'codes ü'}", "--batch=8"]
    manifest = tokenize.tokenize(tokenize.parser.parse_args([*arguments, "--shard-size=8"]))
    assert manifest["count"] == len(expected)
    assert f"skipped 4 unreadable images: {', '.join(BROKEN)}\n" in capsys.readouterr().err
    tokenizer = Tokenizer.load(trained, batch_size=8)
    for record in map(codes.Codes(tmp_path / "codes ü").__getitem__, range(len(expected))):
        square = images.center_crop(images.read_image(folder / record["id"]), tokenizer.image_size)
        np.testing.assert_array_equal(record["codes"], tokenizer.encode_to_indices(square[None])[0])


def test_folder_is_reconstructed(trained, files, tmp_path, capsys):
    folder, _, expected = files
    arguments = [f"--checkpoint={trained}", "--image", str(folder), f"--output={tmp_path / 'images ü'}", "--batch=8"]
    written = reconstruct.reconstruct(reconstruct.parser.parse_args(arguments))
    assert sorted(path.stem[6:] for path in written) == sorted(name.rpartition(".")[0] for name in expected)
    message = capsys.readouterr().err
    assert "skipped 4 unreadable files" in message
    assert all(name in message for name in BROKEN)
