"""What people hand to a tokenizer -> batches of pictures of one size."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from vqrae_jax.data import images as image_files
from vqrae_jax.resize import matrix

Fit = Literal["crop", "pad", "stretch", "model"]


class TokenizerError(ValueError):
    """What was given is no picture or no code of this tokenizer."""


class Pictures:
    """Checked pictures, uint8 or floats in [0, 1], of any sizes."""

    def __init__(self, images: Any):
        """
        Args:
          images: an array [B, H, W, 3], a PIL image, or a list of PIL images and arrays [H, W, 3]. Arrays are those of
            numpy or JAX, uint8 or floats in [0, 1].

        Raises:
          TokenizerError: wrong rank, channels, type or range, with what to do about it.
        """
        if image_files.is_pil(images):
            images = [images]
        if isinstance(images, list | tuple):
            self._items: Sequence[np.ndarray] = [_element(image, i) for i, image in enumerate(images)]
        else:
            self._items = check_images(images)
        self.dtype = np.dtype(np.uint8 if all(x.dtype == np.uint8 for x in self._items) else np.float32)

    def __len__(self) -> int:
        return len(self._items)

    def shape(self, size: int, fit: Fit) -> tuple[int, int, int]:
        """Of each once fitted.

        Raises:
          TokenizerError: left to the model, they have to be of one size.
        """
        if fit != "model" or not len(self):
            return (size, size, 3)
        shapes = {x.shape for x in self._items}
        if len(shapes) > 1:
            raise TokenizerError(f'fit="model" takes images of one size at a time, not {sorted(shapes)}')
        return shapes.pop()

    def batch(self, chosen: slice, size: int, fit: Fit, fill: Sequence[float]) -> Shaped[np.ndarray, "b S S 3"]:
        """Some of them, fitted, as `dtype`."""
        items = [fitted(x, size, fit, fill) for x in self._items[chosen]]
        if self.dtype == np.float32:
            items = [x.astype(np.float32) / 255 if x.dtype == np.uint8 else x for x in items]
        return np.stack(items)


def fitted(
    picture: Shaped[np.ndarray, "H W 3"], size: int, fit: Fit, fill: Sequence[float]
) -> Shaped[np.ndarray, "S S 3"]:
    """A picture of any shape as a square of `size` pixels, resampled bicubically with antialias; its dtype is kept.

    Args:
      fit: "crop" takes the central square, "pad" shows all of it on `fill` (a colour in [0, 1]), "stretch" changes its
        proportions, "model" leaves it as it is.
    """
    if fit == "model" or picture.shape[:2] == (size, size):
        return picture
    if fit == "crop" and picture.dtype == np.uint8:
        return image_files.center_crop(picture, size)
    scales = [size / n for n in picture.shape[:2]]
    if fit != "stretch":
        scales = [max(scales) if fit == "crop" else min(scales)] * 2
    height, width = (max(1, round(n * s)) for n, s in zip(picture.shape[:2], scales, strict=True))
    values = picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)
    rows = _middle(matrix(values.shape[0], height, "bicubic_antialias"), size)
    columns = _middle(matrix(values.shape[1], width, "bicubic_antialias"), size)
    values = np.clip(np.einsum("hH,HWC,wW->hwC", rows, values, columns, optimize=True), 0, 1)
    square = np.empty((size, size, 3), np.float32)
    square[:] = fill
    top, left = (size - values.shape[0]) // 2, (size - values.shape[1]) // 2
    square[top : top + values.shape[0], left : left + values.shape[1]] = values
    return (square * 255 + 0.5).astype(np.uint8) if picture.dtype == np.uint8 else square


def check_images(images: Any) -> Shaped[np.ndarray, "B H W 3"]:
    """Images as they are if they are uint8, else as float32 in [0, 1].

    Raises:
      TokenizerError: wrong rank, channels, type or range, with what to do about it.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        hint = "add a batch axis: images[None]" if images.ndim == 3 else "channels come last, three of them"
        raise TokenizerError(f"images have shape {images.shape}; expected [B, H, W, 3] ({hint})")
    if images.dtype == np.uint8:
        return images
    # bfloat16 is no np.floating; what converts to float without being an integer or a bool is one here.
    if images.dtype.kind not in "fV":
        raise TokenizerError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    images = images.astype(np.float32)
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise TokenizerError(
            f"images span [{images.min():.3g}, {images.max():.3g}]; floats are in [0, 1]: divide by 255, or undo a "
            f"normalization, before"
        )
    return images


def padded(batch: Shaped[np.ndarray, "b ..."], size: int) -> Shaped[np.ndarray, "size ..."]:
    """`batch` and its last entry over and over: what it computes is thrown away."""
    return batch if len(batch) == size else np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def bucket(count: int, largest: int, multiple: int = 1) -> int:
    """Batch size for `count` entries: `multiple` times a power of two, so that few sizes are ever compiled."""
    parts = math.ceil(count / multiple)
    return min(multiple << max(parts - 1, 0).bit_length(), largest)


def _element(image: Any, index: int) -> UInt8[np.ndarray, "H W 3"] | Float[np.ndarray, "H W 3"]:
    if image_files.is_pil(image):
        return image_files.from_pil(image)
    array = np.asarray(image)
    if array.ndim != 3:
        raise TokenizerError(
            f"images[{index}] of the list has shape {array.shape}; expected a PIL image or an array [H, W, 3]"
        )
    return check_images(array[None])[0]


def _middle(weights: Float[np.ndarray, "out in"], size: int) -> Float[np.ndarray, "size in"]:
    """The central rows, where there are more than `size`."""
    start = max(len(weights) - size, 0) // 2
    return weights[start : start + size]
