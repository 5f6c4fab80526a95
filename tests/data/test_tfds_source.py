"""Prepared datasets (the same 16 + 4 images as array_record and as tfrecord) are read without TensorFlow."""

import builtins
import json
import pathlib
import pickle
import shutil
import sys
import types

import numpy as np
import pytest

from vqrae_jax.config import DataConfig
from vqrae_jax.data.images import read_image
from vqrae_jax.data.pipeline import evaluation_batches, train_batches
from vqrae_jax.data.readable import Replaced, Skipped
from vqrae_jax.data.source import Keys
from vqrae_jax.data.tfds_source import Part, Prepared, TFRecords
from vqrae_jax.errors import ConfigError, DataError, ImageError

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
KINDS = ["array_record", "tfrecord"]


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Fails a test that imports TensorFlow, whether it is installed or not."""
    original = builtins.__import__

    def checked_import(name, *args, **kwargs):
        assert name.partition(".")[0] != "tensorflow", "TensorFlow is imported"
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", checked_import)
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def copy(tmp_path, kind):
    """A copy of a prepared folder, to be changed."""
    return pathlib.Path(shutil.copytree(FIXTURES / f"waves_{kind}" / "1.0.0", tmp_path / "1.0.0"))


def prepared(kind, split="train"):
    return Prepared(None, FIXTURES / f"waves_{kind}" / "1.0.0", split)


@pytest.mark.parametrize("split", ["train", "validation", "train[:90%]", "train[5:9]", "train[50%:]+validation"])
def test_both_formats_have_the_same_records(split):
    array, tf = (list(prepared(kind, split)) for kind in KINDS)
    assert array == tf
    if split == "train[5:9]":
        assert array == list(prepared("array_record"))[5:9]
    assert len(array) == {"train": 16, "validation": 4, "train[:90%]": 14, "train[5:9]": 4}.get(split, 12)


def test_records_are_images_with_labels(kind):
    source = prepared(kind)
    records = list(source)
    assert list(pickle.loads(pickle.dumps(source))) == records
    assert len({record["image"] for record in records}) == 16
    assert {record["label"] for record in records} == {0, 1, 2, 3}
    for record in records:
        image = read_image(record["image"])
        assert min(image.shape[:2]) >= 48
        assert np.abs(np.diff(image.astype(int), axis=1)).mean() < 16  # smooth, as the images of the fixtures are


def test_datasets_are_found_by_name_version_and_folder(kind):
    expected = list(prepared(kind))
    name = f"waves_{kind}"
    for source in (
        Prepared(name, FIXTURES, "train"),
        Prepared(f"{name}:1.0.0", FIXTURES, "train"),
        Prepared(None, FIXTURES / name, "train"),
    ):
        assert list(source) == expected
    assert repr(Prepared(name, FIXTURES, "train")) == repr(prepared(kind))


def test_training_and_evaluation(kind):
    sizes = {"image_size": 32, "batch_size": 8, "eval_batch_size": 3, "threads": 2}
    data = DataConfig(source="tfds", path=str(FIXTURES / f"waves_{kind}"), **sizes)
    batch = next(train_batches(data, seed=0))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert set(batch["label"].tolist()) <= {0, 1, 2, 3}
    assert [batch["mask"].sum() for batch in evaluation_batches(data)] == [3, 1]
    assert evaluation_batches(data.model_copy(update={"eval_split": ""})) is None


@pytest.mark.parametrize("split", ["test", "train[", "train[5:3]"])
def test_errors_of_splits_list_the_splits(kind, split):
    with pytest.raises(DataError, match=r"train \(16\), validation \(4\)") as error:
        Prepared(None, FIXTURES / f"waves_{kind}", split, "data.eval_split")
    assert (error.value.field, error.value.value) == ("data.eval_split", split)


def test_missing_datasets_name_the_field(tmp_path):
    for name, path, kind, field in (
        ("mnist", FIXTURES, DataError, "data.name"),
        ("mnist", tmp_path / "none", DataError, "data.path"),
        (None, tmp_path, DataError, "data.path"),
        (None, None, ConfigError, "data.name"),
    ):
        with pytest.raises(kind) as error:
            Prepared(name, path, "train")
        assert error.value.field == field


def test_a_failed_import_of_tfds_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("tensorflow_datasets"))
    with pytest.raises(DataError, match="tensorflow_datasets"):
        prepared("tfrecord")


def change_features(folder, change):
    file = folder / "features.json"
    features = json.loads(file.read_text())
    change(features["featuresDict"]["features"])
    file.write_text(json.dumps(features))


def test_datasets_without_8_bit_images_are_refused(copy):
    depth = {"dtype": "float32", "encodingFormat": "png", "shape": {"dimensions": ["-1", "-1", "1"]}}
    change_features(copy, lambda features: features["image"]["image"].update(depth))
    with pytest.raises(DataError, match="float32"):
        Prepared(None, copy, "train")
    change_features(copy, lambda features: features.pop("image"))
    with pytest.raises(DataError, match="id: Text, label: ClassLabel"):
        Prepared(None, copy, "train")


def test_labels_are_minus_one_without_a_class_label_and_missing_files_are_named(copy, kind):
    change_features(copy, lambda features: features.pop("label"))
    assert {record["label"] for record in Prepared(None, copy, "train")} == {-1}
    (file,) = copy.glob("*-train*")
    file.unlink()
    with pytest.raises(DataError, match=rf"1 of 1 files .*{kind}"):
        Prepared(None, copy, "train")


def test_features_can_be_named(copy):
    source = Prepared(None, copy, "train")
    assert source.classes == ("0", "1", "2", "3")
    change_features(copy, lambda features: features.update(fine=features.pop("label"), photo=features.pop("image")))
    assert Prepared(None, copy, "train", "data.train_split", Keys("photo", "fine")).classes == source.classes
    for field, keys in (("data.label_key", Keys(label="id")), ("data.image_key", Keys("id"))):
        with pytest.raises(DataError, match="fine: ClassLabel") as error:
            Prepared(None, copy, "train", "data.train_split", keys)
        assert error.value.field == field


def test_only_damaged_records_are_skipped(copy, kind):
    whole = list(prepared(kind))
    (file,) = copy.glob("*-train*")
    data = bytearray(file.read_bytes())
    data[20_500:20_600] = bytes(100)  # within one of the images, which have 3 kB each
    file.write_bytes(data)
    source, skipped = Prepared(None, copy, "train"), Skipped()
    images = Replaced(source)
    for i in range(16):
        skipped.add_replaced(np.array([images[i]["unreadable"]]), source)
    assert skipped.count <= 1
    intact = [i for i in range(16) if i not in skipped and source[i] == whole[i]]
    assert len(intact) == 15


def test_damage_is_an_image_error_and_a_missing_file_an_os_error(copy, kind):
    (file,) = copy.glob("*-train*")
    whole, source = file.read_bytes(), Prepared(None, copy, "train")
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        source[0]
    file.write_bytes(whole[: len(whole) // 2])
    source = Prepared(None, copy, "train")
    with pytest.raises(ImageError):
        source[15]


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_damaged_metadata_is_an_error(copy, name):
    (copy / name).write_text("{")
    with pytest.raises(DataError) as error:
        Prepared(None, copy, "train")
    assert (error.value.field, error.value.value) == ("data.path", str(copy))


def test_whole_records_of_a_short_tfrecord_file_are_read(tmp_path):
    (file,) = (FIXTURES / "waves_tfrecord" / "1.0.0").glob("*-train*")
    whole = TFRecords([Part(str(file), 0, 16)])
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-1])
    records = TFRecords([Part(str(cut), 2, 14), Part(str(file), 4, 3)])
    assert len(records) == 17
    assert [records[i] for i in range(13)] == [whole[i] for i in range(2, 15)]
    with pytest.raises(ImageError, match="15 whole records"):
        records[13]
    assert [records[i] for i in range(14, 17)] == [whole[i] for i in range(4, 7)]
