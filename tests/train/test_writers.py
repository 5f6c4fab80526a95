"""What a run writes beside its checkpoints, and which run it is elsewhere."""

import errno
import os
import sys
import threading
import types

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from vqrae_jax import storage
from vqrae_jax.commands import plot
from vqrae_jax.data.tfrecord import Part, TFRecords
from vqrae_jax.errors import ConfigError
from vqrae_jax.train.writers import METRICS_FILE, WANDB_FILE, Writers


@pytest.fixture
def started(monkeypatch):
    """What Weights & Biases is told of each run that starts; the package need not be there."""
    runs = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: runs.append(given) or run))
    return runs


def write(target):
    """A run in `target`, here or in a bucket, as the loop starts and ends it."""
    logs = storage.Mirror(storage.resolve_path(target))
    logs.folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, WANDB_FILE):
        logs.restore(name)
    Writers(logs.folder, storage.resolve_path(target).name, {}, "project").close()
    logs.close()


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_a_run_elsewhere_is_its_workdir_whatever_that_is_called(started, tmp_path, where, request):
    if where == "bucket":
        request.getfixturevalue("buckets")
    place = tmp_path if where == "here" else f"gs://bucket/{tmp_path.name}"
    for target in (f"{place}/a/run1", f"{place}/b/run1", f"{place}/a/run1"):
        write(target)
    first, other, resumed = started
    assert first["id"] == resumed["id"] != other["id"]
    assert {given["name"] for given in started} == {"run1"}
    assert {given["resume"] for given in started} == {"allow"}


def test_a_line_that_was_cut_short_does_not_take_the_next_one_with_it(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "a": 1.0}\n{"step": 2, "ti')
    for step in (2, 3):
        writers = Writers(tmp_path, "run", {}, None)
        writers.scalars(step, {"a": float(step)})
        writers.close()
    assert plot.read_metrics(tmp_path)["a"] == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 4


def test_tensorboard_is_told_from_which_step_a_run_goes_on(tmp_path):
    writers = Writers(tmp_path, "run", {}, None)
    writers.resumed(40)
    writers.scalars(41, {"a": 1.0})
    writers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = TFRecords([Part(str(file), 0, 3)])
    _, start, logged = (event_pb2.Event.FromString(records[i]) for i in range(3))
    assert (start.step, start.session_log.status) == (41, event_pb2.SessionLog.START)
    assert (logged.step, logged.summary.value[0].tag) == (41, "a")


def test_a_disk_that_is_full_for_a_moment_does_not_hold_up_the_run(tmp_path, monkeypatch, caplog):
    """tensorboardX's thread would be gone then, and the run wait at its queue for ever."""
    write, full = record_writer.RecordWriter.write, [False]

    def write_if_there_is_space(self, data):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write_if_there_is_space)

    def run():
        writers = Writers(tmp_path, "run", {}, None)
        for step in range(60):
            full[0] = 10 <= step < 20
            writers.scalars(step, {"a": 1.0, "b": 2.0})
        writers.picture(60, "picture", np.zeros((8, 8, 3), np.uint8))
        writers.close()

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(20)
    assert not running.is_alive()
    assert caplog.text.count("No space left on device; TensorBoard gets no more of this run until it is resumed") == 1
    assert plot.read_metrics(tmp_path)["a"][0] == list(range(60))
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = TFRecords([Part(str(file), 0, 21)])
    assert [event_pb2.Event.FromString(records[i]).step for i in range(1, 21, 2)] == list(range(10))


def test_without_the_package_the_field_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train\.wandb_project='project' needs Weights & Biases: pip install"):
        Writers(tmp_path, "run", {}, "project")
