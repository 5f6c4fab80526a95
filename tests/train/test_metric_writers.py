"""The log of a run: JSON lines, TensorBoard, Weights & Biases."""

import errno
import importlib.util
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
from vqrae_jax.data.tfds_source import Part, TFRecords
from vqrae_jax.errors import ConfigError, UserError
from vqrae_jax.evaluation.report import METRICS_FILE
from vqrae_jax.train.metric_writers import MetricWriters, check_wandb


@pytest.fixture
def wandb_runs(monkeypatch):
    """Lists the arguments of every wandb.init; the package need not be installed."""
    runs = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: runs.append(kwargs) or run))
    return runs


@pytest.mark.parametrize("location", ["local", "bucket"])
def test_a_wandb_run_belongs_to_a_workdir(wandb_runs, tmp_path, location, request):
    """Also if several workdirs have the same name."""
    if location == "bucket":
        request.getfixturevalue("buckets")
    root = tmp_path if location == "local" else f"gs://bucket/{tmp_path.name}"
    for workdir in (f"{root}/a/run1", f"{root}/b/run1", f"{root}/a/run1"):
        MetricWriters(storage.resolve_path(workdir), {}, "project").close()
    first, other, resumed = wandb_runs
    assert first["id"] == resumed["id"] != other["id"]
    assert {run["name"] for run in wandb_runs} == {"run1"}
    assert {run["resume"] for run in wandb_runs} == {"allow"}


def test_wandb_without_a_key_is_one_sentence(monkeypatch, tmp_path):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)\nand more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"api_key.*WANDB_API_KEY") as error:
        MetricWriters(tmp_path, {}, "project")
    assert error.value.field == "train.wandb_project"


def test_an_incomplete_line_does_not_damage_the_next_one(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "a": 1.0}\n{"step": 2, "ti')
    for step in (2, 3):
        writers = MetricWriters(tmp_path, {}, None)
        writers.scalars(step, {"a": float(step)})
        writers.close()
    assert plot.read_metrics(tmp_path)["a"] == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 4


def test_tensorboard_receives_the_step_that_a_run_resumes_after(tmp_path):
    writers = MetricWriters(tmp_path, {}, None)
    writers.mark_resumed(40)
    writers.scalars(41, {"a": 1.0})
    writers.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = TFRecords([Part(str(file), 0, 3)])
    _, start, logged = (event_pb2.Event.FromString(records[i]) for i in range(3))
    assert (start.step, start.session_log.status) == (41, event_pb2.SessionLog.START)
    assert (logged.step, logged.summary.value[0].tag) == (41, "a")


def test_a_disk_that_is_full_for_a_moment_does_not_block_the_run(tmp_path, monkeypatch, caplog):
    """tensorboardX's own thread would end then, and the run would wait for its queue forever."""
    write, full = record_writer.RecordWriter.write, [False]

    def write_if_there_is_space(self, data):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write_if_there_is_space)

    def run():
        writers = MetricWriters(tmp_path, {}, None)
        for step in range(60):
            full[0] = 10 <= step < 20
            writers.scalars(step, {"a": 1.0, "b": 2.0})
        writers.image(60, "image", np.zeros((8, 8, 3), np.uint8))
        writers.close()

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(20)
    assert not running.is_alive()
    assert caplog.text.count("No space left on device") == 1
    assert plot.read_metrics(tmp_path)["a"][0] == list(range(60))
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = TFRecords([Part(str(file), 0, 21)])
    assert [event_pb2.Event.FromString(records[i]).step for i in range(1, 21, 2)] == list(range(10))


def test_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        check_wandb("project")
    assert error.value.field == "train.wandb_project"
    check_wandb(None)
