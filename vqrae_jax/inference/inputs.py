"""Images as users pass them to a tokenizer, checked and fitted to one size."""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from vqrae_jax.data import images as image_files
from vqrae_jax.errors import DataError, ImageError
from vqrae_jax.resize import antialiased_matrix, matrix

_MAX_SIDE = 2**15  # pixels of an image that is resampled by matrices
_STRIP = 2**20  # samples that are resampled at a time

MAX_RATIO = 4  # of the sides of an image that keeps its proportions

Fit = Literal["crop", "pad", "stretch", "model", "keep"]


class FittedImages:
    """Checked images as rows of an array [B, H, W, 3] that is computed slice by slice, of squares unless fit="keep".

    It is uint8 if all images are, otherwise float32 in [0, 1]; with fit="model" float32, which may exceed [0, 1].
    """

    def __init__(self, images: Any, size: int, fit: Fit, fill: Sequence[float], cell: int = 1):
        """Checks images as `Tokenizer` accepts them; for `size`, `fit`, `fill` and `cell` see `fit_image`."""
        if image_files.is_pil_image(images):
            images = [images]
        if isinstance(images, list | tuple):
            self._items: Sequence[np.ndarray] = [_check_element(image, i) for i, image in enumerate(images)]
        else:
            self._items = check_images(images)
        self._options = (size, fit, fill, cell)
        shapes = [scale_sides(x.shape[:2], size, cell) for x in self._items] if fit == "keep" and len(self) else []
        if differing := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
            first, other = (" x ".join(map(str, shapes[i])) for i in (0, differing[0]))
            problem = f"images[{differing[0]}] becomes {other} pixels with fit='keep', but images[0] {first}"
            raise DataError(f"{problem}; pass images of one shape at a time")
        self.shape = (len(self), *(shapes[0] if shapes else (size, size)), 3)
        is_uint8 = fit != "model" and all(x.dtype == np.uint8 for x in self._items)
        self.dtype = np.dtype(np.uint8 if is_uint8 else np.float32)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, rows: slice) -> Shaped[np.ndarray, "b H W 3"]:
        items = [fit_image(x, *self._options) for x in self._items[rows]]
        if self.dtype == np.float32:
            items = [x.astype(np.float32) / 255 if x.dtype == np.uint8 else x for x in items]
        return np.stack(items)


