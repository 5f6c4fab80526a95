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

Fit = Literal["crop", "pad", "stretch", "model"]


class FittedImages:
    """Checked images as rows of an array [B, S, S, 3] that is computed slice by slice.

    It is uint8 if all images are, otherwise float32 in [0, 1]; with fit="model" float32, which may exceed [0, 1].
    """

    def __init__(self, images: Any, size: int, fit: Fit, fill: Sequence[float]):
        """Checks images as `Tokenizer` accepts them; for `size`, `fit` and `fill` see `fit_image`."""
        if image_files.is_pil_image(images):
            images = [images]
        if isinstance(images, list | tuple):
            self._items: Sequence[np.ndarray] = [_check_element(image, i) for i, image in enumerate(images)]
        else:
            self._items = check_images(images)
        self._size, self._fit, self._fill = size, fit, fill
        self.shape = (len(self), size, size, 3)
        is_uint8 = fit != "model" and all(x.dtype == np.uint8 for x in self._items)
        self.dtype = np.dtype(np.uint8 if is_uint8 else np.float32)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, rows: slice) -> Shaped[np.ndarray, "b H W 3"]:
        items = [fit_image(x, self._size, self._fit, self._fill) for x in self._items[rows]]
        if self.dtype == np.float32:
            items = [x.astype(np.float32) / 255 if x.dtype == np.uint8 else x for x in items]
        return np.stack(items)


def fit_image(
    image: Shaped[np.ndarray, "H W 3"], size: int, fit: Fit, fill: Sequence[float]
) -> Shaped[np.ndarray, "h w 3"]:
    """Returns an image of any shape as a square, resampled bicubically with antialiasing except for "model".

    It has the dtype of the image; what "model" resamples is float32 and may exceed [0, 1].

    Args:
      image: uint8, or floats in [0, 1].
      size: side of the square in pixels.
      fit: "crop" takes the central square, "pad" shows the whole image on `fill`, "stretch" changes its proportions,
        and "model" as well, as the PyTorch VQRAE resizes images to the size of its encoder.
      fill: color in [0, 1].

    Raises:
      ImageError: a side is longer than 32,768 pixels, unless an 8-bit image is cropped.
    """
    if image.shape[:2] == (size, size):
        return image
    if fit == "crop" and image.dtype == np.uint8:
        return image_files.center_crop(image, size)
    if max(image.shape) > _MAX_SIDE:
        raise ImageError(f"the image has {image.shape[0]} x {image.shape[1]} pixels; {_MAX_SIDE} is the longest side")
    if fit == "model":
        return _resample(image, *(matrix(n, size, "bicubic") for n in image.shape[:2]))
    scales = [size / n for n in image.shape[:2]]
    if fit != "stretch":
        scales = [max(scales) if fit == "crop" else min(scales)] * 2
    sides = [(n, max(1, round(n * scale))) for n, scale in zip(image.shape[:2], scales, strict=True)]
    spares = [max(after - size, 0) // 2 for _, after in sides]  # only the central rows and columns are computed
    rows, columns = (
        antialiased_matrix(before, after, slice(spare, spare + size))
        for (before, after), spare in zip(sides, spares, strict=True)
    )
    values = np.clip(_resample(image, rows, columns), 0, 1)
    square = np.empty((size, size, 3), np.float32)
    square[:] = fill
    top, left = (size - values.shape[0]) // 2, (size - values.shape[1]) // 2
    square[top : top + values.shape[0], left : left + values.shape[1]] = values
    return (square * 255 + 0.5).astype(np.uint8) if image.dtype == np.uint8 else square


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


def check_images(images: Any) -> Shaped[np.ndarray, "B H W 3"]:
    """Returns images as a numpy array, uint8 or float32 in [0, 1]; raises DataError with the remedy for other input."""
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
        first = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
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
    if array.ndim != 3:
        raise DataError(f"images[{index}] has shape {array.shape}; expected a PIL image or an array [H, W, 3]")
    return check_images(array[None])[0]


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
