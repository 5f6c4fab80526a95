"""An image that is damaged or missing is left out and counted; a disk or bucket that fails is not taken for that."""

import errno

import numpy as np
import pytest

from vqrae_jax.data import readable
from vqrae_jax.data.readable import Masked, Replaced, Skipped
from vqrae_jax.errors import DataError, ImageError

STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """What was waited for, in seconds, in place of waiting."""
    waited = []
    monkeypatch.setattr(readable.time, "sleep", waited.append)
    return waited


class Source:
    """Gray images, number i of level i; asking for one raises what is in `errors` for it, one after another."""

    def __init__(self, length=10, **errors):
        self.length, self.errors = length, {int(name[1:]): list(found) for name, found in errors.items()}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.errors.get(index):
            raise self.errors[index].pop(0)
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": index}

    def name(self, index):
        return f"image {index}"

    def __repr__(self):
        return "Source()"


def masked(source, skipped=None):
    return Masked(source, skipped or Skipped(), 8, len(source), len(source))


def seen(images):
    return [int(record["image"][0, 0, 0]) for record in map(images.__getitem__, range(len(images))) if record["mask"]]


def test_what_is_damaged_or_missing_is_masked_and_counted(pauses):
    skipped = Skipped()
    images = masked(Source(n3=[ImageError("damaged")], n4=[ImageError("not there")]), skipped)
    for _ in range(2):
        assert seen(images) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert skipped.names == ["image 3", "image 4"]
    assert not pauses


def test_what_fails_for_a_moment_is_asked_for_again(pauses):
    skipped = Skipped()
    assert seen(masked(Source(n3=[STALE, ConnectionResetError()]), skipped)) == list(range(10))
    assert not skipped.count
    assert len(pauses) == 2
    assert Replaced(Source(n3=[TimeoutError()]))[3]["image"][0, 0, 0] == 3  # in training too


@pytest.mark.parametrize("error", [STALE, PermissionError("403"), FileNotFoundError("the shard"), TimeoutError()])
def test_an_outage_is_no_picture_less(error, pauses):
    skipped = Skipped()
    images = masked(Source(n3=[error] * 9), skipped)
    with pytest.raises(DataError, match=rf"data\.eval_path: image 3 cannot be read .*{type(error).__name__}"):
        seen(images)
    assert not skipped.count
    assert len(pauses) == len(readable._PAUSES)


def test_a_hundred_damaged_in_a_row_are_an_error():
    damaged = {f"n{i}": [ImageError("damaged")] for i in range(20, 119)}
    assert len(seen(masked(Source(150, **damaged)))) == 51
    with pytest.raises(DataError, match=r"data\.eval_path: 100 images in a row .* image 119: damaged; check Source"):
        seen(masked(Source(150, **damaged, n119=[ImageError("damaged")])))