def fit_image(
    image: Shaped[np.ndarray, "H W 3"], size: int, fit: Fit, fill: Sequence[float], cell: int = 1
) -> Shaped[np.ndarray, "h w 3"]:
    """Returns an image of any shape, resampled bicubically with antialiasing except for "model".

    It has the dtype of the image; what "model" resamples is float32 and may exceed [0, 1].

    Args:
      image: uint8, or floats in [0, 1].
      size: side of the square in pixels; with "keep" the short side.
      fit: "crop" takes the central square, "pad" shows the whole image on `fill`, "stretch" changes its proportions,
        and "model" as well, as the PyTorch VQRAE resizes images to the size of its encoder; "keep" see `scale_sides`.
      fill: color in [0, 1].
      cell: pixels of which the sides are multiples with "keep".

    Raises:
      ImageError: a side is longer than 32,768 pixels, unless an 8-bit image is cropped.
    """
    target = scale_sides(image.shape[:2], size, cell) if fit == "keep" else (size, size)
    if image.shape[:2] == target:
        return image
    if fit == "crop" and image.dtype == np.uint8:
        return image_files.center_crop(image, size)
    if max(image.shape) > _MAX_SIDE:
        raise ImageError(f"the image has {image.shape[0]} x {image.shape[1]} pixels; {_MAX_SIDE} is the longest side")
    if fit == "model":
        return _resample(image, *(matrix(n, size, "bicubic") for n in image.shape[:2]))
    scales = [side / n for side, n in zip(target, image.shape[:2], strict=True)]
    if fit not in ("stretch", "keep"):
        scales = [max(scales) if fit == "crop" else min(scales)] * 2
    sides = [(n, max(1, round(n * scale))) for n, scale in zip(image.shape[:2], scales, strict=True)]
    spares = [max(after - side, 0) // 2 for (_, after), side in zip(sides, target, strict=True)]
    rows, columns = (  # only the central ones are computed
        antialiased_matrix(before, after, slice(spare, spare + side))
        for (before, after), spare, side in zip(sides, spares, target, strict=True)
    )
    values = np.clip(_resample(image, rows, columns), 0, 1)
    fitted = np.empty((*target, 3), np.float32)
    fitted[:] = fill
    top, left = ((side - n) // 2 for side, n in zip(target, values.shape[:2], strict=True))
    fitted[top : top + values.shape[0], left : left + values.shape[1]] = values
    return (fitted * 255 + 0.5).astype(np.uint8) if image.dtype == np.uint8 else fitted


def scale_sides(sides: tuple[int, int], size: int, cell: int) -> tuple[int, int]:
    """Returns height and width with about the same proportions: the short one is `size`, both multiples of `cell`.

    Raises:
      ImageError: the long side is more than MAX_RATIO times the short one.
    """
    if max(sides) > MAX_RATIO * min(sides):
        problem = f"the image has {sides[0]} x {sides[1]} pixels, and fit='keep' takes up to {MAX_RATIO}:1"
        raise ImageError(f"{problem}; crop it, or use another fit")
    height, width = (round(n * (size // cell) / min(sides)) * cell for n in sides)
    return height, width


def _resample(
    image: Shaped[np.ndarray, "H W 3"], rows: Float[np.ndarray, "h H"], columns: Float[np.ndarray, "w W"]
) -> Float[np.ndarray, "h w 3"]:
    """Resamples in strips of columns, so that a large image is not copied as a whole."""
    result = np.zeros((len(rows), len(columns), 3), np.float32)
    width = max(1, _STRIP // image.shape[0])
    for left in range(0, image.shape[1], width):
        strip = image[:, left : left + width].astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
        result += np.einsum("hH,HWC,wW->hwC", rows, strip, columns[:, left : left + width], optimize=True)
    return result


def check_images(images: Any, first: int = 0) -> Shaped[np.ndarray, "B H W 3"]:
    """Returns images as a numpy array, uint8 or float32 in [0, 1]; raises DataError with the remedy for other input.

    Errors number the images from `first`.
    """
    images = _to_array(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise DataError(f"images have shape {images.shape}; expected [B, H, W, 3] ({_suggest(images.shape)})")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 is not a subtype of np.floating
        raise DataError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    with np.errstate(over="ignore"):  # becomes infinity
        images = images.astype(np.float32)
    low, high = (images.min(), images.max()) if images.size else (0, 1)
    if not (np.isfinite(low) and np.isfinite(high)):
        first += int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
        raise DataError(f"images[{first}] contains NaN or infinity; expected floats in [0, 1]")
    if low < 0 or high > 1:
        raise DataError(
            f"images span [{low:.7g}, {high:.7g}]; expected floats in [0, 1]: divide by 255, undo a normalization, or "
            "clip the overshoot of a resize"
        )
    return images


def check_latents(latents: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "B ..."]:
    """Returns latents as float32 [B, *shape]; raises DataError for other shapes, NaN and infinity."""
    latents = as_numpy(latents)
    real = any(jnp.issubdtype(latents.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if latents.shape[1:] != shape or not real:
        expected = ", ".join(map(str, shape))
        raise DataError(f"latents are {latents.dtype} {list(latents.shape)}; expected numbers [B, {expected}]")
    with np.errstate(over="ignore"):
        latents = latents.astype(np.float32)
    finite = np.isfinite(latents).all(axis=tuple(range(1, latents.ndim)))
    if not finite.all():
        raise DataError(f"latents[{int(np.argmin(finite))}] contains NaN or infinity")
    return latents


def as_numpy(array: Any) -> np.ndarray:
    """Converts an array of any library; PyTorch tensors are detached and copied to the CPU."""
    torch = sys.modules.get("torch")  # imported already if the array is a tensor
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
    try:
        return np.asarray(array)
    except ValueError:  # lists of different lengths
        return np.empty(0, object)


def _check_element(image: Any, index: int) -> Shaped[np.ndarray, "H W 3"]:
    if image_files.is_pil_image(image):
        return image_files.pil_to_array(image)
    array = _to_array(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise DataError(f"images[{index}] has shape {array.shape}; expected a PIL image or an array [H, W, 3]")
    return check_images(array[None], index)[0]


def _to_array(images: Any) -> np.ndarray:
    array = as_numpy(images)
    if array.dtype.kind in "OSU":
        raise DataError(
            f"images are a {type(images).__name__}; expected an array [B, H, W, 3], a PIL image, or a list of PIL "
            "images and arrays [H, W, 3]: open files first, for example with PIL.Image.open"
        )
    return array


def _suggest(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[-1] == 3:
        return "add a batch axis: images[None]"
    if len(shape) == 4 and shape[1] == 3:
        return "channels are last: images.transpose(0, 2, 3, 1), in PyTorch images.permute(0, 2, 3, 1)"
    if len(shape) == 4 and shape[-1] in (1, 4):
        return "three channels: images.repeat(3, axis=-1)" if shape[-1] == 1 else "three channels: images[..., :3]"
    return "three channels, on the last axis"
