"""Image files are decoded to 8-bit RGB or raise ImageError; crops have their documented positions and sizes."""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vqrae_jax.config import DataConfig
from vqrae_jax.data import images, source
from vqrae_jax.data.images import adm_center_crop, adm_random_crop, center_crop, flip, random_crop, read_image
from vqrae_jax.errors import DataError, ImageError


@pytest.fixture
def image():
    """A smooth image without symmetry, 40 high and 60 wide: rotations and flips change it, JPEG hardly does."""
    rows, columns = np.mgrid[:40, :60]
    return np.stack([rows * 6, columns * 4, 255 - rows * 3 - columns * 2], axis=-1).astype(np.uint8)


def encode(pil, form, **options):
    stream = io.BytesIO()
    pil.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_images_are_read_as_they_are_written(tmp_path, image, suffix):
    path = tmp_path / f"a ü 猫{suffix}"
    images.write_image(path, image)
    result = read_image(path)
    assert (result.dtype, result.shape) == (np.uint8, image.shape)
    assert np.abs(result.astype(int) - image).max() <= (0 if suffix.lower() == ".png" else 16)
    assert np.array_equal(read_image(path.read_bytes()), result)
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_changes_nothing(tmp_path, image, monkeypatch):
    path = tmp_path / "a.png"
    images.write_image(path, image)

    def full_disk(target, content):
        with open(target, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        images.write_image(path, 255 - image)
    assert np.array_equal(read_image(path), image)
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("a.bmp", (2, 2, 3), "u1"), ("a", (2, 2, 3), "u1"), ("a.png", (2, 2, 3), "f4"), ("a.png", (2, 2, 4), "u1"),
     ("a.png", (0, 2, 3), "u1")],
)  # fmt: skip
def test_unsupported_suffixes_and_arrays_are_refused(tmp_path, name, shape, dtype):
    with pytest.raises(DataError) as error:
        images.write_image(tmp_path / name, np.zeros(shape, dtype))
    assert error.value.field == str(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image, orientation):
    stored = image if orientation < 5 else image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    stored = stored[::rows, ::columns]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(read_image(data), image)


