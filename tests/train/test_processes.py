"""Runs of several real processes: the same losses, checkpoints for any number of processes, one error message."""

import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from vqrae_jax import checkpoint, distributed, peers, storage
from vqrae_jax.data import images, pipeline
from vqrae_jax.data.codes import Codes
from vqrae_jax.errors import ConfigError, DistributedError
from vqrae_jax.evaluation.report import EVALUATION_FILE
from vqrae_jax.train import loop
from vqrae_jax.train.run import open_run

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = {"steps": 4, "log_every": 1, "evaluate_every": 4, "checkpoint_every": 2}
CONFIG = """
import json, ml_collections, pathlib

def get_config():
    return ml_collections.ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


def spawn(config, workdir, processes=2, devices=2, arguments=(), configs=None, program=None, address=None):
    """Starts the command once per process, each with `devices` simulated devices.

    Args:
      configs: another config for some processes, by number.
      program: a Python script to run instead; it ends with the command.
      address: a bucket for the run, in place of the folder that holds the configs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    children = []
    for i in range(processes):
        file = pathlib.Path(workdir) / f"config{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CONFIG)
        file.with_suffix(".json").write_text(json.dumps((configs or {}).get(i, config).model_dump(mode="json")))
        entry = ["-c", program] if program else ["-m", "vqrae_jax.main"]
        command = [sys.executable, *entry, f"--config={file}", f"--workdir={address or workdir}", *arguments]
        command += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(command, text=True, cwd=ROOT, env=env, **pipes))
        children[-1].restart = functools.partial(subprocess.Popen, command, text=True, cwd=ROOT, env=env, **pipes)
    return children


def finish(children, timeout=200, attempts=2):
    """Waits for all processes, and returns [(exit code, stdout, stderr)].

    XLA for CPU starts independent collectives of one program in any order, so two processes can wait for each other in
    different ones, rarely and only on CPUs; on a busy machine, they may not find each other within its 30 s. Processes
    that do not end or do not connect are started once more.
    """
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    except subprocess.TimeoutExpired:
        if attempts == 1:
            raise
    else:
        if attempts == 1 or not any("Gloo context initialization failed" in stderr for _, stderr in outputs):
            return [(child.returncode, *text) for child, text in zip(children, outputs, strict=True)]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.communicate()
    return finish([child.restart() for child in children], timeout, attempts - 1)


