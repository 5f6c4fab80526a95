"""The photographs of the installed packages: distinct splits, no network."""

import socket

import numpy as np
import pytest

from vqrae_jax.data import photographs
from vqrae_jax.data.images import center_crop
from vqrae_jax.errors import DataError


def test_photographs_are_large_and_in_colour_without_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    for split, least in [("train", 4), ("validation", 2)]:
        images = photographs.load_photographs(split)
        assert len(images) >= least
        for image in images:
            assert min(image.shape[:2]) >= 256
            assert image.std(axis=-1).mean() > 5  # channels differ


def test_splits_share_no_photograph():
    train, validation = (
        [center_crop(image, 16).astype(float) for image in photographs.load_photographs(split)]
        for split in ("train", "validation")
    )
    assert min(np.abs(a - b).mean() for a in train for b in validation) > 20


def test_an_epoch_has_each_photograph_equally_often():
    source = photographs.training_photographs(repeats=3)
    assert set(np.bincount([record["label"] for record in source])) == {3}


def test_validation_crops_are_fixed_and_distinct_and_alternate():
    first, second = (photographs.validation_photographs(64) for _ in range(2))
    assert len(first) == 64
    crops = [first[i]["image"] for i in range(64)]
    assert all(crop.shape == (64, 64, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 64
    assert [first[i]["label"] for i in range(4)] == [0, 1, 0, 1]
    assert all(np.array_equal(second[i]["image"], crops[i]) for i in range(64))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="scikit-image") as error:
        photographs.load_photographs("train")
    assert error.value.field == "data.source"
