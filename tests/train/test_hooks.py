"""Hooks by themselves, without a run."""

import contextlib
import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import checkpoint, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.train import hooks, loop
from vqrae_jax.train.task import TrainState


def event(step, metrics=None, **flags):
    return hooks.StepEvent(step, TrainState(step, {}, {}, {}, {}), metrics or {}, **flags)


def test_timer_averages_scalars_sums_events_and_warns(caplog):
    timer = hooks.StepTimer(batch_size=4, codebook_alarm=0.6)
    for value, counts in ((1.0, [1, 0, 1, 0]), (3.0, [1, 0, 0, 1])):
        timer.after_step(event(1, {"loss": jnp.float32(value), "counts": jnp.array(counts), "revived": jnp.int32(3)}))
    values = timer.flush()
    assert (values["loss"], values["revived"], values["codebook/usage"]) == (2.0, 6, 0.75)
    assert values["images_per_second"] > 0
    assert not caplog.text
    timer.after_step(event(3, {"loss": jnp.float32(5.0), "counts": jnp.array([2, 2, 0, 0])}))
    timer.pause()
    assert timer.flush()["loss"] == 5.0
    assert "ALARM" in caplog.text


def test_timer_measures_steps_and_waiting():
    """Four steps of 10, 20, 30 and 40 ms, half of which is spent waiting for data."""

    def slow_batches():
        for ms in (10, 20, 30, 40):
            time.sleep(ms / 2000)
            yield ms
        yield from (0, 0)

    timer = hooks.StepTimer(batch_size=8)
    timer.after_step(event(1, {"loss": jnp.zeros(())}))  # compiles: not timed
    for step, ms in enumerate(timer.timed(slow_batches())):
        time.sleep(ms / 2000)
        if not ms:
            break
        timer.after_step(event(step, {"loss": jnp.zeros(())}))
    values = timer.flush()
    assert 0.02 <= values["step_seconds/p50"] < values["step_seconds/p90"] <= values["step_seconds/p99"]
    assert values["step_seconds/p99"] >= 0.03
    assert 0.2 < values["data_wait"] < 0.8
    assert values["images_per_second"] <= 8 * 4 / 0.1


def test_slow_data_is_reported_once(caplog):
    logger = hooks.Logger(hooks.StepTimer(1), lambda state: {}, lambda: 0)
    with caplog.at_level(logging.WARNING):
        for wait in (0.04, 0.2, 0.3):
            values = {"data_wait": wait, "data/skipped": 1}
            assert logger.combine(values) == values
    (record,) = caplog.records
    assert "20 %" in record.getMessage()


def test_a_checkpoint_is_due_by_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    clock, never = hooks.SaveClock(2.0), hooks.SaveClock(0.0)
    for seconds, due in ((119, False), (1, True), (60, True)):
        now[0] += seconds
        assert (clock.is_due(), never.is_due()) == (due, False)
    clock.restart()
    assert not clock.is_due()


def test_guard_names_the_first_bad_step_and_its_terms(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    guard = hooks.NaNGuard(checkpoints)

    def step(number, *bad, log=False):
        metrics = {n: jnp.asarray(np.nan if n in bad else 1.0) for n in ("loss/vq", "loss/pixel", "grad_norm")}
        ignored = {"counts": jnp.zeros(4), "codebook/dead": jnp.asarray(np.nan)}
        guard.after_step(event(number, metrics | ignored, log=log))

    step(1)
    step(2, log=True)
    step(3, "loss/vq", "grad_norm")
    with pytest.raises(UserError, match=r"step 3: grad_norm, loss/vq not finite.*No checkpoint is complete"):
        step(4, "loss/vq", "loss/pixel", log=True)
    checkpoints.save(2, {"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, {}, {})
    with pytest.raises(UserError, match=r"step 3: .*checkpoints/2"):
        step(5, log=True)
    checkpoints.close()


@pytest.mark.slow
def test_a_diverging_run_stops_before_it_saves(tiny, tmp_path, one_device):
    """The loss is finite for a step and far too large after it; the config itself would refuse such a rate."""
    optimizer = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    config = tiny(optimizer=optimizer, train={"log_every": 3, "checkpoint_every": 1, "evaluate_every": 100})
    rate = {"learning_rate": 1e37}
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=rate)})
    with pytest.raises(UserError, match=rf"step 2: .*loss/pixel.*{tmp_path}.*/1"):
        loop.train(config, tmp_path, one_device)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [1]