def losses(workdir):
    """Returns {step: loss}; of a step that ran twice, the last loss."""
    lines = [json.loads(line) for line in (storage.resolve_path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(train=TRAIN)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    loop.train(config, workdir, jax.devices()[:1])
    return workdir


def assert_same_losses(ours, theirs):
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def finish_without_errors(children):
    results = finish(children)
    assert not any(code for code, *_ in results), results
    return results


def test_two_processes_equal_one(config, alone, tmp_path, one_device):
    """Training, evaluation, resuming; and errors of one process that reach both, as starting them takes long."""
    for i in range(9):
        images.write_image(tmp_path / "images" / f"{i}.png", np.full((32, 32, 3), i, np.uint8))
    program = (ROOT / "tests" / "train" / "scenarios.py").read_text()
    first, second = finish_without_errors(spawn(config, tmp_path, devices=1, program=program))
    assert_same_losses(tmp_path, alone)
    assert checkpoint.completed_steps(tmp_path / "checkpoints") == [2, 4]  # by the clock of process 0
    assert "validation PSNR" in first[1]
    assert "memory per device: params" in first[2]
    assert "2 processes: median step" in first[2]
    assert "validation PSNR" not in second[1]
    assert second[2] == ""
    evaluated = loop.evaluate(config, tmp_path, one_device)
    for i in range(2):
        heartbeat = json.loads((tmp_path / "heartbeat" / f"{i}.json").read_text())
        assert (heartbeat["step"], heartbeat["process"], heartbeat["processes"]) == (4, i, 2)
        results = json.loads((tmp_path / "results" / f"{i}.json").read_text())
        assert "eval/psnr" in results["metrics"]
        assert results["metrics"] == pytest.approx({n: evaluated[n] for n in results["metrics"]}, rel=1e-4)
        assert results["due"] == [False, True]
        assert results["missing file"] == "process 1: the network's file is gone"
        assert "data.eval_path.images: process 0 has 9, process 1 has 8" in results["different images"]
    with open_run(config, tmp_path, one_device) as (run, state):  # one process resumes what two have saved
        assert int(state.step) == 4
        resumed = next(run.batches)["image"]
    fifth = next(itertools.islice(pipeline.train_batches(config.data, seed=config.train.seed), 4, None))
    np.testing.assert_array_equal(resumed, fifth["image"])


@pytest.mark.slow
def test_different_configs_are_an_error(config, tiny, tmp_path):
    first, second = finish(spawn(config, tmp_path, configs={1: tiny(train={**TRAIN, "steps": 5})}))
    assert (first[0], second[0], second[2]) == (2, 2, "")
    assert "train.steps: process 0 has 4, process 1 has 5" in first[2]
    assert "Traceback" not in first[2]


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once_with_exit_code_2(tiny, tmp_path):
    first, second = finish(spawn(tiny(data={"source": "folder", "path": None}), tmp_path))
    assert (first[0], second[0], second[2]) == (2, 2, "")
    assert "error: data.path" in first[2]


def test_another_version_of_a_package_is_named(monkeypatch):
    texts = iter([["a hash", "another"], ['{"versions": {"jax": "1", "numpy": "2"}}', '{"versions": {"numpy": "2"}}']])
    monkeypatch.setattr(distributed, "exchange", lambda text: next(texts))
    with pytest.raises(DistributedError, match=r"same packages:\n  versions\.jax: .* 0 has '1', .* 1 has None$"):
        distributed.check_equal({})


@pytest.mark.slow
def test_a_missing_coordinator_is_an_error(config, tmp_path):
    child = spawn(config, tmp_path, arguments=["--start_timeout=2"])
    child[0].kill()
    (code, _, stderr) = finish(child)[1]
    assert code == 1
    assert "process 1 is still alone after 2 s (coordinator 127.0.0.1:" in stderr


def test_a_port_in_use_is_an_error():
    """JAX would share it with the other run, which ends both."""
    with peers.open_server(0) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DistributedError) as error:
            distributed.connect(address, 2, 0)
    assert (error.value.field, error.value.value, error.value.exit_code) == ("--coordinator", address, 1)


def test_different_numbers_of_processes_are_an_error(monkeypatch):
    client = Mock(key_value_dir_get=lambda folder: [(f"{folder}/0", "a"), (f"{folder}/1", "b")])
    state = Mock(client=client, num_processes=3, process_id=1)
    monkeypatch.setattr(distributed, "_state", lambda: state)
    with pytest.raises(DistributedError) as error:
        distributed.exchange("b")
    assert (error.value.field, error.value.value, error.value.exit_code) == ("--processes", 3, 2)


CONNECTED = """
import sys, time
from vqrae_jax import distributed, peers

peers.GRACE = 0.5, 0.0
distributed.connect(*[int(a.split("=")[1]) if a[2:9] == "process" else a.split("=")[1] for a in sys.argv[-3:]])
print("connected", flush=True)
time.sleep(600)
"""


def test_a_killed_process_ends_the_others(config, tmp_path):
    children = spawn(config, tmp_path, processes=3, program=CONNECTED)
    assert [child.stdout.readline() for child in children] == ["connected\n"] * 3
    children[2].kill()
    start = time.monotonic()
    for code, _, stderr in finish(children[:2], attempts=1):
        assert code == 1
        assert "process 2 (on 127.0.0.1) has ended" in stderr
        assert len(stderr.splitlines()) == 1
    assert time.monotonic() - start < 30  # JAX notices it after 100 s
    finish(children[2:])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"processes": 2}, "--processes=2"),
    ({"coordinator": "here"}, "--coordinator='here'"),
    ({"coordinator": "here:70000"}, "--coordinator='here:70000'"),
    ({"processes": 2, "process": 3}, "--process=3: .* 0 to 1 "),
    ({"processes": 1, "process": 1}, "--process=1: .* 0 to 0 "),
    ({"process": -1}, "--process=-1"),
    ({"processes": 0}, "--processes=0"),
])  # fmt: skip
def test_flags_that_do_not_fit_together(arguments, message, monkeypatch):
    error = ValueError("Number of processes must be defined.")
    monkeypatch.setattr(jax.distributed, "initialize", Mock(side_effect=error))
    with pytest.raises(ConfigError, match=message):
        distributed.connect(**arguments)


def test_one_process_starts_nothing(monkeypatch):
    error = ValueError("coordinator_address should be defined.")
    monkeypatch.setattr(jax.distributed, "initialize", Mock(side_effect=error))
    monkeypatch.setattr(distributed, "_single", False)
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    assert distributed.process_index() == 3
    distributed.connect()
    assert distributed.process_index() == 0  # whatever a launcher calls it, or it would print nothing
    distributed.connect(processes=1, process=0)
    assert not distributed.is_connected()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.exchange("alone") == ["alone"]
    distributed.check_equal({"steps": 1})
    with pytest.raises(KeyError):
        distributed.run_together(lambda: {}["error"])


