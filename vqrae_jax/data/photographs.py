"""The natural colour photographs in the packages scikit-image and scikit-learn; nothing is downloaded."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from vqrae_jax.data.images import center_crop, read_image
from vqrae_jax.data.source import Source
from vqrae_jax.errors import DataError

# The splits share no photograph and no scene. Not used: the right half of the motorcycle stereo pair, which repeats
# the left one, and microscope, retina and telescope images.
_FILES = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("sklearn", "datasets/images/china.jpg"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/rocket.jpg"),
    ),
    "validation": (("skimage", "data/chelsea.png"), ("sklearn", "datasets/images/flower.jpg")),
}
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
# Grids of validation crops: side as a fraction of the short side, rows, columns. 32 crops of each photograph.
_GRIDS = ((1.0, 1, 2), (0.63, 2, 3), (0.4, 3, 4), (0.25, 3, 4))


def load_photographs(split: Literal["train", "validation"]) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Returns the photographs of a split in a fixed order; DataError if a package is not installed."""
    return [read_image(_find_file(package, file)) for package, file in _FILES[split]]


class Photographs(Source):
    """Decoded images with the number of their photograph as label, repeated in order."""

    def __init__(self, records: list[dict], repeats: int, description: str):
        self._records, self._repeats, self._description = records, repeats, description

    def __len__(self) -> int:
        return len(self._records) * self._repeats

    def __getitem__(self, index: int | np.integer) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._records[index % len(self._records)]

    def name(self, index: int) -> str:
        return f"image {index % len(self._records)} of {self}"

    def __repr__(self) -> str:
        return self._description


def training_photographs(repeats: int = 1024) -> Photographs:
    """Returns the whole training photographs, to be cropped at random; `repeats` defines an epoch."""
    records = [{"image": image, "label": label} for label, image in enumerate(load_photographs("train"))]
    return Photographs(records, repeats, f"TrainingPhotographs(photographs={len(records)}, repeats={repeats})")


def validation_photographs(size: int) -> Photographs:
    """Returns 64 square crops of the validation photographs, of the whole short side down to a quarter of it.

    They are resized to `size` x `size` pixels. Photographs alternate, so that the first records show both.
    """
    crops = zip(*(_grid_crops(photograph, size) for photograph in load_photographs("validation")), strict=True)
    records = [{"image": crop, "label": label} for group in crops for label, crop in enumerate(group)]
    return Photographs(records, 1, f"ValidationPhotographs(crops={len(records)}, size={size})")


def _grid_crops(photograph: np.ndarray, size: int) -> Iterator[np.ndarray]:
    height, width = photograph.shape[:2]
    for fraction, rows, columns in _GRIDS:
        side = round(fraction * min(height, width))
        for top in _offsets(height - side, rows):
            for left in _offsets(width - side, columns):
                yield center_crop(photograph[top : top + side, left : left + side], size)


def _offsets(spare: int, count: int) -> list[int]:
    """Returns `count` evenly spaced integers from 0 to `spare`, or the middle if `count` is 1."""
    return [spare // 2] if count == 1 else [round(spare * i / (count - 1)) for i in range(count)]


def _find_file(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)  # importing the package takes time and may start a download
    path = os.path.join(os.path.dirname(spec.origin), *file.split("/")) if spec and spec.origin else None
    if path is None or not os.path.isfile(path):
        raise DataError(
            f"{file} of {_PACKAGES[package]} is not installed: pip install 'vqrae-jax[train]', or use a folder of your "
            "images (data.source='folder', data.path)",
            field="data.source", value="photographs",
        )  # fmt: skip
    return path
