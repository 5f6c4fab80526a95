"""Batches of codes: a global shuffle of images and views that depends on the seed and the number of a batch only."""

import json
import logging

import numpy as np
import pytest

from vqrae_jax.config import Config, DataConfig, from_dict
from vqrae_jax.data import codes
from vqrae_jax.data.code_shards import Columns
from vqrae_jax.data.pipeline import evaluation_batches, evaluation_source, train_batches, training_source
from vqrae_jax.errors import ConfigError, DataError, UserError


def write(folder, images=10, labels=(0, 1, 2), **changes):
    """Writes codes 100 * image + 10 * view + position; labels repeat."""
    views = {"flip": 2, "ten-crop": 10}.get(changes.get("views"), 1)
    fields = {
        "tokenizer": "0" * 64, "source": "test", "images": images, "views": "one", "code_dtype": "uint16",
        "code_shape": (2, 2) if views == 1 else (views, 2, 2), "codebook_size": 1100, "image_size": 32, "format": "npz",
        "shard_size": 4, "classes": ("a", "b", "c"),
    }  # fmt: skip
    plan = codes.Plan(**(fields | changes))
    for shard in codes.start_dataset(folder, plan):
        index = np.arange(*plan.image_range(shard))
        grids = 100 * index[:, None, None] + 10 * np.arange(views)[:, None] + np.arange(4)
        grids = grids.reshape(-1, *plan.code_shape).astype(np.uint16)
        columns = Columns(index, [f"{i}.png" for i in index], np.resize(labels, images)[index].astype(np.int32), grids)
        codes.write_shard(folder, plan, shard, columns)
    codes.finish_dataset(folder, plan)
    return folder


def config(folder, **changes):
    fields = {"source": "codes", "path": str(folder), "eval_path": str(folder), "batch_size": 5, "eval_batch_size": 4}
    return DataConfig(**(fields | {"threads": 2} | changes))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def join(parts):
    """Returns the global batches of the batches of each process."""
    return [{n: np.concatenate([b[n] for b in share]) for n in share[0]} for share in zip(*parts, strict=True)]


