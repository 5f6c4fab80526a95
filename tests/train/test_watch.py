import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import sharding
from vqrae_jax.train import watch


def add(a, b):
    return jax.tree.map(lambda x, y: x + y, a, b)


def test_windows_average_scalars_add_events_and_warn(caplog):
    window = watch.Window(batch_size=4, codebook_alarm=0.6)
    for value, counts in ((1.0, [1, 0, 1, 0]), (3.0, [1, 0, 0, 1])):
        window.add({"loss": jnp.float32(value), "counts": jnp.array(counts), "revived": jnp.int32(3)}, add)
    flushed = window.flush()
    assert flushed["loss"] == 2.0
    assert flushed["revived"] == 6
    assert flushed["codebook/usage"] == 0.75
    assert flushed["images_per_second"] > 0
    assert not caplog.text
    window.add({"loss": jnp.float32(5.0), "counts": jnp.array([2, 2, 0, 0])}, add)
    window.pause()
    assert window.flush()["loss"] == 5.0
    assert "ALARM: 2 of 4 codes are in use, fewer than 60.0%" in caplog.text


def test_windows_time_steps_and_waiting():
    """Four steps of 10, 20, 30 and 40 ms, of which half is spent in waiting for data."""
    window = watch.Window(batch_size=8)
    window.add({"loss": jnp.zeros(())}, add)  # compiles: not timed
    for ms in (10, 20, 30, 40):
        window.fetch(lambda ms=ms: time.sleep(ms / 2000))
        time.sleep(ms / 2000)
        window.add({"loss": jnp.zeros(())}, add)
    values = window.flush()
    assert 0.02 <= values["step_seconds/p50"] < values["step_seconds/p90"] <= values["step_seconds/p99"]
    assert values["step_seconds/p99"] >= 0.03
    assert 0.2 < values["data_wait"] < 0.8
    assert values["images_per_second"] <= 8 * 4 / 0.1
    for _ in range(2):
        window.add({"loss": jnp.zeros(())}, add)
        window.fetch(lambda: None)
    assert window.flush()["data_wait"] < 0.5


def test_slow_data_is_told_once(caplog):
    health = watch.Health()
    with caplog.at_level(logging.WARNING):
        for wait in (0.04, 0.2, 0.3):
            values = {"data_wait": wait, "data/skipped": 1}
            assert health.share(values) == values
    (record,) = caplog.records
    assert "wait for data 20 % of the time" in record.getMessage()


def test_the_heart_beats_every_ten_seconds(tmp_path):
    heart = watch.Heartbeat(tmp_path)
    for step in (1, 2, 3):
        heart.beat(step)
    file = tmp_path / "heartbeat" / "0.json"
    sign = json.loads(file.read_text())
    assert sign | {"time": 0} == {"step": 1, "time": 0, "process": 0, "processes": 1}
    assert time.time() - sign["time"] < 60
    heart.beat(4, force=True)
    assert json.loads(file.read_text())["step"] == 4
    assert list(file.parent.iterdir()) == [file]


def test_a_hang_shows_every_stack(tmp_path):
    with (tmp_path / "stacks").open("w") as file:
        watchdog = watch.Watchdog(0.1, file)
        watchdog.step()
        wait_for_nothing()
        watchdog.close()
    said = (tmp_path / "stacks").read_text()
    assert "Timeout" in said
    assert "wait_for_nothing" in said


def wait_for_nothing():
    time.sleep(0.3)


def test_a_watchdog_that_is_fed_or_off_is_silent(tmp_path):
    with (tmp_path / "stacks").open("w") as file:
        for seconds in (0.5, 0):
            watchdog = watch.Watchdog(seconds, file)
            for _ in range(3):
                watchdog.step()
                time.sleep(0.2)
            watchdog.close()
    assert (tmp_path / "stacks").read_text() == ""


def test_a_profile_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    for steps in (range(0), range(3, 5)):
        with watch.watching(tmp_path, tmp_path, 0, steps) as (_, _, profile):
            for step in range(1, 7):
                profile.before(step)
                profile.after(step, {})
    assert calls == [("start", 3), ("stop", 4)]
    with watch.watching(tmp_path, tmp_path, 0, range(6, 9)) as (_, _, profile):
        profile.before(step)  # the run ends before the range does
    assert calls[2:] == [("start", 6), ("stop", 6)]


def test_memory_is_that_of_one_device(caplog):
    mesh = sharding.make_mesh(4, 2)
    tree = {"a": jax.device_put(np.zeros((8, 6), np.float32), sharding.over_data(mesh)), "b": np.float32(1)}
    tree["b"] = jax.device_put(tree["b"], sharding.replicated(mesh))
    assert sharding.device_bytes(tree) == 8 * 6 * 4 // 4 + 4
    with caplog.at_level(logging.INFO):
        watch.tell_memory({"params": tree, "frozen": {}})
    assert "memory per device: params 52 B, frozen 0 B; together 52 B" in caplog.text
