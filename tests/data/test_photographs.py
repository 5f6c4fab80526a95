"""The bundled photographs are there, apart from each other, and never fetched."""

import socket
import sys

import numpy as np
import pytest

from vqrae_jax.data import photographs
from vqrae_jax.data.images import center_crop
from vqrae_jax.errors import DataError


def test_photographs_are_large_and_in_colour_without_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    for split, least in [("train", 4), ("validation", 2)]:
        pictures = photographs.load_photographs(split)
        assert len(pictures) >= least
        for picture in pictures:
            assert picture.dtype == np.uint8
            assert min(picture.shape[:2]) >= 256
            assert picture.std(axis=-1).mean() > 5  # channels differ


def test_no_validation_photograph_is_trained_on():
    thumbnails = {
        split: [center_crop(picture, 16).astype(float) for picture in photographs.load_photographs(split)]
        for split in ("train", "validation")
    }
    for held_out in thumbnails["validation"]:
        assert min(np.abs(held_out - seen).mean() for seen in thumbnails["train"]) > 20


def test_an_epoch_shows_every_photograph_equally_often():
    source = photographs.TrainingPhotographs(crops_per_photograph=3)
    labels = [record["label"] for record in source]
    assert len(labels) == len(source)
    assert set(np.bincount(labels)) == {3}


def test_validation_crops_are_fixed_distinct_and_take_turns():
    source = photographs.ValidationPhotographs(64)
    assert len(source) == 64
    crops = [source[i]["image"] for i in range(64)]
    assert all(crop.shape == (64, 64, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 64
    assert {source[i]["label"] for i in range(2)} == {0, 1}
    again = photographs.ValidationPhotographs(64)
    assert all(np.array_equal(again[i]["image"], crops[i]) for i in range(64))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"data\.source.*pip install scikit-image"):
        photographs.load_photographs("train")
