"""Every kind of file a folder may hold becomes the picture it shows, or a clear error; crops keep their promises."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from vqrae_jax.data.folder import list_images
from vqrae_jax.data.images import (
    adm_center_crop,
    adm_random_crop,
    center_crop,
    flip,
    random_crop,
    read_image,
    read_pil_image,
    write_image,
)
from vqrae_jax.errors import DataError, ImageError


@pytest.fixture
def picture():
    """Smooth, without symmetry, 40 high and 60 wide: a turn or a mirror changes it, JPEG hardly does."""
    rows, columns = np.mgrid[:40, :60]
    return np.stack([rows * 6, columns * 4, 255 - rows * 3 - columns * 2], axis=-1).astype(np.uint8)


def encoded(picture, form, **options):
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_writing_and_reading_return_the_picture(tmp_path, picture, suffix):
    path = tmp_path / f"a ü 猫{suffix}"
    write_image(path, picture)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.shape == picture.shape
    assert np.abs(read.astype(int) - picture).max() <= (0 if suffix.lower() == ".png" else 16)
    assert np.array_equal(read_image(path.read_bytes()), read)
    assert os.listdir(tmp_path) == [path.name]


def test_gray_is_written_and_read_as_equal_channels(tmp_path, picture):
    write_image(tmp_path / "gray.png", picture[..., 0])
    assert np.array_equal(read_image(tmp_path / "gray.png"), np.repeat(picture[..., :1], 3, axis=-1))


def test_a_failed_write_keeps_the_earlier_file_and_leaves_nothing_behind(tmp_path, picture, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, picture)

    def full_disk(target, content):
        with open(target, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_image(path, 255 - picture)
    assert np.array_equal(read_image(path), picture)
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.bmp", np.zeros((2, 2, 3), np.uint8)),
        ("a", np.zeros((2, 2, 3), np.uint8)),
        ("a.png", np.zeros((2, 2, 3), np.float32)),
        ("a.png", np.zeros((2, 2, 4), np.uint8)),
        ("a.png", np.zeros((0, 2, 3), np.uint8)),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, image):
    with pytest.raises(DataError, match="cannot be written"):
        write_image(tmp_path / name, image)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(picture, orientation):
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(read_image(data), picture)


def test_sixteen_bits_keep_their_brightness(picture):
    gray = picture[..., 1]
    data = encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    assert np.array_equal(read_image(data), np.repeat(gray[..., None], 3, axis=-1))


def test_a_palette_gives_its_colours(picture):
    palette = Image.fromarray(picture).quantize(16)
    assert np.array_equal(read_image(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_transparent_is_white_and_half_transparent_half_way(picture):
    alpha = np.zeros(picture.shape[:2], np.uint8)
    alpha[:, 20:40] = 255
    alpha[:, 40:] = 128
    read = read_image(encoded(Image.fromarray(np.dstack([picture, alpha])), "PNG")).astype(int)
    assert (read[:, :20] == 255).all()
    assert np.array_equal(read[:, 20:40], picture[:, 20:40])
    assert np.abs(read[:, 40:] - (picture[:, 40:].astype(int) + 255) / 2).max() < 2


def test_a_transparent_palette_entry_is_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    read = read_image(encoded(palette, "GIF", transparency=1))
    assert read[0, 0].tolist() == [255, 0, 0]
    assert (read.reshape(-1, 3)[1:] == 255).all()


def test_cmyk_is_near_its_colours(picture):
    read = read_image(encoded(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(read.astype(int) - picture).mean() < 3


def test_of_an_animation_the_first_frame_counts():
    red, blue = (Image.new("RGB", (6, 5), colour) for colour in ("red", "blue"))
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert (read_image(data) == [255, 0, 0]).all()


def test_a_large_jpeg_may_be_read_smaller_but_not_too_small(picture):
    large = Image.fromarray(picture).resize((960, 640))
    data = encoded(large, "JPEG", quality=95)
    small = read_image(data, min_side=100)
    assert 100 <= min(small.shape[:2]) < 200
    assert np.abs(center_crop(small, 32).astype(int) - center_crop(np.asarray(large), 32)).mean() < 3
    assert read_image(data).shape == (640, 960, 3)


def damaged(kind, picture):
    png = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
    return {
        "empty": b"",
        "text": b"not an image",
        "cut short": png[: len(png) // 2],
        "head only": png[:20],
        "float": encoded(Image.fromarray(picture[..., 0].astype(np.float32)), "TIFF"),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "head only", "float"])
def test_a_damaged_file_is_named(tmp_path, picture, kind):
    path = tmp_path / "bäd.png"
    path.write_bytes(damaged(kind, picture))
    with pytest.raises(ImageError, match=r"bäd\.png"):
        read_image(path)
    with pytest.raises(ImageError, match="bytes"):
        read_image(path.read_bytes())


def test_missing_files_and_folders_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image(tmp_path)


def test_a_decompression_bomb_is_refused(monkeypatch, picture):
    data = encoded(Image.fromarray(picture), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="2400 pixels"):
        read_image(data)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (8, 8), (3, 500), (1, 1), (300, 2), (257, 129)])
@pytest.mark.parametrize("size", [8, 33])
def test_crops_and_flips_keep_shape_and_dtype(shape, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    crops = [
        center_crop(image, size),
        random_crop(image, size, rng),
        random_crop(image, size, rng, resize=1.3),
        random_crop(image, size, rng, scale=(0.2, 4.0)),
        adm_center_crop(image, size),
        adm_random_crop(image, size, rng),
    ]
    for crop in [*crops, *map(flip, crops)]:
        assert crop.dtype == np.uint8
        assert crop.shape == (size, size, 3)


def test_a_square_of_the_right_size_is_left_alone(picture):
    square = picture[:, :40]
    assert np.array_equal(center_crop(square, 40), square)
    assert np.array_equal(random_crop(square, 40, np.random.default_rng(0)), square)


def test_the_centre_is_what_resizing_all_and_cutting_gives(picture):
    resized = np.asarray(Image.fromarray(picture).resize((45, 30), Image.Resampling.BICUBIC))
    assert np.abs(center_crop(picture, 30).astype(int) - resized[:, 7:37]).max() <= 1


def test_shrinking_averages():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    small = center_crop(noise, 16).astype(float)
    assert abs(small.mean() - noise.mean()) < 1
    assert small.std() < 8  # 1024 pixels averaged into one; without antialias it would be 74


def test_a_random_crop_is_somewhere_in_the_image_and_not_always_the_same():
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


def test_scale_is_the_side_in_source_pixels():
    image = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(256, axis=0).repeat(3, axis=2)
    sides = []
    for seed in range(300):
        crop = random_crop(image, 16, np.random.default_rng(seed), scale=(2.0, 8.0)).astype(float)
        sides.append((crop[0, -1, 0] - crop[0, 0, 0]) * 16 / 15)  # one gray level per pixel of the source
    assert 28 < min(sides) < 36
    assert 118 < max(sides) < 132
    assert abs(np.log2(sides).mean() - 6) < 0.15  # log-uniform between 2**5 and 2**7


def test_a_picture_is_cropped_as_its_array(picture):
    data = encoded(Image.fromarray(picture).resize((240, 160)), "PNG")
    array, read = read_image(data), read_pil_image(data)
    assert np.array_equal(array, read)
    crops = [
        lambda image, rng: center_crop(image, 32),
        lambda image, rng: random_crop(image, 32, rng),
        lambda image, rng: random_crop(image, 32, rng, scale=(0.5, 4.0)),
        lambda image, rng: adm_center_crop(image, 32),
        lambda image, rng: adm_random_crop(image, 32, rng),
        lambda image, rng: flip(image),
    ]
    for crop in crops:
        one, other = (crop(image, np.random.default_rng(3)) for image in (array, read))
        assert isinstance(one, np.ndarray)
        assert isinstance(other, Image.Image)
        assert np.array_equal(one, other)


def test_the_centre_of_adm_is_halved_by_averaging_then_resized_whole():
    noise = np.random.default_rng(0).integers(0, 256, (140, 200, 3), dtype=np.uint8)
    half = Image.fromarray(noise).resize((100, 70), Image.Resampling.BOX)  # 140 >= 2 * 64, 70 is not
    averaged = noise.reshape(70, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(half) - averaged).max() <= 1  # rounded twice
    whole = np.asarray(half.resize((91, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(adm_center_crop(noise, 64), whole[:, 13:77])
    assert np.array_equal(adm_center_crop(noise[:64, :64], 64), noise[:64, :64])


def test_the_random_crop_of_adm_shows_at_least_eight_tenths_of_the_short_side():
    image = np.arange(80, dtype=np.uint8)[:, None, None].repeat(80, axis=1).repeat(3, axis=2) * 3  # 3 levels a row
    spans = []
    for seed in range(200):
        crop = adm_random_crop(image, 64, np.random.default_rng(seed)).astype(float)
        spans.append((crop[60, 0, 0] - crop[3, 0, 0]) / 57 / 3)  # rows of the source per row of the crop
    assert min(spans) < 1.03
    assert max(spans) > 1.22
    assert all(0.97 < span < 1.28 for span in spans)  # 80 / 80 to 80 / 64


def test_a_long_strip_does_not_fill_the_memory():
    strip = np.zeros((2, 200_000, 3), np.uint8)
    strip[:, 90_000:110_000] = 200
    for crop in (adm_center_crop(strip, 256), adm_random_crop(strip, 256, np.random.default_rng(0))):
        assert (crop == 200).all()


def test_a_flip_is_its_own_inverse_and_swaps_left_and_right(picture):
    assert np.array_equal(flip(flip(picture)), picture)
    assert np.array_equal(flip(picture)[:, 0], picture[:, -1])


def test_image_files_are_found_below_and_in_a_fixed_order(tmp_path):
    for name in ["b/2.JPG", "b/1.png", "a ü/猫.webp", "top.GIF", "a ü/notes.txt", ".hidden.png", ".cache/x.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path).replace(os.sep, "/") for path in list_images(tmp_path)]
    assert found == ["a ü/猫.webp", "b/1.png", "b/2.JPG", "top.GIF"]


def test_a_folder_linked_into_itself_is_walked_once(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(list_images(tmp_path)) == 1


def test_a_wrong_folder_is_explained(tmp_path):
    (tmp_path / "file.png").touch()
    (tmp_path / "empty").mkdir()
    for name, reason in [("none", "does not exist"), ("file.png", "is a file"), ("empty", "no images")]:
        with pytest.raises(DataError, match=rf"data\.eval_path=.*{name}.* {reason}"):
            list_images(tmp_path / name, "data.eval_path")