def images(batch):
    return (batch["codes"][:, 0, 0] // 100).tolist()


def views(batch):
    return (batch["codes"][:, 0, 0] // 10 % 10).tolist()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write(tmp_path_factory.mktemp("crops"), views="ten-crop")


def test_an_epoch_has_each_image_once_with_its_codes_and_label(dataset):
    batches = take(train_batches(config(dataset), seed=0), 8)
    for batch in batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            "codes": ((5, 2, 2), np.int32), "label": ((5,), np.int32)
        }  # fmt: skip
        numbers = np.asarray(images(batch))
        np.testing.assert_array_equal(batch["codes"].reshape(5, 4), 100 * numbers[:, None] + np.arange(4))
        np.testing.assert_array_equal(batch["label"], numbers % 3)
    epochs = [images(batches[i]) + images(batches[i + 1]) for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_views_change_from_epoch_to_epoch_and_depend_on_the_seed(crops, assert_same):
    data = config(crops, batch_size=10)
    batches, again, other = (take(train_batches(data, seed=seed), count) for seed, count in ((3, 16), (3, 2), (4, 1)))
    assert_same(batches[:2], again)
    assert not np.array_equal(batches[0]["codes"], other[0]["codes"])
    epochs = [dict(zip(images(batch), views(batch), strict=True)) for batch in batches]
    assert min(len({epoch[i] for epoch in epochs}) for i in range(10)) > 3  # of ten views in 16 epochs
    assert min(len(set(epoch.values())) for epoch in epochs) > 2  # images have views of their own
    assert all(set(views(batch)) == {0} for batch in evaluation_batches(data.model_copy(update={"eval_batch_size": 5})))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_all_processes_make_up_the_batch_of_one(crops, assert_same, processes):
    data = config(crops, batch_size=8, eval_batch_size=8)
    parts = [{"process_index": i, "process_count": processes} for i in range(processes)]
    training = [take(train_batches(data, seed=1, **part), 4) for part in parts]
    validation = [list(evaluation_batches(data, **part)) for part in parts]
    assert_same(join(training), take(train_batches(data, seed=1), 4))
    assert_same(join(validation), list(evaluation_batches(data)))


def test_a_resumed_run_continues_with_the_next_batch_in_any_number_of_processes(crops, assert_same):
    data = config(crops, batch_size=4)
    expected = take(train_batches(data, seed=0), 9)  # beyond the first epoch and the second
    state, resumed = train_batches(data, seed=0).get_state(), []
    for processes in (1, 2, 4):
        parts = []
        for i in range(processes):
            batches = train_batches(data, seed=0, process_index=i, process_count=processes)
            batches.set_state(json.loads(json.dumps(state)))
            parts.append(take(batches, 3))
        state = batches.get_state()
        resumed += join(parts)
    assert_same(resumed, expected)


def test_validation_is_in_order_padded_and_repeatable(dataset):
    batches = evaluation_batches(config(dataset))
    assert (len(batches), batches.count, batches.source.classes) == (3, 10, ("a", "b", "c"))
    for _ in range(2):
        results = list(batches)
        assert [batch["codes"].shape for batch in results] == [(4, 2, 2)] * 3
        assert np.concatenate([batch["mask"] for batch in results]).tolist() == [True] * 10 + [False] * 2
        assert [i for batch in results for i in images(batch)][:10] == list(range(10))
        assert results[2]["label"].tolist() == [2, 0, -1, -1]
    assert sum(int(batch["mask"].sum()) for batch in evaluation_batches(config(dataset), limit=5)) == 5
    assert evaluation_batches(config(dataset, eval_path=None)) is None


def test_the_manifest_describes_the_codes_without_their_shards(tmp_path):
    for file in write(tmp_path, views="flip").glob("codes-*"):
        file.unlink()
    source = training_source(config(tmp_path))
    plan = source.plan
    assert (plan.tokenizer, plan.view_shape, plan.codebook_size) == ("0" * 64, (2, 2), 1100)
    assert (len(source), source.classes, source.num_classes) == (10, ("a", "b", "c"), 3)
    with pytest.raises(DataError):
        train_batches(config(tmp_path), seed=0)


def test_labels_are_compared_with_the_number_of_classes(dataset, tmp_path):
    train_batches(config(dataset), seed=0).source.check_labels(3)
    unnamed = write(tmp_path / "unnamed", labels=(0, 7), classes=None)
    unlabeled = write(tmp_path / "unlabeled", labels=(0, -1), classes=())
    assert training_source(config(unnamed)).num_classes == 8
    for path, count in ((dataset, 2), (unnamed, 7), (unlabeled, 3)):
        with pytest.raises(DataError) as error:
            evaluation_batches(config(path)).source.check_labels(count)
        assert (error.value.field, error.value.value) == ("data.eval_path", str(path))
    assert set(np.concatenate([b["label"] for b in take(train_batches(config(unlabeled), seed=0), 2)])) == {0, -1}


@pytest.mark.parametrize("case", ["missing", "empty", "incomplete", "no rows", "large label", "small label", "damaged"])
def test_unusable_codes_are_refused_before_the_first_batch(tmp_path, case):
    folder = tmp_path / "codes"
    if case == "empty":
        folder.mkdir()
    elif case == "incomplete":
        codes.start_dataset(folder, codes.Plan("0" * 64, "x", 9, "one", (2,), "uint16", 9, 32, "npz", 4))
    elif case == "no rows":
        write(folder, images=0)
    elif case != "missing":
        write(folder, labels={"large label": (0, 3), "small label": (0, -2)}.get(case, (0,)))
    if case == "damaged":
        (folder / "codes-00001-of-00003.npz").write_bytes(b"codes")
    for build in (lambda: train_batches(config(folder), seed=0), lambda: evaluation_batches(config(folder, path=None))):
        with pytest.raises(DataError) as error:
            build()
        fields = {str(folder / "codes-00001-of-00003.npz")} if case == "damaged" else {"data.path", "data.eval_path"}
        assert error.value.field in fields
        assert str(folder) in str(error.value)


def test_configs_that_do_not_fit_are_refused(dataset):
    for changes, field in (({"path": None}, "data.path"), ({"batch_size": 11}, "data.batch_size")):
        with pytest.raises(UserError) as error:
            train_batches(config(dataset, **changes), seed=0)
        assert error.value.field == field


def test_validation_codes_have_the_tokenizer_and_the_classes_of_the_training_codes(dataset, tmp_path, caplog):
    tokenizer = write(tmp_path / "tokenizer", tokenizer="1" * 64)
    classes = write(tmp_path / "classes", classes=("b", "c", "d"))
    for path in (tokenizer, classes):
        with pytest.raises(DataError) as error:
            evaluation_source(config(dataset, eval_path=str(path)))
        assert (error.value.field, error.value.value) == ("data.eval_path", str(path))
    assert len(evaluation_source(config(dataset, eval_path=str(write(tmp_path / "flat", classes=()))))) == 10
    with caplog.at_level(logging.WARNING):
        assert len(evaluation_source(config(tmp_path / "elsewhere", eval_path=str(tokenizer)))) == 10
    assert "elsewhere" in caplog.text


def test_resuming_with_other_codes_is_a_warning(dataset, tmp_path, caplog):
    state = json.loads(json.dumps(train_batches(config(dataset), seed=0).get_state()))
    train_batches(config(dataset), seed=0).set_state(state)
    assert not caplog.records
    train_batches(config(write(tmp_path / "other", tokenizer="1" * 64)), seed=0).set_state(state)
    assert "changed" in caplog.text


def test_fields_of_training_images_are_refused():
    refused = {
        "name": "x", "image_key": "x", "label_key": "x", "train_split": "x", "eval_split": "x", "crop": "adm",
        "resize": 2.0, "scale": (1, 2), "flip": False, "workers": 1,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ConfigError) as error:
            from_dict(Config, {"data": {"source": "codes", name: value}})
        assert (error.value.field, error.value.value) == (f"data.{name}", value)
