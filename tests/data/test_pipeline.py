"""Batches depend on the seed and their number only, and damaged files do not stop a run."""

import json
import logging
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from vqrae_jax.config import DataConfig
from vqrae_jax.data.images import adm_center_crop
from vqrae_jax.data.pipeline import evaluation_batches, train_batches
from vqrae_jax.data.readable import Skipped
from vqrae_jax.data.source import Source
from vqrae_jax.errors import ConfigError, DataError, UserError


@pytest.fixture
def grays(tmp_path):
    """Ten images, number i of gray level 20 * i."""
    for i in range(10):
        Image.new("RGB", (9, 8), (20 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


def folder(images, **changes):
    settings = {"image_size": 8, "batch_size": 4, "eval_batch_size": 4, "threads": 2} | changes
    return DataConfig(**({"source": "folder", "path": str(images), "eval_path": str(images)} | settings))


def photographs(**changes):
    settings = {"image_size": 16, "batch_size": 8, "scale": (2, 8), "threads": 2} | changes
    return DataConfig(source="photographs", **settings)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def levels(batch):
    return (batch["image"][:, 0, 0, 0] // 20).tolist()


def unmasked_levels(batches):
    return [level for batch in batches for level, mask in zip(levels(batch), batch["mask"], strict=True) if mask]


def equal(first, second):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


def test_importing_data_does_not_import_heavy_packages():
    heavy = ["grain", "tensorflow_datasets", "skimage", "sklearn", "jax", "tensorflow"]
    code = (
        "import sys, vqrae_jax.data.pipeline, vqrae_jax.data.photographs, vqrae_jax.data.tfds_source;"
        f"assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_epochs_have_each_image_once_in_different_orders(grays):
    batches = [levels(batch) for batch in take(train_batches(folder(grays, batch_size=5), seed=1), 8)]
    epochs = [batches[i] + batches[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_of_images_and_labels_depend_on_the_seed():
    first, again, other = (take(train_batches(photographs(), seed=seed), 3) for seed in (5, 5, 6))
    kinds = {key: (values.shape, values.dtype) for key, values in first[0].items()}
    assert kinds == {"image": ((8, 16, 16, 3), np.uint8), "label": ((8,), np.int32)}
    assert equal(first, again)
    assert not equal(first, other)
    take(train_batches(photographs(), seed=2**40), 1)  # larger than 32 bits


def test_crops_and_flips_differ_from_epoch_to_epoch(grays):
    slope = np.arange(64, dtype=np.uint8)[None, :, None].repeat(32, axis=0).repeat(3, axis=2)
    for file in grays.iterdir():
        file.unlink()
    Image.fromarray(slope).save(grays / "slope.png")
    batches = train_batches(folder(grays, batch_size=1, image_size=32), seed=0)
    images = [batch["image"][0] for batch in take(batches, 24)]
    assert len({image.tobytes() for image in images}) > 12
    mirrored = sum(int(image[0, 0, 0]) > int(image[0, -1, 0]) for image in images)
    assert 4 < mirrored < 20


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (4, 0), (1, 1)])
def test_the_parts_of_all_processes_make_up_the_batch_of_one(processes, workers):
    whole = take(train_batches(photographs(), seed=3), 4)
    parts = []
    for i in range(processes):
        data = photographs(threads=3, workers=workers)
        batches = train_batches(data, seed=3, process_index=i, process_count=processes)
        parts.append(take(batches, 4))
        batches.close()
    for k, batch in enumerate(whole):
        for key in ("image", "label"):
            assert np.array_equal(np.concatenate([part[k][key] for part in parts]), batch[key])


@pytest.mark.slow
def test_an_interrupt_stops_no_worker(grays):
    """A terminal sends Ctrl-C to all processes; the run needs batches until it has saved."""
    batches, expected = train_batches(folder(grays, workers=1), seed=0), train_batches(folder(grays), seed=0)
    take(batches, 1)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert equal(take(batches, 30), take(expected, 31)[1:])
    assert worker.is_alive()
    batches.close()


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_the_next_batch_the_same(grays):
    batches = train_batches(folder(grays, workers=1), seed=0)
    take(batches, 1)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(DataError) as error:
        take(batches, 100)
    assert error.value.field == "data.workers"
    state = batches.get_state()
    batches.close()
    expected = train_batches(folder(grays), seed=0)
    take(expected, state["images"] // 4)
    assert equal(take(batches, 2), take(expected, 2))  # with a new worker
    batches.close()


def test_runs_resume_exactly_with_other_numbers_of_processes_and_workers(grays):
    """4 -> 2 -> 1 -> 4 processes, beyond the end of an epoch."""
    data = folder(grays, crop="random", image_size=6)
    expected = take(train_batches(data, seed=0), 12)
    state, resumed = train_batches(data, seed=0).get_state(), []
    for processes, workers in ((4, 0), (2, 0), (1, 2), (4, 0)):
        parts, states = [], []
        for i in range(processes):
            changed = data.model_copy(update={"workers": workers})
            batches = train_batches(changed, seed=0, process_index=i, process_count=processes)
            batches.set_state(json.loads(json.dumps(state)))
            parts.append(take(batches, 3))
            states.append(batches.get_state())
            batches.close()
        assert all(other == states[0] for other in states)
        state = states[0]
        resumed += [{key: np.concatenate([part[k][key] for part in parts]) for key in parts[0][k]} for k in range(3)]
    assert equal(resumed, expected)
    assert state["images"] == 48
    larger = train_batches(data.model_copy(update={"batch_size": 8}), seed=0)
    larger.set_state({"images": 4})
    assert np.array_equal(next(larger)["image"], np.concatenate([batch["image"] for batch in expected[1:3]]))


def test_set_state_rewinds_and_refuses_other_states(grays):
    batches = train_batches(folder(grays), seed=0)
    first = take(batches, 3)
    batches.set_state({"images": 0})
    assert equal(take(batches, 3), first)
    for state in ({"next_index": 3}, {"images": -1}, {"images": "3"}, None):
        with pytest.raises(DataError):
            batches.set_state(state)


def damage(path):
    (path / "3.png").write_bytes(b"")
    (path / "4.png").write_bytes(b"not an image")
    (path / "9.png").write_bytes((path / "8.png").read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_files_are_replaced_by_the_next_readable_one(grays, caplog, workers):
    damage(grays)
    skipped = Skipped()
    with caplog.at_level(logging.WARNING):
        iterator = train_batches(folder(grays, batch_size=10, workers=workers), seed=0, skipped=skipped)
        batches = take(iterator, 3)
        iterator.close()
    for batch in batches:
        assert sorted(levels(batch)) == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]
    assert skipped.count == 3
    assert sorted(name.rsplit("/", 1)[1] for name in skipped.names) == ["3.png'", "4.png'", "9.png'"]
    assert all(name in caplog.text for name in ("3.png", "4.png", "9.png"))
    assert len(caplog.records) == 3  # not in each epoch
    assert equal(batches, take(train_batches(folder(grays, batch_size=10, threads=5), seed=0), 3))


def test_a_few_damaged_files_are_named_and_all_are_counted(grays, caplog):
    for i in range(9):
        (grays / f"{i}.png").write_bytes(b"")
    skipped = Skipped()
    assert levels(next(train_batches(folder(grays), seed=0, skipped=skipped))) == [9] * 4
    take(train_batches(folder(grays), seed=0, skipped=skipped), 3)
    assert (skipped.count, len(skipped.names), len(caplog.records)) == (9, 5, 6)


def test_only_damaged_files_are_an_error(grays):
    for file in grays.iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="10 images") as error:
        next(train_batches(folder(grays), seed=0))
    assert error.value.field == "data.path"


def test_all_formats_fit_in_a_batch(grays):
    for file in grays.iterdir():
        file.unlink()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(grays / "rotated ü.jpg", exif=exif)
    rgb.convert("CMYK").save(grays / "cmyk.jpeg")
    rgb.convert("L").save(grays / "gray.webp")
    rgb.convert("RGBA").save(grays / "alpha 猫.png")
    rgb.quantize(8).save(grays / "palette.PNG")
    rgb.save(grays / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    Image.fromarray(np.full((30, 50), 40_000, np.uint16)).save(grays / "16 bit.png")
    Image.new("RGB", (2000, 3)).save(grays / "long.bmp")
    (grays / "empty.png").touch()
    skipped = Skipped()
    batch = next(train_batches(folder(grays, batch_size=9, image_size=24), seed=0, skipped=skipped))
    assert batch["image"].shape == (9, 24, 24, 3)
    assert skipped.count == 1
    assert sum(evaluation["mask"].sum() for evaluation in evaluation_batches(folder(grays, image_size=24))) == 8


def test_evaluation_batches_are_in_order_padded_and_repeatable(grays):
    batches = evaluation_batches(folder(grays))
    assert (len(batches), batches.count) == (3, 10)
    assert evaluation_batches(folder(grays, eval_path=None)) is None
    for _ in range(2):
        results = list(batches)
        assert [batch["image"].shape for batch in results] == [(4, 8, 8, 3)] * 3
        assert unmasked_levels(results) == list(range(10))
        assert np.concatenate([batch["mask"] for batch in results]).tolist() == [True] * 10 + [False] * 2
        assert (results[0]["mask"].dtype, results[0]["label"].dtype) == (bool, np.int32)


def test_evaluation_masks_damaged_files(grays):
    damage(grays)
    batches = evaluation_batches(folder(grays))
    for _ in range(2):
        assert unmasked_levels(batches) == [0, 1, 2, 5, 6, 7, 8]
        assert batches.skipped.count == 3


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (4, 4), (5, 5), (99, 10), (None, 10)])
def test_processes_evaluate_each_image_once_in_the_same_number_of_batches(grays, limit, expected):
    parts = [list(evaluation_batches(folder(grays), process_index=i, process_count=2, limit=limit)) for i in range(2)]
    assert len(parts[0]) == len(parts[1]) == -(-expected // 4)
    assert sorted(unmasked_levels(parts[0]) + unmasked_levels(parts[1])) == list(range(expected))


def test_listings_depend_on_names_and_numbers_of_images(grays):
    def listings():
        return [b.listing() for b in (train_batches(folder(grays), seed=0), evaluation_batches(folder(grays), limit=9))]

    before = listings()
    assert [listing["images"] for listing in before] == [10, 9]
    assert listings() == before
    (grays / "3.png").rename(grays / "33.png")
    assert not any(a == b for a, b in zip(listings(), before, strict=True))
    assert [listing["images"] for listing in listings()] == [10, 9]


def test_resuming_with_other_images_is_a_warning(grays, caplog):
    state = json.loads(json.dumps(train_batches(folder(grays), seed=0).get_state()))

    def warnings(state):
        caplog.clear()
        train_batches(folder(grays), seed=1).set_state(state)
        return [record.getMessage() for record in caplog.records]

    assert not warnings(state)
    assert not warnings({"images": 4})  # of a version without listings
    (grays / "3.png").rename(grays / "33.png")
    assert "saved with 10, and there are 10 of other names" in warnings(state)[0]
    shutil.copy(grays / "4.png", grays / "44.png")
    assert "saved with 10, and there are 11;" in warnings(state)[0]


def test_sampled_listings_notice_moved_records():
    class Numbers(Source):
        def __init__(self, keys):
            self.key = lambda index: str(keys[index])

    numbers = list(range(1000))
    sampled = Numbers(numbers).listing(1000, 10)
    assert sampled == Numbers(numbers).listing(1000, 10)
    assert sampled != Numbers([-1, *numbers[:-1]]).listing(1000, 10)  # one added at the start, one removed at the end
    assert Numbers(numbers).listing(1000, 1000) == Numbers(numbers).listing(1000)


def test_unusable_configs_are_refused(grays):
    for changes in ({"batch_size": 11}, {"path": None}, {"path": "/none"}, {"resize": 1.2, "scale": (1, 2)}):
        with pytest.raises(UserError) as error:
            train_batches(folder(grays, **changes), seed=0)
        assert error.value.field == f"data.{next(iter(changes))}"


def test_batch_sizes_must_be_multiples_of_the_number_of_processes(grays):
    data = folder(grays)
    for build, field in ((lambda: train_batches(data, seed=0, process_count=3), "data.batch_size"),
                         (lambda: evaluation_batches(data, process_count=3), "data.eval_batch_size")):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            build()
        assert (error.value.field, error.value.value) == (field, 4)


def test_adm_crops(grays):
    rows = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for file in grays.iterdir():
        Image.fromarray(rows).save(file)
    (batch,) = evaluation_batches(folder(grays, eval_crop="adm", eval_batch_size=10))
    assert np.array_equal(batch["image"][3], adm_center_crop(rows, 8))
    first, second = (next(train_batches(folder(grays, crop="adm", batch_size=10), seed=0)) for _ in range(2))
    assert equal([first], [second])
    assert len({image.tobytes() for image in first["image"]}) > 5


def test_close_ends_threads(grays):
    before = set(threading.enumerate())
    batches = train_batches(folder(grays), seed=0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (400, 500, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    batches = train_batches(folder(tmp_path, image_size=256, batch_size=16, threads=4), seed=0)
    resident = []
    for _ in range(4):
        for _ in range(20):
            next(batches)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize() / 2**20)
    batches.close()
    assert max(resident[1:]) - resident[0] < 16  # MiB; an epoch decodes 190