def test_messages_of_several_processes():
    assert distributed._join_messages(["no", "no"]) == "no"
    assert distributed._join_messages(["", "no", "never", "no"]) == "process 1, 3: no\nprocess 2: never"


@pytest.mark.slow
def test_four_processes_equal_one(config, alone, tmp_path):
    finish_without_errors(spawn(config, tmp_path, processes=4))
    assert_same_losses(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"data": 1, "model": 2}])
def test_processes_evaluate_as_one(tiny, golden, alone, tmp_path, one_device, mesh):
    """Each process has its own rows, and the last batch is padded; along "model" both have the same rows."""
    for i in range(24):
        images.write_image(tmp_path / f"{i:02d}.png", np.full((40, 40, 3), 10 * i, np.uint8))
    encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
    encoder["encoder_reference"] = str(tmp_path)
    evaluation = {"metrics": ("encoder", "precision_recall"), "examples": 2, "kernel_images": 50, **encoder}
    config = {"evaluation": evaluation, "data": {"eval_batch_size": 24}}
    split = tiny(**config, mesh=mesh)
    _, second = finish_without_errors(spawn(split, alone, devices=2 - bool(mesh), arguments=["--mode=evaluate"]))
    evaluation = json.loads((alone / EVALUATION_FILE).read_text())
    metrics = loop.evaluate(tiny(**config), alone, one_device)
    assert {"step": evaluation["step"], **evaluation["metrics"]} == pytest.approx(metrics, rel=1e-4)
    assert evaluation["protocol"]["devices"].startswith("2 x" if mesh else "4 x")
    assert "eval/psnr" not in second[1]


def with_references(build, golden, folder):
    """Returns a config of a generator that is evaluated in features of a small encoder, at two settings."""
    for i in range(24):
        images.write_image(folder / f"{i:02d}.png", np.full((40, 40, 3), 10 * i, np.uint8))
    encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
    settings = {"samples": 24, "sampler_steps": (2, 3), "metrics": ("encoder", "precision_recall")}
    return build(evaluation={**encoder, "encoder_reference": str(folder), **settings}, train=TRAIN)


@pytest.mark.slow
def test_two_processes_are_killed_and_train_and_evaluate_a_generator_as_one(
    tiny_generator, golden, tmp_path, one_device, assert_same
):
    config = with_references(tiny_generator, golden, tmp_path / "reference")
    train = config.train.model_copy(update={"steps": 40, "checkpoint_every": 1, "evaluate_every": 40})
    config = config.model_copy(update={"train": train})
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish_without_errors(spawn(config, straight))
    for step in range(5, 30, 5):
        children = spawn(config, killed)
        wait_for_step(killed, step, children)
        children[step % 2].kill()
        finish(children, attempts=1)
    finish_without_errors(spawn(config, killed))
    with open_run(config, killed, one_device) as (_, ours), open_run(config, straight, one_device) as (_, theirs):
        assert_same(ours, theirs)
    loop.train(config, tmp_path / "one", one_device)
    assert_same_losses(straight, tmp_path / "one")
    finish_without_errors(spawn(config, straight, arguments=["--mode=evaluate"]))
    evaluation = json.loads((straight / EVALUATION_FILE).read_text())
    assert len(evaluation["settings"]) == 2
    codes = {folder.name: Codes(folder).load()[0] for folder in (straight / "samples").iterdir()}
    shutil.rmtree(straight / "samples")
    metrics = loop.evaluate(config, straight, one_device)
    assert {"step": 40, **evaluation["metrics"]} == pytest.approx(metrics, rel=1e-4)
    for name, sampled in codes.items():
        np.testing.assert_array_equal(Codes(straight / "samples" / name).load()[0], sampled)


@pytest.mark.slow
def test_two_processes_in_a_bucket(config, alone, buckets, tmp_path):
    finish_without_errors(spawn(config, tmp_path, address="gs://bucket/two"))
    assert_same_losses("gs://bucket/two", alone)
    resumed, _ = finish_without_errors(spawn(config, tmp_path, address="gs://bucket/two"))
    assert "resumed from step 4" in resumed[2]
    first, second = finish(spawn(config, tmp_path, address="gs://forbidden/two"))
    assert (first[0], second[0], second[2]) == (1, 1, "")
    assert "error: gs://forbidden/two/checkpoints" in first[2]
    assert "Storage Object Admin" in first[2]
    assert "Traceback" not in first[2]