def test_gray_levels_sixteen_bits_palettes_and_cmyk_are_converted(image, tmp_path):
    gray, palette = image[..., 1], Image.fromarray(image).quantize(16)
    images.write_image(tmp_path / "gray.png", gray)
    for file in (tmp_path / "gray.png", encode(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")):
        assert np.array_equal(read_image(file), np.repeat(gray[..., None], 3, axis=-1))
    assert np.array_equal(read_image(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    result = read_image(encode(Image.fromarray(image).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(result.astype(int) - image).mean() < 3


def tiff(samples, bits, photometric=1, sample_format=1, order="<"):
    """Encodes one row of packed gray samples with a given bit depth."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(samples),
            339: sample_format}  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + samples


def png(row, bits, color_type, width, transparent=None):
    """Encodes one row of packed samples with a given bit depth and transparent color."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0))
    color = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + head + color + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


DEEP = [0, 1000, 0x8000, 0xFFFF]
BIG, LITTLE = np.array(DEEP, ">u2").tobytes(), np.array(DEEP, "<u2").tobytes()


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (tiff(bytes.fromhex("0003e8800fff"), 12), [0, 62, 128, 255]),  # 0, 1000, 2048, 4095
        (tiff(LITTLE, 16), [0, 4, 128, 255]),
        (tiff(BIG, 16, order=">"), [0, 4, 128, 255]),
        (tiff(LITTLE, 16, photometric=0), [255, 251, 127, 0]),
        (tiff(bytes([0, 60, 128, 255]), 8, photometric=0), [255, 195, 127, 0]),
        (tiff(b"\x01\x8f", 4), [0, 17, 136, 255]),
        (tiff(b"\x50", 1, photometric=0), [255, 0, 255, 0]),
        (png(BIG, 16, 0, 4), [0, 4, 128, 255]),
        (png(BIG, 16, 0, 4, [1000]), [0, 255, 128, 255]),
        (png(np.repeat(DEEP, 3).astype(">u2").tobytes(), 16, 2, 4, [0x8000] * 3), [0, 3, 255, 255]),
        (png(np.array([0, 65535, 1000, 0, 32768, 65535, 0, 32768], ">u2").tobytes(), 16, 4, 4), [0, 255, 128, 127]),
        (png(b"\x01\x8f", 4, 0, 4, [8]), [0, 17, 255, 255]),
        (png(b"\x1b", 2, 0, 4), [0, 85, 170, 255]),
        (png(b"\x50", 1, 0, 4, [1]), [0, 255, 0, 255]),
        (b"P5 4 1 1023\n" + struct.pack(">4H", 0, 250, 512, 1023), [0, 62, 128, 255]),
        (b"P5 4 1 100\n" + bytes([0, 25, 50, 100]), [0, 64, 128, 255]),
    ],
)
def test_samples_are_scaled_by_the_bit_depth_of_the_file(data, levels):
    assert read_image(data)[0, :, 0].tolist() == levels


@pytest.mark.parametrize(("bits", "sample_format"), [(8, 2), (16, 2), (32, 1), (32, 2), (32, 3)])
def test_samples_whose_range_is_unknown_are_refused(bits, sample_format):
    with pytest.raises(ImageError, match="range"):
        read_image(tiff(bytes(16), bits, sample_format=sample_format))


@pytest.mark.parametrize("mode", ["CMYK", "LA", "RGBA", "P", "PA", "1", "I;16", "RGB"])
def test_strips_are_converted_as_the_whole_image(image, mode, monkeypatch):
    if mode == "I;16":
        pil = Image.fromarray(image[..., 0].astype(np.uint16) * 257)
    else:
        pil = Image.fromarray(np.dstack([image, image[..., 0]])).convert("RGB" if mode in "P1CMYK" else "RGBA")
        pil = pil.convert(mode) if mode not in ("P", "PA") else pil.quantize(16).convert(mode)
    whole = images.pil_to_array(pil)
    monkeypatch.setattr(images, "_STRIP", 7 * 60)
    assert np.array_equal(images.pil_to_array(pil), whole)


def test_transparent_pixels_are_blended_with_white(image):
    alpha = np.zeros(image.shape[:2], np.uint8)
    alpha[:, 20:40] = 255
    alpha[:, 40:] = 128
    result = read_image(encode(Image.fromarray(np.dstack([image, alpha])), "PNG")).astype(int)
    assert (result[:, :20] == 255).all()
    assert np.array_equal(result[:, 20:40], image[:, 20:40])
    assert np.abs(result[:, 40:] - (image[:, 40:].astype(int) + 255) / 2).max() < 2


def test_a_transparent_palette_entry_is_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    result = read_image(encode(palette, "GIF", transparency=1))
    assert result[0, 0].tolist() == [255, 0, 0]
    assert (result.reshape(-1, 3)[1:] == 255).all()


def test_the_first_frame_of_an_animation_is_read():
    red, blue = (Image.new("RGB", (6, 5), colour) for colour in ("red", "blue"))
    data = encode(red, "GIF", save_all=True, append_images=[blue])
    assert (read_image(data) == [255, 0, 0]).all()


def test_min_side_reduces_large_jpegs(image):
    large = Image.fromarray(image).resize((960, 640))
    data = encode(large, "JPEG", quality=95)
    small = read_image(data, min_side=100)
    assert 100 <= min(small.shape[:2]) < 200
    assert np.abs(center_crop(small, 32).astype(int) - center_crop(np.asarray(large), 32)).mean() < 3
    assert read_image(data).shape == (640, 960, 3)


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "head only", "float"])
def test_damaged_files_are_named(tmp_path, image, kind):
    png, path = encode(Image.effect_noise((64, 64), 100), "PNG"), tmp_path / "bäd.png"
    damaged = {"empty": b"", "text": b"not an image", "cut short": png[: len(png) // 2], "head only": png[:20]}
    damaged["float"] = encode(Image.fromarray(image[..., 0].astype(np.float32)), "TIFF")
    path.write_bytes(damaged[kind])
    with pytest.raises(ImageError, match=r"bäd\.png"):
        read_image(path)
    with pytest.raises(ImageError, match="bytes"):
        read_image(path.read_bytes())


def test_missing_files_and_folders_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image(tmp_path)


def test_a_lack_of_memory_is_no_damage(monkeypatch, image):
    """PIL raises MemoryError for both; a lack is one if the memory that the image needs is not available either."""
    data = encode(Image.fromarray(image), "PNG")

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError):
        read_image(data)
    monkeypatch.setattr(images.np, "empty", fail)
    with pytest.raises(DataError) as error:
        read_image(data)
    assert not isinstance(error.value, ImageError)
    assert error.value.field == "data.max_pixels"


def test_the_limit_of_pixels_is_checked_before_decoding(monkeypatch, image):
    data = encode(Image.fromarray(image), "PNG")
    assert read_image(data, max_pixels=2400).shape == (40, 60, 3)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    with pytest.raises(ImageError, match="2399 pixels"):
        read_image(data, max_pixels=2399)
    assert DataConfig().max_pixels == images.MAX_PIXELS == source.Source().max_pixels


def test_images_with_too_many_pixels_are_refused(monkeypatch, image):
    data = encode(Image.fromarray(image), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="2400 pixels"):
        read_image(data)


CROPS = [
    lambda image, size, rng: center_crop(image, size),
    random_crop,
    lambda image, size, rng: random_crop(image, size, rng, resize=1.3),
    lambda image, size, rng: random_crop(image, size, rng, scale=(0.2, 4.0)),
    lambda image, size, rng: adm_center_crop(image, size),
    adm_random_crop,
]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (8, 8), (3, 500), (1, 1), (300, 2), (257, 129)])
@pytest.mark.parametrize("size", [8, 33])
def test_crops_and_flips_keep_shape_and_dtype(shape, size):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    for crop in CROPS:
        square = crop(noise, size, rng)
        for result in (square, flip(square)):
            assert (result.dtype, result.shape) == (np.uint8, (size, size, 3))


def test_a_square_of_the_right_size_is_unchanged(image):
    square = image[:, :40]
    assert np.array_equal(center_crop(square, 40), square)
    assert np.array_equal(random_crop(square, 40, np.random.default_rng(0)), square)


def test_center_crop_equals_resizing_and_cutting(image):
    resized = np.asarray(Image.fromarray(image).resize((45, 30), Image.Resampling.BICUBIC))
    assert np.abs(center_crop(image, 30).astype(int) - resized[:, 7:37]).max() <= 1


def test_downscaling_averages():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    small = center_crop(noise, 16).astype(float)
    assert abs(small.mean() - noise.mean()) < 1
    assert small.std() < 8  # each pixel is the mean of 1024; without antialiasing it is 74


def test_random_crops_are_unscaled_parts_at_random_positions():
    image = np.arange(200, dtype=np.uint8)[None, :, None].repeat(50, axis=0).repeat(3, axis=2)  # value = column
    lefts = set()
    for seed in range(40):
        crop = random_crop(image, 50, np.random.default_rng(seed))
        assert np.array_equal(crop, image[:, crop[0, 0, 0] :][:, :50])
        lefts.add(int(crop[0, 0, 0]))
    assert min(lefts) < 40
    assert max(lefts) > 110
    same = [random_crop(image, 50, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(*same)


def test_scale_is_the_side_in_original_pixels():
    image = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(256, axis=0).repeat(3, axis=2)
    sides = []
    for seed in range(300):
        crop = random_crop(image, 16, np.random.default_rng(seed), scale=(2.0, 8.0)).astype(float)
        sides.append((crop[0, -1, 0] - crop[0, 0, 0]) * 16 / 15)  # one gray level per original pixel
    assert 28 < min(sides) < 36
    assert 118 < max(sides) < 132
    assert abs(np.log2(sides).mean() - 6) < 0.15  # log-uniform between 2**5 and 2**7


def test_pil_images_are_cropped_as_arrays(image):
    data = encode(Image.fromarray(image).resize((240, 160)), "PNG")
    array, pil = read_image(data), images.read_pil_image(data)
    assert np.array_equal(array, pil)
    for crop in (*CROPS, lambda image, size, rng: flip(image)):
        first, second = (crop(x, 32, np.random.default_rng(3)) for x in (array, pil))
        assert (type(first), type(second)) == (np.ndarray, Image.Image)
        assert np.array_equal(first, second)


def test_adm_center_crop_halves_by_averaging_then_resizes():
    noise = np.random.default_rng(0).integers(0, 256, (140, 200, 3), dtype=np.uint8)
    half = Image.fromarray(noise).resize((100, 70), Image.Resampling.BOX)  # 140 >= 2 * 64, 70 is not
    averaged = noise.reshape(70, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(half) - averaged).max() <= 1  # rounded twice
    whole = np.asarray(half.resize((91, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(adm_center_crop(noise, 64), whole[:, 13:77])
    assert np.array_equal(adm_center_crop(noise[:64, :64], 64), noise[:64, :64])


def test_adm_random_crop_has_at_least_eight_tenths_of_the_short_side():
    image = np.arange(80, dtype=np.uint8)[:, None, None].repeat(80, axis=1).repeat(3, axis=2) * 3  # 3 levels a row
    spans = []
    for seed in range(200):
        crop = adm_random_crop(image, 64, np.random.default_rng(seed)).astype(float)
        spans.append((crop[60, 0, 0] - crop[3, 0, 0]) / 57 / 3)  # original rows per row of the crop
    assert min(spans) < 1.03
    assert max(spans) > 1.22
    assert all(0.97 < span < 1.28 for span in spans)  # 80 / 80 to 80 / 64


def test_very_long_images_are_cropped_without_resizing_them_whole():
    strip = np.zeros((2, 200_000, 3), np.uint8)
    strip[:, 90_000:110_000] = 200
    for crop in (adm_center_crop(strip, 256), adm_random_crop(strip, 256, np.random.default_rng(0))):
        assert (crop == 200).all()


def test_flip_swaps_left_and_right_and_is_its_own_inverse(image):
    assert np.array_equal(flip(flip(image)), image)
    assert np.array_equal(flip(image)[:, 0], image[:, -1])
