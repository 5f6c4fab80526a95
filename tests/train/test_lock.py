"""The lock of a workdir: one run has it, and the lock of a run that has ended is no obstacle."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vqrae_jax import storage
from vqrae_jax.errors import CheckpointError
from vqrae_jax.train import lock
from vqrae_jax.train.run import open_run


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)


def read(workdir):
    return json.loads((workdir / lock.FILE).read_bytes())


def edit(workdir, **changes):
    storage.write_bytes(workdir / lock.FILE, json.dumps(read(workdir) | changes).encode())


def test_one_run_has_the_lock(workdir):
    with lock.lock_workdir(workdir):
        first = read(workdir)
        with pytest.raises(CheckpointError) as error, lock.lock_workdir(workdir):
            pass
        assert error.value.field == "--workdir"
        for value in (f"process {os.getpid()}", first["host"], first["since"]):
            assert value in str(error.value)
        deadline = time.monotonic() + 20
        while read(workdir)["count"] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read(workdir)["count"] >= 2
    with lock.lock_workdir(workdir):
        assert read(workdir)["run"] != first["run"]
    assert not storage.file_versions(workdir)


def test_of_runs_that_start_at_once_one_gets_the_lock(workdir):
    def attempt(_):
        try:
            with lock.lock_workdir(workdir):
                barrier.wait()
                return True
        except CheckpointError:
            barrier.wait()
            return False

    for stale in (False, True):
        if stale:
            storage.write_bytes(workdir / lock.FILE, json.dumps(ended_run()).encode())
        barrier = threading.Barrier(4, timeout=60)
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(attempt, range(4))) == 1


def ended_run():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return lock._machine() | {"pid": child.pid, "started": "1", "run": "other", "count": 0}


def test_a_killed_run_has_ended_at_once(workdir, monkeypatch, caplog):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1e6)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = lock._machine() | {"pid": child.pid, "started": lock._start_time(child.pid), "run": "other"}
    storage.write_bytes(workdir / lock.FILE, json.dumps(holder).encode())
    with pytest.raises(CheckpointError, match=str(child.pid)), lock.lock_workdir(workdir):
        pass
    edit(workdir, started="1")  # an earlier process of the same number
    with lock.lock_workdir(workdir):
        assert f"process {child.pid} " in caplog.text
    storage.write_bytes(workdir / lock.FILE, json.dumps(holder).encode())
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as under launchers that wait for no one
    with lock.lock_workdir(workdir):
        pass
    child.wait()


@pytest.mark.parametrize("content", [{"host": "elsewhere"}, {"boot": "earlier"}, {"namespace": "container"}, "cut"])
def test_the_lock_of_another_machine_is_watched(content, tmp_path, caplog):
    text = "{" if content == "cut" else json.dumps(ended_run() | content)
    (tmp_path / lock.FILE).write_text(text)
    with caplog.at_level(logging.INFO), lock.lock_workdir(tmp_path):
        assert "watching" in caplog.text
    (tmp_path / lock.FILE).write_text(json.dumps(ended_run() | {"host": "elsewhere"}))
    timer = threading.Timer(0.2, edit, (tmp_path,), {"count": 1, "since": "1970-01-01"})  # a clock that goes back
    timer.start()
    with pytest.raises(CheckpointError, match="elsewhere"), lock.lock_workdir(tmp_path):
        pass
    timer.join()


def test_a_run_notices_that_its_lock_was_taken(tmp_path, caplog):
    with lock.lock_workdir(tmp_path):
        deadline = time.monotonic() + 20
        while "another run" not in caplog.text and time.monotonic() < deadline:
            edit(tmp_path, run="other")
            time.sleep(0.02)
        assert "another run" in caplog.text
    assert read(tmp_path)["run"] == "other"


def test_training_is_refused_and_evaluation_is_not(trained, tiny, one_device):
    with lock.lock_workdir(trained):
        with pytest.raises(CheckpointError) as error, open_run(tiny(), trained, one_device):
            pass
        assert error.value.field == "--workdir"
        with open_run(tiny(), trained, one_device, evaluate_step=3) as (run, _):
            assert run.checkpoints.steps == [2, 3]
    assert not (trained / lock.FILE).exists()
    with contextlib.suppress(KeyError), open_run(tiny(), trained, one_device):
        assert (trained / lock.FILE).exists()
        raise KeyError
    assert not (trained / lock.FILE).exists()