@pytest.mark.slow
def test_a_model_axis_across_processes(tiny, alone, tmp_path):
    """Two processes hold halves of every weight and must read the same images."""
    finish_without_errors(spawn(tiny(train=TRAIN, mesh={"data": 1, "model": 2}), tmp_path, devices=1))
    assert_same_losses(tmp_path, alone)


@pytest.mark.slow
def test_restarts_on_other_numbers_of_processes(tiny, tmp_path, one_device):
    """4 -> 2 -> 1 -> 4 processes have the losses of an uninterrupted run."""

    def until(steps):
        train = {"steps": steps, "log_every": 1, "evaluate_every": 100, "checkpoint_every": 100}
        return tiny(train=train, optimizer={"decay_end_steps": 12, "warmup_steps": 2}, model={"noise_tau": 0.5})

    loop.train(until(12), tmp_path / "straight", one_device)
    for steps, count in ((3, 4), (6, 2), (9, 1), (12, 4)):
        finish_without_errors(spawn(until(steps), tmp_path / "moved", processes=count, devices=2 if count < 4 else 1))
    assert_same_losses(tmp_path / "moved", tmp_path / "straight")


def wait_for_step(workdir, step, children, seconds=900):
    start = time.monotonic()
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < step:
        assert all(child.poll() is None for child in children), finish(children)
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


@pytest.mark.slow
def test_a_preempted_process_stops_them_all(tiny, tmp_path):
    """SIGTERM twice, as srun and the daemon of SLURM send it; all have saved within the 15 s of GKE's Spot machines."""

    def run(steps):
        train = {"steps": steps, "log_every": 1, "evaluate_every": 10**6, "checkpoint_every": 10**6}
        return spawn(tiny(train=train), tmp_path, devices=1)

    children = run(10**6)
    wait_for_step(tmp_path, 2, children)
    start = time.monotonic()
    children[1].send_signal(signal.SIGTERM)
    children[1].send_signal(signal.SIGTERM)
    first, _ = finish_without_errors(children)
    assert time.monotonic() - start < 15
    step = int(checkpoint.find_checkpoint(tmp_path).name)
    assert f"stopped at step {step}, which is saved. To resume:\n" in first[2]
    assert f"--workdir={tmp_path}" in first[2]
    resumed, _ = finish_without_errors(run(step + 1))
    assert f"resumed from step {step}" in resumed[2]


UNREADABLE = """
import jax
from vqrae_jax import main
from vqrae_jax.errors import DataError
from vqrae_jax.build import judges

load = judges.load_metric_networks

def load_or_fail(*args):
    if jax.process_index() == 1:
        raise DataError("the network's file is gone")
    return load(*args)

judges.load_metric_networks = load_or_fail
main.run()
"""


@pytest.mark.slow
def test_a_file_that_one_process_cannot_read_ends_all(tiny, golden, tmp_path):
    """The others read their files without waiting, and all fail with the same message."""
    encoder = {"encoder_path": str(golden / "encoders" / "dinov2_swiglu"), "encoder_input_size": 28}
    config = tiny(evaluation={"training_metrics": ("encoder",), **encoder})
    first, second = finish(spawn(config, tmp_path, devices=1, program=UNREADABLE))
    assert (first[0], second[0]) == (1, 1)
    assert "error: process 1: the network's file is gone\n" in first[2]
    assert "Traceback" not in first[2] + second[2]


OTHER_FILES = """
import sys
from vqrae_jax import main
from vqrae_jax.data import folder

find = folder.list_images
if "--process=1" in sys.argv:
    folder.list_images = lambda path, field: find(path, field)[field == "data.eval_path" :]
main.run()
"""


@pytest.mark.slow
def test_different_images_are_an_error(tiny, tmp_path):
    """Otherwise a process with fewer images ends its evaluation while the others wait for it."""
    for split in ("train", "val"):
        for i in range(9):
            images.write_image(tmp_path / split / f"{i}.png", np.full((32, 32, 3), i, np.uint8))
    data = {"source": "folder", "path": str(tmp_path / "train"), "eval_path": str(tmp_path / "val"), "scale": (1, 1)}
    first, second = finish(spawn(tiny(data=data), tmp_path / "run", devices=1, program=OTHER_FILES))
    assert (first[0], second[0]) == (1, 1)
    assert "error: the processes do not agree; give all of them the same images" in first[2]
    assert "  data.eval_path.images: process 0 has 9, process 1 has 8\n" in first[2]
    assert "data.path" not in first[2]


