"""Damaged and missing images are skipped and counted; failures of a disk or bucket are errors."""

import errno

import numpy as np
import pytest

from vqrae_jax.data import readable, source
from vqrae_jax.data.readable import Masked, Replaced, Skipped
from vqrae_jax.errors import DataError, ImageError

STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds of all pauses, which are skipped."""
    seconds = []
    monkeypatch.setattr(readable.time, "sleep", seconds.append)
    return seconds


class Images(source.Source):
    """Gray images, number i of level i; access to image i raises the `errors` of "n<i>", one after another."""

    def __init__(self, length=10, **errors):
        self.length, self.errors = length, {int(name[1:]): list(values) for name, values in errors.items()}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.errors.get(index):
            raise self.errors[index].pop(0)
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": index}

    def name(self, index):
        return f"image {index}"


def masked(images, skipped=None):
    return Masked(images, skipped or Skipped(), 8, len(images), len(images))


def levels(images):
    return [int(record["image"][0, 0, 0]) for record in map(images.__getitem__, range(len(images))) if record["mask"]]


def test_damaged_and_missing_images_are_masked_and_counted(pauses):
    skipped = Skipped()
    images = masked(Images(n3=[ImageError("damaged")], n4=[ImageError("missing")]), skipped)
    for _ in range(2):
        assert levels(images) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert skipped.names == ["image 3", "image 4"]
    assert not pauses


@pytest.mark.parametrize(
    "record",
    [
        {"image": np.full((8, 8, 3), np.nan, np.float32)}, {"image": np.ones((8, 8, 3))},
        {"image": np.ones((8, 8, 3), int)}, {"image": np.zeros((8, 8), np.uint8)},
        {"image": np.zeros((0, 8, 3), np.uint8)}, {"label": 2**40},
    ],
)  # fmt: skip
def test_arrays_that_are_not_images_are_skipped(record, monkeypatch):
    original = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: original(self, i) | (record if i == 3 else {}))
    skipped = Skipped()
    assert levels(masked(Images(), skipped)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert skipped.names == ["image 3"]
    assert Replaced(Images())[3]["image"][0, 0, 0] == 4


def test_short_failures_are_retried(pauses):
    skipped = Skipped()
    assert levels(masked(Images(n3=[STALE, ConnectionResetError()]), skipped)) == list(range(10))
    assert not skipped.count
    assert len(pauses) == 2
    assert Replaced(Images(n3=[TimeoutError()]))[3]["image"][0, 0, 0] == 3


@pytest.mark.parametrize("failure", [STALE, PermissionError("403"), FileNotFoundError("the shard"), TimeoutError()])
def test_lasting_failures_are_errors_in_evaluation(failure, pauses):
    skipped = Skipped()
    with pytest.raises(DataError, match=rf"image 3 .*{type(failure).__name__}") as error:
        levels(masked(Images(n3=[failure] * 9), skipped))
    assert error.value.field == "data.eval_path"
    assert not skipped.count
    assert len(pauses) == len(readable._PAUSES)


def test_a_hundred_damaged_images_in_a_row_are_an_error():
    damaged = {f"n{i}": [ImageError("damaged")] for i in range(20, 119)}
    assert len(levels(masked(Images(150, **damaged)))) == 51
    with pytest.raises(DataError, match=r"100 .*image 119") as error:
        levels(masked(Images(150, **damaged, n119=[ImageError("damaged")])))
    assert error.value.field == "data.eval_path"
