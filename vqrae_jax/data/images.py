"""Reading and writing of image files, and the crops that make an image square."""

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling, Transpose

from vqrae_jax import storage
from vqrae_jax.data.source import MAX_PIXELS
from vqrae_jax.errors import DataError, ImageError

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SAVE_OPTIONS = {".png": {}, ".jpg": {"quality": 95}, ".jpeg": {"quality": 95}, ".webp": {"quality": 95}}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF")  # for some others PIL starts external programs
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {  # by orientation
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_PNG_SCALES = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # 8-bit samples of PIL / samples of the file
_SAMPLE_FORMAT, _BITS_PER_SAMPLE, _PHOTOMETRIC = 339, 258, 262  # TIFF tags
_MAX_RATIO = 64  # of the sides of an image that is resized as a whole
_STRIP = 2**18  # pixels that are converted at a time

MAX_BYTES = 2**28  # of an image file; larger ones are not read into memory

AnyImage = UInt8[np.ndarray, "_ _ 3"] | Image.Image  # a PIL image has mode RGB
Square = UInt8[np.ndarray, "{size} {size} 3"] | Image.Image


def read_image(
    source: str | os.PathLike | bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image file, or its content, to 8-bit RGB.

    EXIF orientation is applied; palettes, CMYK, grayscale, 12 and 16 bits are converted; transparent pixels are blended
    with white; of an animation the first frame is used. Colour profiles are not applied.

    Args:
      source: a path or an encoded image.
      min_side: a JPEG may be decoded 2, 4 or 8 times smaller, which is faster, as long as its short side has this
        number of pixels.
      max_pixels: larger images are refused before they are decoded.

    Raises:
      ImageError: missing, empty, truncated, not a regular file or not an image, larger than `max_pixels` or
        `MAX_BYTES`, or with samples whose range is unknown (floats, signed and 32-bit integers).
      DataError: the memory does not suffice for the image.
    """
    return _to_array(read_pil_image(source, min_side, max_pixels))


def read_pil_image(
    source: str | os.PathLike | bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Does the same as `read_image` and returns a PIL image in mode RGB, which the crops below use directly."""
    encoded = isinstance(source, bytes | bytearray | memoryview)
    name = f"of {len(source)} bytes" if encoded else repr(os.fspath(source))
    pixels = 0
    try:
        opened = io.BytesIO(source) if encoded else storage.open_file(source, MAX_BYTES)
        with opened, Image.open(opened, formats=_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {max_pixels} pixels")
            if min_side:
                image.draft(None, (min_side, min_side))
            _scale_transparency(image)
            image.load()
            transpose, rgb = _transposition(image), _to_rgb(image)
        del image  # its pixels are not needed any more
        return rgb if transpose is None else rgb.transpose(transpose)
    except Exception as error:  # PIL raises many kinds for damaged files
        if "memory" in str(error).lower() or isinstance(error, MemoryError):
            _check_memory(pixels, name)
        raise ImageError(f"cannot read the image {name}: {_reason(source, error)}") from error


def is_pil_image(value: object) -> bool:
    return isinstance(value, Image.Image)


def pil_to_array(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Converts a PIL image as `read_image` converts a file; ImageError if its file or pixels cannot be read."""
    try:
        transpose, rgb = _transposition(image), _to_rgb(image)
        return _to_array(rgb if transpose is None else rgb.transpose(transpose))
    except Exception as error:
        raise ImageError(f"cannot use the PIL image of mode {image.mode!r}: {error}") from error


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 3] or [H, W], as PNG, JPEG or WebP, depending on the suffix of the path.

    See `storage.write_bytes`; another suffix, shape or dtype is a DataError.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SAVE_OPTIONS:
        raise DataError(f"cannot be written: the suffix must be one of {', '.join(SAVE_OPTIONS)}", field=path)
    image = np.asarray(image)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
        problem = f"cannot be written: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] or [H, W]"
        raise DataError(problem, field=path)
    storage.write_bytes(path, encode_image(image, suffix, **SAVE_OPTIONS[suffix]))


def encode_image(image: UInt8[np.ndarray, "H W *c"], suffix: str, **options: Any) -> bytes:
    """Returns the content of an image file; `options` are those of PIL for the format."""
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, Image.registered_extensions()[suffix], **options)
    return encoded.getvalue()


def write_text(
    image: UInt8[np.ndarray, "H W 3"], labels: Sequence[tuple[int, int, str]], size: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a copy with dark labels (x and y of the top left corner, text) in letters of `size` pixels."""
    canvas, font = Image.fromarray(image), ImageFont.load_default(size)
    for x, y, text in labels:
        ImageDraw.Draw(canvas).text((x, y), text, (34, 34, 51), font)
    return np.asarray(canvas)


# Crops return an array for an array and a PIL image for a PIL image.


def center_crop(image: AnyImage, size: int) -> Square:
    """Resizes the short side to `size` (bicubic with antialiasing, as in PIL) and cuts the central square.

    An image at least four times too large is first averaged over whole blocks, to no less than twice the size, which is
    several times faster and changes the result little.
    """
    return _resize_and_crop(image, size, size, lambda spare: spare // 2)


def ten_crop(image: AnyImage, size: int, resize: float = 1.1) -> UInt8[np.ndarray, "10 {size} {size} 3"]:
    """Cuts the four corners and the centre, and mirrors them (Krizhevsky et al. 2012).

    Args:
      resize: length of the resized short side, relative to `size`.
    """
    image, crops = _to_pil(image), []
    for down, across in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1)):  # in halves of the spare pixels
        halves = iter((across, down))
        square = _resize_and_crop(image, size, round(size * resize), lambda spare: spare * next(halves) // 2)  # noqa: B023
        crops.append(np.asarray(square))
    return np.stack([*crops, *map(flip, crops)])


def random_crop(
    image: AnyImage, size: int, rng: np.random.Generator, resize: float = 1.0, scale: tuple[float, float] = (1.0, 1.0)
) -> Square:
    """Cuts a random square.

    Args:
      resize: with `scale` (1, 1) the short side is resized to size * resize before the square is cut.
      scale: any other range cuts a square of side size * s from the original pixels, s log-uniform in the range and the
        side at most the short side, and resizes it to `size`; `resize` has no effect.
    """
    if tuple(scale) == (1.0, 1.0):
        side = max(size, round(size * resize))
        return _resize_and_crop(image, size, side, lambda spare: int(rng.integers(spare + 1)))
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    side = size * np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1])))
    side = int(np.clip(round(side), 1, min(height, width)))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    square = _cut(image, left, top, side)
    return square if side == size else center_crop(square, size)


