"""Image files to uint8 arrays and back, and the crops that turn any image into a square."""

import collections
import io
import logging
import math
import os
import sys

import numpy as np

from vqrae_jax import storage
from vqrae_jax.data import files
from vqrae_jax.errors import DataError, ImageError

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Of pictures too, which are not read: a folder's own notes, labels and captions are left out without a word, these not.
_OTHERS = (
    ".apng", ".arw", ".avifs", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpe",
    ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".psd", ".qoi", ".raw", ".rw2", ".svg", ".tga",
)  # fmt: skip
WRITTEN = {".png": {}, ".jpg": {"quality": 95}, ".jpeg": {"quality": 95}, ".webp": {"quality": 95}}  # saving options
# Named rather than left open: PIL hands some of its other formats to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF")
_ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 64  # a picture this many times longer than wide

_log = logging.getLogger(__name__)


def read_image(source: str | os.PathLike | bytes, at_least: int | None = None) -> np.ndarray:
    """Decodes a file, or the bytes of one, as it is meant to be seen.

    EXIF orientation is applied; palettes, CMYK, grayscale and 16 bits become 8-bit RGB; alpha is laid over white; of an
    animation the first frame counts. Colour profiles are not applied.

    Args:
      source: a path or an encoded image.
      at_least: pixels; a JPEG may come out 2, 4 or 8 times smaller as long as its short side keeps this many (faster).

    Returns:
      uint8 [H, W, 3].

    Raises:
      ImageError: missing, empty, truncated, not an image, or more pixels than PIL holds to be safe.
    """
    return np.array(read_picture(source, at_least))


def read_picture(source: str | os.PathLike | bytes, at_least: int | None = None):
    """`read_image` as a PIL image in mode RGB, for the crops below: they would only turn an array into one again."""
    from PIL import Image

    if isinstance(source, bytes | bytearray | memoryview):
        name, stream = f"of {len(source)} bytes", io.BytesIO(source)
    else:
        name, stream = repr(os.fspath(source)), source
    try:
        with Image.open(stream, formats=_FORMATS) as picture:
            if at_least:
                picture.draft(None, (at_least, at_least))
            picture.load()
            return _to_rgb(_upright(picture))
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise ImageError(f"cannot read the image {name}: {_reason(source, error)}") from error


def is_pil(value: object) -> bool:
    """Whether `value` is a PIL image; PIL is not imported for it."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def from_pil(picture) -> np.ndarray:
    """A PIL image as `read_image` would give it, uint8 [H, W, 3].

    Raises:
      ImageError: pixels of an unknown range, or a file behind it that cannot be read.
    """
    try:
        return np.array(_to_rgb(_upright(picture)))
    except Exception as error:
        raise ImageError(f"cannot use the PIL image of mode {picture.mode!r}: {error}") from error


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] or [H, W] as PNG, JPEG or WebP, whichever the suffix says, here or in a bucket.

    The file appears under its name only when it is complete; missing folders are made.

    Raises:
      DataError: another suffix, shape or dtype.
      OSError, StorageError: the disk or the bucket refused; an earlier file of that name is still there.
    """
    from PIL import Image

    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in WRITTEN:
        raise DataError(f"cannot write {path!r}: its suffix must be one of {', '.join(WRITTEN)}")
    image = np.asarray(image)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
        raise DataError(
            f"cannot write {path!r}: got {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] or [H, W]"
        )
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, Image.registered_extensions()[suffix], **WRITTEN[suffix])
    storage.write(path, encoded.getvalue())


# A crop of an array is an array, that of a PIL image in mode RGB a PIL image.


def center_crop(image, size: int):
    """The central square of `image` [H, W, 3] once its short side has `size` pixels: uint8 [size, size, 3].

    Bicubic with antialias as PIL does it. An image at least four times too large is first averaged over whole blocks,
    down to no less than twice the size: hardly a difference, and several times faster.
    """
    return _resized_square(image, size, size, lambda spare: spare // 2)


def ten_crop(image, size: int, resize: float = 1.1) -> np.ndarray:
    """The four corners and the centre of `image` [H, W, 3] with a short side of size * resize, and their mirror images.

    Returns uint8 [10, size, size, 3] (Krizhevsky et al. 2012).
    """
    picture, crops = _picture(image), []
    for down, across in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1)):  # halves of the spare pixels
        halves = iter((across, down))
        square = _resized_square(picture, size, round(size * resize), lambda spare: spare * next(halves) // 2)  # noqa: B023
        crops.append(np.asarray(square))
    return np.stack([*crops, *map(flip, crops)])


def random_crop(
    image, size: int, rng: np.random.Generator, resize: float = 1.0, scale: tuple[float, float] = (1.0, 1.0)
):
    """A random square of `image` [H, W, 3] as uint8 [size, size, 3].

    With `scale` (1, 1) the short side is resized to size * resize and a square is cut at a random place. Any other
    `scale` cuts a square from the source pixels, its side size * s with s drawn log-uniformly in `scale` and at most
    the short side, and resizes that; `resize` then plays no part.
    """
    if tuple(scale) == (1.0, 1.0):
        return _resized_square(image, size, max(size, round(size * resize)), lambda spare: int(rng.integers(spare + 1)))
    height, width = _height_width(image)
    side = size * np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1])))
    side = int(np.clip(round(side), 1, min(height, width)))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    square = _cut(image, left, top, side)
    return square if side == size else center_crop(square, size)


