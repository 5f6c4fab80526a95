"""The same 16 + 4 pictures, prepared as array_record and as tfrecord, read alike and without TensorFlow."""

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
from vqrae_jax.data.tfds_source import Prepared
from vqrae_jax.data.tfrecord import Part, TFRecords
from vqrae_jax.errors import ConfigError, DataError, ImageError

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
KINDS = ["array_record", "tfrecord"]


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Fails a test that so much as imports it, be it installed or not."""
    ordinary = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.partition(".")[0] != "tensorflow", "TensorFlow is imported"
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def copy(tmp_path, kind):
    """A prepared folder to damage."""
    return pathlib.Path(shutil.copytree(FIXTURES / f"waves_{kind}" / "1.0.0", tmp_path / "1.0.0"))


def prepared(kind, split="train"):
    return Prepared(None, FIXTURES / f"waves_{kind}" / "1.0.0", split)


@pytest.mark.parametrize("split", ["train", "validation", "train[:90%]", "train[5:9]", "train[50%:]+validation"])
def test_both_formats_hold_the_same_records(split):
    array, tf = (list(prepared(kind, split)) for kind in KINDS)
    assert array == tf
    assert len(array) == {"train": 16, "validation": 4, "train[:90%]": 14, "train[5:9]": 4}.get(split, 12)


def test_records_are_pictures_with_labels(kind):
    records = list(prepared(kind))
    assert len({record["image"] for record in records}) == 16
    assert {record["label"] for record in records} == {0, 1, 2, 3}
    for record in records:
        image = read_image(record["image"])
        assert min(image.shape[:2]) >= 48
        assert np.abs(np.diff(image.astype(int), axis=1)).mean() < 16  # smooth, as the fixtures' maker drew them


def test_a_part_of_a_split_is_that_part(kind):
    assert list(prepared(kind, "train[5:9]")) == list(prepared(kind))[5:9]


def test_by_name_by_version_and_by_dataset_folder(kind):
    expected = list(prepared(kind))
    name = f"waves_{kind}"
    for source in (
        Prepared(name, FIXTURES, "train"),
        Prepared(f"{name}:1.0.0", FIXTURES, "train"),
        Prepared(None, FIXTURES / name, "train"),
    ):
        assert list(source) == expected
    assert repr(Prepared(name, FIXTURES, "train")) == repr(prepared(kind))


def test_a_source_travels_to_another_process(kind):
    source = prepared(kind)
    source[3]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_it_trains_and_evaluates(kind):
    data = DataConfig(
        source="tfds", path=str(FIXTURES / f"waves_{kind}"), image_size=32, batch_size=8, eval_batch_size=3, threads=2
    )
    batch = next(train_batches(data, seed=0))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert set(batch["label"].tolist()) <= {0, 1, 2, 3}
    assert [batch["mask"].sum() for batch in evaluation_batches(data)] == [3, 1]
    assert evaluation_batches(data.model_copy(update={"eval_split": ""})) is None


@pytest.mark.parametrize("split", ["test", "train[", "train[5:3]"])
def test_a_wrong_split_lists_the_right_ones(kind, split):
    with pytest.raises(DataError, match=r"data\.eval_split=.*train \(16\), validation \(4\)"):
        Prepared(None, FIXTURES / f"waves_{kind}", split, "data.eval_split")


def test_a_dataset_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(
        DataError, match=r"data\.name='mnist': .*tfds build mnist --file_format=array_record --data_dir"
    ):
        Prepared("mnist", FIXTURES, "train")
    with pytest.raises(DataError, match=r"data\.path=.*does not exist"):
        Prepared("mnist", tmp_path / "none", "train")
    with pytest.raises(DataError, match=r"data\.path=.*no dataset_info\.json"):
        Prepared(None, tmp_path, "train")
    with pytest.raises(ConfigError, match=r"data\.name: missing"):
        Prepared(None, None, "train")


def test_a_broken_installation_of_tfds_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("tensorflow_datasets"))
    with pytest.raises(DataError, match="tensorflow_datasets"):
        prepared("tfrecord")


def change_features(folder, change):
    file = folder / "features.json"
    features = json.loads(file.read_text())
    change(features["featuresDict"]["features"])
    file.write_text(json.dumps(features))


def test_a_dataset_without_images_lists_its_features(copy):
    change_features(copy, lambda features: features.pop("image"))
    with pytest.raises(DataError, match=r"no image feature; its features are id: Text, label: ClassLabel"):
        Prepared(None, copy, "train")


def test_float_images_are_refused(copy):
    depth = {"dtype": "float32", "encodingFormat": "png", "shape": {"dimensions": ["-1", "-1", "1"]}}
    change_features(copy, lambda features: features["image"]["image"].update(depth))
    with pytest.raises(DataError, match="float32"):
        Prepared(None, copy, "train")


def test_a_dataset_without_labels_has_minus_one(copy):
    change_features(copy, lambda features: features.pop("label"))
    assert {record["label"] for record in Prepared(None, copy, "train")} == {-1}


def test_a_missing_file_is_named(copy, kind):
    (file,) = copy.glob("*-train*")
    file.unlink()
    with pytest.raises(DataError, match=rf"1 of 1 files .*{kind}"):
        Prepared(None, copy, "train")


def test_damage_costs_only_the_damaged_records(copy, kind):
    whole = list(prepared(kind))
    (file,) = copy.glob("*-train*")
    data = bytearray(file.read_bytes())
    data[20_500:20_600] = bytes(100)  # inside one of the pictures, 3 kB each
    file.write_bytes(data)
    source, skipped = Prepared(None, copy, "train"), Skipped()
    images = Replaced(source)
    for i in range(16):
        skipped.add_replaced(np.array([images[i]["unreadable"]]), source)
    assert skipped.count <= 1
    intact = [i for i in range(16) if i not in skipped and source[i] == whole[i]]
    assert len(intact) == 15


def test_damage_is_told_from_a_file_that_is_gone(copy, kind):
    (file,) = copy.glob("*-train*")
    whole, source = file.read_bytes(), Prepared(None, copy, "train")
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        source[0]
    file.write_bytes(whole[: len(whole) // 2])
    source = Prepared(None, copy, "train")
    with pytest.raises(ImageError):
        source[15]


def test_damaged_metadata_is_named(copy):
    (copy / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.path=.*1\.0\.0"):
        Prepared(None, copy, "train")
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.path=.*1\.0\.0"):
        Prepared(None, copy, "train")


def test_a_tfrecord_that_was_cut_short_keeps_its_whole_records(tmp_path):
    (file,) = (FIXTURES / "waves_tfrecord" / "1.0.0").glob("*-train*")
    whole = TFRecords([Part(str(file), 0, 16)])
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-1])
    records = TFRecords([Part(str(cut), 2, 14), Part(str(file), 4, 3)])
    assert len(records) == 17
    assert [records[i] for i in range(13)] == [whole[i] for i in range(2, 15)]
    with pytest.raises(ImageError, match="cut short: it has 15 whole records"):
        records[13]
    assert [records[i] for i in range(14, 17)] == [whole[i] for i in range(4, 7)]