def adm_center_crop(image: AnyImage, size: int) -> Square:
    """Cuts the central square as ADM does (Dhariwal and Nichol 2021, `center_crop_arr` of guided-diffusion).

    The image is halved by averaging while its short side is at least 2 * size, then resized bicubically, then cut: the
    protocol of most published Frechet distances on ImageNet.
    """
    resized = _adm_resize(_to_pil(image), size)
    left, top = ((length - size) // 2 for length in resized.size)
    return _convert_like(image, _cut(resized, left, top, size))


def adm_random_crop(image: AnyImage, size: int, rng: np.random.Generator, smallest: float = 0.8) -> Square:
    """Cuts a random square as ADM does (`random_crop_arr` of guided-diffusion).

    The short side is resized as in `adm_center_crop`, to an integer drawn uniformly from size to ceil(size / smallest).
    """
    resized = _adm_resize(_to_pil(image), int(rng.integers(size, math.ceil(size / smallest) + 1)))
    top, left = (int(rng.integers(length - size + 1)) for length in resized.size[::-1])
    return _convert_like(image, _cut(resized, left, top, size))


def flip(image: AnyImage) -> AnyImage:
    """Mirrors an image left to right."""
    return image[:, ::-1] if isinstance(image, np.ndarray) else image.transpose(Transpose.FLIP_LEFT_RIGHT)


# (image, size) -> uint8 [views, size, size, 3]
VIEWS = {
    "one": lambda image, size: np.asarray(center_crop(image, size))[None],
    "flip": lambda image, size: np.stack([square := np.asarray(center_crop(image, size)), flip(square)]),
    "ten-crop": ten_crop,
}


def _to_pil(image: AnyImage) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image


def _convert_like(image: AnyImage, result: Image.Image) -> AnyImage:
    return np.asarray(result) if isinstance(image, np.ndarray) else result


def _cut(image: AnyImage, left: int, top: int, side: int) -> AnyImage:
    right, bottom = left + side, top + side
    return image[top:bottom, left:right] if isinstance(image, np.ndarray) else image.crop((left, top, right, bottom))


def _adm_resize(image: Image.Image, side: int) -> Image.Image:
    """Resizes the short side to `side`; only the middle of a very long image, which could exceed the memory."""
    longest = _MAX_RATIO * min(image.size)
    if max(image.size) > longest:
        spare = [max(0, length - longest) // 2 for length in image.size]
        image = image.crop((*spare, *(length - cut for length, cut in zip(image.size, spare, strict=True))))
    while min(image.size) >= 2 * side:
        image = image.resize([length // 2 for length in image.size], Resampling.BOX)
    scale = side / min(image.size)
    return image.resize([round(length * scale) for length in image.size], Resampling.BICUBIC)


def _resize_and_crop(image: AnyImage, size: int, side: int, offset: Callable[[int], int]) -> AnyImage:
    """Cuts a square of `size` from the image with its short side resized to `side`.

    Args:
      offset: maps the number of spare pixels to the first pixel; called for the width, then for the height.
    """
    pil = _to_pil(image)
    scale = side / min(pil.size)
    width, height = (max(side, round(length * scale)) for length in pil.size)
    left, top = offset(width - size), offset(height - size)
    # Resizing only the square gives the same pixels as resizing the whole image, at a bounded cost.
    across, down = pil.width / width, pil.height / height
    right, bottom = min((left + size) * across, pil.width), min((top + size) * down, pil.height)
    box = (left * across, top * down, right, bottom)
    return _convert_like(image, pil.resize((size, size), Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _transposition(image: Image.Image) -> Transpose | None:
    """Returns the flip or rotation that the file asks for."""
    try:
        return _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of an intact image
        return None


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent color of a PNG as PIL scales its samples."""
    scale = _PNG_SCALES.get(image.tile[0].args, 0) if image.format == "PNG" and image.tile else 0
    color = image.info.get("transparency")
    if scale and color is not None:
        samples = [int(sample * scale) for sample in (color if isinstance(color, tuple) else [color])]
        image.info["transparency"] = tuple(samples) if isinstance(color, tuple) else samples[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts strip by strip, so that the pixels are in memory twice at most."""
    convert = _conversion(image)
    if convert is None:
        return image
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _to_array(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    result = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        result[top : top + strip.height] = strip
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """Returns a function from a strip of `image` to RGB; None if it is RGB already."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or 2 in tags.get(_SAMPLE_FORMAT, ()) or 32 in tags.get(_BITS_PER_SAMPLE, ()):
        raise ValueError("floating-point, signed or 32-bit samples, whose range is unknown")
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        largest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        black, white = (largest, 0) if tags.get(_PHOTOMETRIC) == 0 else (0, largest)
        return lambda strip: _integers_to_rgb(strip, black, white, image.info.get("transparency"))
    if image.has_transparency_data:
        return _blend_with_white
    return None if image.mode == "RGB" else lambda strip: strip.convert("RGB")


def _integers_to_rgb(image: Image.Image, black: int, white: int, transparent: int | None) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    if values.min() < 0 or values.max() > max(black, white):
        raise ValueError(f"integers beyond {max(black, white)}")
    levels = np.round((values - black) * np.float32(255 / (white - black))).astype(np.uint8)
    if transparent is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels).convert("RGB")


def _blend_with_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _check_memory(pixels: int, name: str) -> None:
    """Raises DataError if the memory that an image needs is not available: PIL's error for it can mean damage."""
    try:
        np.empty(8 * pixels + 2**24, np.uint8)
    except MemoryError:
        problem = f"not enough memory to decode the image {name} of {pixels} pixels; use fewer threads or a lower limit"
        raise DataError(problem, field="data.max_pixels") from None


def _reason(source: Any, error: Exception) -> str:
    size = len(source) if isinstance(source, bytes | bytearray | memoryview) else None
    if size is None and os.path.isfile(source):
        size = os.path.getsize(source)
    if size == 0:
        return "it is empty"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image, or damaged at its start"
    return f"{getattr(error, 'strerror', None) or error or type(error).__name__}"