# JAX's own message: it may notice before us that process 0 was killed, more often on a busy machine.
ABORTED = "JAX distributed service detected fatal errors"

ANNOUNCED = """
import pkgutil
from vqrae_jax import main

owner, name = pkgutil.resolve_name("OWNER"), "NAME"
function = getattr(owner, name)

def announce(*args, **options):
    print("reached", flush=True)
    return function(*args, **options)

setattr(owner, name, announce)
main.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize(("owner", "name"), [
    ("vqrae_jax.train.run", "_prepare"),
    ("vqrae_jax.train.loop", "jit_step"),
    ("vqrae_jax.evaluation.evaluator:Evaluator", "evaluate"),
    ("vqrae_jax.checkpoint:Checkpoints", "save"),
])  # fmt: skip
def test_a_killed_process_ends_the_other_at_any_point(tiny, tmp_path, owner, name, killed):
    """Preparation, compilation, evaluation, saving."""
    train = {"steps": 10**6, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 1}
    program = ANNOUNCED.replace("OWNER", owner).replace("NAME", name)
    children = spawn(tiny(train=train), tmp_path, devices=1, program=program)
    while (line := children[killed].stdout.readline()) != "reached\n":
        assert line, finish(children, attempts=1)
    children[killed].kill()
    start = time.monotonic()
    ((code, _, stderr),) = finish([children[1 - killed]], attempts=1)
    assert time.monotonic() - start < 30
    if killed == 0 and ABORTED in stderr:
        assert code in (1, -signal.SIGABRT)  # 1: this process exited while JAX wrote its message
    else:
        assert code == 1
        *_, last = stderr.splitlines()
        assert last.startswith("error")
        assert f"process {killed} (on 127.0.0.1) has ended" in last or "saving step" in last
        assert "Traceback" not in stderr
        assert "stack trace" not in stderr
    finish([children[killed]], attempts=1)


FAILING = """
import jax
from vqrae_jax import main
from vqrae_jax.errors import DataError
from vqrae_jax.train import hooks

def fail(self, step):
    if jax.process_index() == 1 and step == 3:
        raise DataError("the disk is gone")

hooks.StepTimer.before_step = fail
main.run()
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(config, tmp_path):
    first, second = finish(spawn(config, tmp_path, devices=1, program=FAILING))
    assert (first[0] != 0, second[0]) == (True, 1)
    assert "error (process 1): the disk is gone" in second[2]


@pytest.mark.slow
def test_kill_at_any_moment(tiny, tmp_path, one_device, assert_same):
    """20 times kill -9 on one of two processes, during training and saving, change nothing."""
    pick, steps, epoch = random.Random(0), 120, 3
    for i in range(24):
        images.write_image(tmp_path / "images" / f"{i:02d}.png", np.full((40, 40, 3), 10 * i, np.uint8))
    config = tiny(
        data={"source": "folder", "path": str(tmp_path / "images"), "scale": (1, 1), "batch_size": 8},
        train={**TRAIN, "steps": steps, "evaluate_every": 10**6, "checkpoint_every": 1, "keep_last": 2, "keep_best": 0},
    )
    program = (ROOT / "tests" / "train" / "noting.py").read_text()

    def run(workdir):
        return spawn(config, workdir, devices=1, program=program)

    finish_without_errors(run(tmp_path / "straight"))
    for _ in range(20):
        children = run(tmp_path / "killed")
        last = max(losses(tmp_path / "killed"), default=0) if (tmp_path / "killed" / "metrics.jsonl").exists() else 0
        wait_for_step(tmp_path / "killed", last + pick.randint(1, 6), children)
        time.sleep(pick.uniform(0, 0.3))
        pick.shuffle(children)
        children[0].kill()
        time.sleep(pick.uniform(0, 0.5))
        ((_, _, stderr),) = finish(children[1:], attempts=1)
        assert ABORTED in stderr or stderr.splitlines()[-1].startswith("error")
        finish(children[:1])
    finish_without_errors(run(tmp_path / "killed"))

    def images_of(step):
        return [n for i in range(2) for n in (tmp_path / "killed" / "seen" / f"{i}-{step}").read_text().split()]

    for first in range(1, steps + 1, epoch):
        assert sorted(int(n) for step in range(first, first + epoch) for n in images_of(step)) == list(range(24))
    with open_run(config, tmp_path / "killed", one_device) as (_, state):
        assert int(state.step) == steps
        with open_run(config, tmp_path / "straight", one_device) as (_, straight):
            assert_same(state, straight)
