"""The natural colour photographs that scikit-image and scikit-learn carry in their wheels; nothing is downloaded."""

import importlib.util
import os
from typing import Literal

import numpy as np

from vqrae_jax.data.images import center_crop, read_image
from vqrae_jax.errors import DataError

# Whole photographs are kept apart: the validation ones share no pixel and no scene with the training ones. Left out:
# the right eye of the motorcycle stereo pair (the same picture again), and microscope, retina and telescope images.
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
# Validation crops of a photograph: side as a fraction of the short side, rows and columns of the grid. 32 in all.
_GRID = ((1.0, 1, 2), (0.63, 2, 3), (0.4, 3, 4), (0.25, 3, 4))


def load(split: Literal["train", "validation"]) -> list[np.ndarray]:
    """The photographs of a split, uint8 [H, W, 3] each, in a fixed order.

    Raises:
      DataError: a package or one of its photographs is not installed.
    """
    return [read_image(_installed(package, file)) for package, file in _FILES[split]]


class TrainingPhotographs:
    """The training photographs over and over, to be cropped at random.

    A record is {"image": uint8 [H, W, 3], "label": which photograph}.
    """

    def __init__(self, crops_per_photograph: int = 1024):
        """`crops_per_photograph` sets what is called an epoch."""
        self._photographs = load("train")
        self._crops = crops_per_photograph

    def __len__(self) -> int:
        return self._crops * len(self._photographs)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} of {len(self)}")
        label = index % len(self._photographs)
        return {"image": self._photographs[label], "label": label}

    def key(self, index: int) -> str:
        """The record's number: it has no other name."""
        return str(index)

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return f"photograph {index % len(self._photographs)}"

    def __repr__(self) -> str:
        return f"TrainingPhotographs(photographs={len(self._photographs)}, crops_per_photograph={self._crops})"


class ValidationPhotographs:
    """64 fixed crops of the validation photographs, from the whole short side down to a quarter of it.

    A record is {"image": uint8 [size, size, 3], "label": which photograph}; the photographs take turns, so that any
    first few records show both.
    """

    def __init__(self, size: int):
        photographs = [list(_grid_crops(photograph, size)) for photograph in load("validation")]
        self._size = size
        self._records = [
            {"image": crop, "label": label}
            for crops in zip(*photographs, strict=True)
            for label, crop in enumerate(crops)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._records[index]

    def key(self, index: int) -> str:
        """The record's number: it has no other name."""
        return str(index)

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        return f"validation crop {index}"

    def __repr__(self) -> str:
        return f"ValidationPhotographs(crops={len(self)}, size={self._size})"


def _grid_crops(photograph, size):
    height, width = photograph.shape[:2]
    for fraction, rows, columns in _GRID:
        side = round(fraction * min(height, width))
        for top in _spread(height - side, rows):
            for left in _spread(width - side, columns):
                yield center_crop(photograph[top : top + side, left : left + side], size)


def _spread(spare, count):
    """`count` whole offsets in [0, spare], the ends included; the middle when there is but one."""
    return [spare // 2] if count == 1 else [round(spare * i / (count - 1)) for i in range(count)]


def _installed(package, file):
    # The file is opened where the wheel put it: asking the package would import it, and could start a download.
    spec = importlib.util.find_spec(package)
    path = os.path.join(os.path.dirname(spec.origin), *file.split("/")) if spec and spec.origin else None
    if path is None or not os.path.isfile(path):
        name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise DataError(
            f"data.source='photographs' needs {file} of {name}, which is not installed: run "
            f"`pip install {name}`, or give a folder of images (data.source='folder', data.path)"
        )
    return path
