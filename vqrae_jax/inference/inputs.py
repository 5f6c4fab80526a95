"""What people hand to a tokenizer -> batches of pictures of one size."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from vqrae_jax.data import images as image_files
from vqrae_jax.errors import DataError
from vqrae_jax.resize import matrix

Fit = Literal["crop", "pad", "stretch", "model"]


class Pictures:
    """Checked pictures, uint8 or floats in [0, 1], of any sizes."""

    def __init__(self, images: Any):
        """
        Args:
          images: an array [B, H, W, 3], a PIL image, or a list of PIL images and arrays [H, W, 3]. Arrays are those of
            numpy, JAX or PyTorch, uint8 or floats in [0, 1].

        Raises:
          DataError: wrong rank, channels, type or range, with what to do about it.
        """
        if image_files.is_pil_image(images):
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
          DataError: left to the model, they have to be of one size.
        """
        if fit != "model" or not len(self):
            return (size, size, 3)
        shapes = {x.shape for x in self._items}
        if len(shapes) > 1:
            raise DataError(f'fit="model" takes images of one size at a time, not {sorted(shapes)}')
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
      DataError: wrong rank, channels, type or range, with what to do about it.
    """
    images = _array(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise DataError(f"images have shape {images.shape}; expected [B, H, W, 3] ({_remedy(images.shape)})")
    if images.dtype == np.uint8:
        return images
    # bfloat16 is no np.floating; what converts to float without being an integer or a bool is one here.
    if images.dtype.kind not in "fV":
        raise DataError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    images = images.astype(np.float32)
    low, high = (images.min(), images.max()) if images.size else (0, 1)
    if not (np.isfinite(low) and np.isfinite(high)):
        broken = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
        raise DataError(f"images[{broken}] has values that are no numbers (NaN or infinity); floats are in [0, 1]")
    if low < 0 or high > 1:
        raise DataError(
            f"images span [{low:.7g}, {high:.7g}]; floats are in [0, 1]: divide by 255, undo a normalization, or clip "
            "what resizing overshot, before"
        )
    return images


def as_numpy(given: Any) -> np.ndarray:
    """An array of any library; a PyTorch tensor is taken off its device and its graph."""
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given  # which numpy has not
    return np.asarray(given)


def padded(batch: Shaped[np.ndarray, "b ..."], size: int) -> Shaped[np.ndarray, "size ..."]:
    """`batch` and its last entry over and over: what it computes is thrown away."""
    return batch if len(batch) == size else np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def bucket(count: int, largest: int, multiple: int = 1) -> int:
    """Batch size for `count` entries: `multiple` times a power of two, so that few sizes are ever compiled."""
    parts = math.ceil(count / multiple)
    return min(multiple << max(parts - 1, 0).bit_length(), largest)


def _element(image: Any, index: int) -> UInt8[np.ndarray, "H W 3"] | Float[np.ndarray, "H W 3"]:
    if image_files.is_pil_image(image):
        return image_files.pil_to_array(image)
    array = _array(image)
    if array.ndim != 3:
        raise DataError(
            f"images[{index}] of the list has shape {array.shape}; expected a PIL image or an array [H, W, 3]"
        )
    return check_images(array[None])[0]


def _array(given: Any) -> np.ndarray:
    array = as_numpy(given)
    if array.dtype.kind in "OSU":
        raise DataError(
            f"images are a {type(given).__name__}; expected an array [B, H, W, 3], a PIL image, or a list of PIL "
            "images and arrays [H, W, 3]: open files before, as by PIL.Image.open"
        )
    return array


def _remedy(shape: tuple[int, ...]) -> str:
    """What makes images of a wrong shape right ones, as far as it can be told."""
    if len(shape) == 3 and shape[-1] == 3:
        return "add a batch axis: images[None]"
    if len(shape) == 4 and shape[1] == 3:
        return "channels come last: images.transpose(0, 2, 3, 1), in PyTorch images.permute(0, 2, 3, 1)"
    if len(shape) == 4 and shape[-1] in (1, 4):
        return "three channels: images.repeat(3, axis=-1)" if shape[-1] == 1 else "three channels: images[..., :3]"
    return "channels come last, three of them"


def _middle(weights: Float[np.ndarray, "out in"], size: int) -> Float[np.ndarray, "size in"]:
    """The central rows, where there are more than `size`."""
    start = max(len(weights) - size, 0) // 2
    return weights[start : start + size]