def adm_center_crop(image, size: int):
    """The central square of ADM (Dhariwal and Nichol 2021, guided-diffusion's `center_crop_arr`).

    Halved by averaging while the short side is at least 2 * size, then resized bicubically, then cut: the protocol
    that most published Frechet distances on ImageNet assume.
    """
    picture = _adm_resized(_picture(image), size)
    left, top = ((length - size) // 2 for length in picture.size)
    return _like(image, _cut(picture, left, top, size))


def adm_random_crop(image, size: int, rng: np.random.Generator, smallest: float = 0.8):
    """A random square of ADM (guided-diffusion's `random_crop_arr`): uint8 [size, size, 3].

    The short side is resized as in `adm_center_crop` to a whole number drawn uniformly from size to
    ceil(size / smallest), then a square is cut at a random place.
    """
    picture = _adm_resized(_picture(image), int(rng.integers(size, math.ceil(size / smallest) + 1)))
    top, left = (int(rng.integers(length - size + 1)) for length in picture.size[::-1])
    return _like(image, _cut(picture, left, top, size))


def flip(image):
    """`image` [H, W, 3] mirrored left to right."""
    from PIL import Image

    return image[:, ::-1] if isinstance(image, np.ndarray) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def image_files(folder: str | os.PathLike, field: str = "data.path") -> list[str]:
    """Every image below `folder`, here or in a bucket, by suffix, whatever its case, in an order that nothing changes.

    Hidden files and folders are left out; links are followed, each folder once. Of pictures in other formats a warning
    tells how many there are.

    Raises:
      DataError: naming `field`, for a folder that is missing, a file, or without images.
    """
    folder = os.fspath(folder)
    found = files.below(folder, field) if files.is_remote(folder) else _walk(folder, field)
    others = collections.Counter(os.path.splitext(path)[1].lower() for path in found if path.lower().endswith(_OTHERS))
    found = [path for path in found if path.lower().endswith(SUFFIXES)]
    if others:
        told = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(others.items()))
        _log.warning(
            "%s: files left out, as pictures of these kinds are not read: %s; convert them to PNG or JPEG", folder, told
        )  # fmt: skip
    if not found:
        raise DataError(
            f"{field}={folder!r} holds no images: expected files ending in {', '.join(SUFFIXES)}, "
            "in the folder or below it"
        )
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder, as nothing is before \0


def _walk(folder, field):
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{field}={folder!r} {what}: give a folder of images")
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(here, name) for name in names if not name.startswith(".")]
    return found


def _picture(image):
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image


def _like(image, picture):
    return np.asarray(picture) if isinstance(image, np.ndarray) else picture


def _height_width(image):
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


def _cut(image, left, top, side):
    right, bottom = left + side, top + side
    return image[top:bottom, left:right] if isinstance(image, np.ndarray) else image.crop((left, top, right, bottom))


def _adm_resized(picture, side):
    """`picture` with a short side of `side`; of a strip, whose whole would fill the memory, the middle."""
    from PIL import Image

    longest = _STRIP * min(picture.size)
    if max(picture.size) > longest:
        spare = [max(0, length - longest) // 2 for length in picture.size]
        picture = picture.crop((*spare, *(length - cut for length, cut in zip(picture.size, spare, strict=True))))
    while min(picture.size) >= 2 * side:
        picture = picture.resize([length // 2 for length in picture.size], Image.Resampling.BOX)
    scale = side / min(picture.size)
    return picture.resize([round(length * scale) for length in picture.size], Image.Resampling.BICUBIC)


def _resized_square(image, size, side, place):
    """A square of `size` from `image` with its short side resized to `side`; place(spare pixels) -> offset."""
    from PIL import Image

    picture = _picture(image)
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = place(width - size), place(height - size)
    # Only the square is computed: the same pixels as resizing all and cutting, also for a very long image.
    across, down = picture.width / width, picture.height / height
    right, bottom = min((left + size) * across, picture.width), min((top + size) * down, picture.height)
    box = (left * across, top * down, right, bottom)
    return _like(image, picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _upright(picture):
    from PIL import Image

    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose a good picture
        orientation = 1
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _to_rgb(picture):
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("integers beyond 16 bits")
        return Image.fromarray(np.round(values * (255 / 0xFFFF)).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _reason(source, error):
    size = len(source) if isinstance(source, bytes | bytearray | memoryview) else None
    if size is None and os.path.isfile(source):
        size = os.path.getsize(source)
    if size == 0:
        return "it is empty"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image, or damaged at its start"
    return f"{error or type(error).__name__}"