def test_heartbeat_every_ten_seconds_and_at_the_end(tmp_path):
    heartbeat = hooks.Heartbeat(tmp_path)
    for step in (1, 2, 3):
        heartbeat.before_step(step)
        heartbeat.after_step(event(step))
    file = tmp_path / "heartbeat" / "0.json"
    content = json.loads(file.read_text())
    duration = {"first_step_seconds": hooks.Heartbeat(tmp_path).first_step_seconds}
    assert content | {"time": 0} == {"step": 1, "time": 0, "process": 0, "processes": 1} | duration
    assert time.time() - content["time"] < 60
    heartbeat.close()
    assert json.loads(file.read_text())["step"] == 3
    assert list(file.parent.iterdir()) == [file]


def test_step_log_announces_the_compilation_and_logs_a_step_at_least_every_half_minute(tmp_path, monkeypatch, caplog):
    """1,000 steps: the first takes 40 s, the others 7 s; metrics every tenth step. The next start knows the 40 s."""
    now, metrics = [100.0], {"loss/total": 2.0, "loss/pixel": 1.0, "loss/vq": 1.0}
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    heartbeat = hooks.Heartbeat(tmp_path)
    steps_log = hooks.StepLog(1000, heartbeat.first_step_seconds)
    with caplog.at_level(logging.INFO):
        for step in range(1, 21):
            for hook in (heartbeat, steps_log):
                hook.before_step(step)
            now[0] += 40 if step == 1 else 7
            for hook in (heartbeat, steps_log):
                hook.after_step(event(step, {"loss/total": jnp.float32(2)}, log=step % 10 == 0))
            if step % 10 == 0:
                steps_log.show(step, metrics | {"images_per_second": 12.34})
        hooks.StepLog(1000, hooks.Heartbeat(tmp_path).first_step_seconds).before_step(21)
    lines = [record.getMessage() for record in caplog.records]
    assert "minutes" in lines[0]
    assert lines[1] == "step 1 of 1,000: total 2.0000, 40 s with compilation"
    assert [line.split()[1] for line in lines[1:-1]] == ["1", "6", "10", "15", "20"]
    assert "ETA 1:55:58" in lines[2]
    assert "12.3 images/s" in lines[-2]
    assert "about 40 s" in lines[-1]


def test_watchdog_prints_every_stack_when_a_step_hangs(tmp_path):
    with (tmp_path / "stacks").open("w") as file:
        watchdog = hooks.Watchdog(0.1, file)
        sleep_in_a_step()
        watchdog.close()
    stacks = (tmp_path / "stacks").read_text()
    assert "Timeout" in stacks
    assert "sleep_in_a_step" in stacks


def sleep_in_a_step():
    time.sleep(0.3)


@pytest.mark.parametrize("seconds", [0.5, 0])
def test_watchdog_is_silent_while_steps_end_or_if_it_is_off(tmp_path, seconds):
    with (tmp_path / "stacks").open("w") as file:
        watchdog = hooks.Watchdog(seconds, file)
        for step in range(3):
            watchdog.after_step(event(step))
            time.sleep(0.2)
        watchdog.close()
    assert (tmp_path / "stacks").read_text() == ""


@pytest.mark.parametrize(
    ("steps", "start", "traced"),
    [(range(0), 0, []), (range(3, 5), 0, [3, 4]), (range(1, 3), 0, [1, 2]), (range(6, 9), 0, [6, 6]),
     (range(3, 6), 3, [4, 5])],
)  # fmt: skip
def test_profiler_traces_the_requested_steps(tmp_path, monkeypatch, steps, start, traced):
    """The trace starts right before the first step, so an evaluation after the step before is not part of it."""
    calls, step = [], start
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(step))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(step))
    with contextlib.closing(hooks.Profiler(steps, tmp_path)) as profiler:
        for step in range(start + 1, 7):
            profiler.before_step(step)
            profiler.after_step(event(step))
    assert calls == traced


def test_memory_is_that_of_one_device(caplog):
    mesh = sharding.make_mesh(4, 2)
    placements = {"a": sharding.over_data(mesh), "b": sharding.replicated(mesh)}
    tree = jax.device_put({"a": np.zeros((8, 6), np.float32), "b": np.float32(1)}, placements)
    assert sharding.device_bytes(tree) == 8 * 6 * 4 // 4 + 4
    with caplog.at_level(logging.INFO):
        loop.log_memory(TrainState(0, tree, {}, {}, {}), {})
    assert "params 52 bytes" in caplog.text
    assert "total 52 bytes" in caplog.text
