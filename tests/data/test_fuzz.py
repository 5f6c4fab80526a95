"""Damaged image files: an 8-bit image or an ImageError, soon, and never another error."""

import contextlib
import io
import time

import numpy as np
import pytest
from PIL import Image

from vqrae_jax.data.images import read_image
from vqrae_jax.errors import ImageError, WeightsError
from vqrae_jax.pretrained.sources import read_latent_statistics

SECONDS = 1


def valid_files():
    """Encodes a small image in all formats and several modes."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 31, 4), np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    for pil, form, options in (
        (rgb, "PNG", {}), (rgba, "PNG", {}), (deep, "PNG", {}), (rgb.quantize(16), "PNG", {"transparency": 3}),
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "WEBP", {}), (rgba, "WEBP", {"lossless": True}), (rgb, "TIFF", {}), (deep, "TIFF", {"exif": exif}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb, "GIF", {}), (rgb, "BMP", {}), (rgb.quantize(4), "BMP", {}), (rgb, "PPM", {}), (rgb, "AVIF", {}),
    ):  # fmt: skip
        stream = io.BytesIO()
        pil.save(stream, form, **options)
        yield stream.getvalue()


def mutate(data, rng):
    """Flips, overwrites, removes, repeats or cuts bytes; headers are hit more often."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        head = min(len(data), 200) if rng.random() < 0.7 else len(data)
        at = int(rng.integers(max(head, 1)))
        match rng.integers(6):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << int(rng.integers(8))]) if data else b""
            case 1:
                data[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
            case 2:
                data[at : at + int(rng.integers(1, 9))] = b""
            case 3:
                data[at:at] = data[at : at + int(rng.integers(1, 99))]
            case 4:
                data[at : at + 8] = rng.bytes(8)
            case 5 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def check(data):
    start = time.process_time()
    with contextlib.suppress(ImageError):
        image = read_image(data)
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        assert image.size
    assert time.process_time() - start < SECONDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_images(count):
    files, rng = list(valid_files()), np.random.default_rng(count)
    for data in files:
        assert read_image(data).ndim == 3
    for i in range(count):
        check(mutate(files[i % len(files)], rng))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_statistics(count, tmp_path):
    stream, rng, file = io.BytesIO(), np.random.default_rng(count), tmp_path / "file.npz"
    np.savez_compressed(stream, mean=np.zeros(8, np.float32), var=np.ones(8, np.float32))
    for _ in range(count):
        file.write_bytes(mutate(stream.getvalue(), rng))
        with contextlib.suppress(WeightsError):
            assert read_latent_statistics(str(file), "field", (2, 2, 8))
