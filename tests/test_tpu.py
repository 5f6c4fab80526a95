import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vqrae_jax import tpu

ROOT = pathlib.Path(__file__).parents[1]
LIBTPU = importlib.util.find_spec("libtpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes one with libtpu and without anything that speaks of a TPU or GPU; returns its folder of devices."""
    installed = {"libtpu": importlib.machinery.ModuleSpec("libtpu", None), "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for name in tpu.NAMES:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # of any machine that could hand devices on
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_an_absent_tpu_is_left_out(machine):
    assert tpu.leave_out_absent_tpu(machine)
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize("node", ["accel0", "vfio/3"])
def test_a_device_of_a_tpu_keeps_it(machine, node):
    (machine / node).touch()
    assert not tpu.leave_out_absent_tpu(machine)
    assert jax.config.jax_platforms is None


@pytest.mark.parametrize("name", tpu.NAMES)
def test_what_tpu_machines_set_keeps_it(machine, name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert not tpu.leave_out_absent_tpu(machine)


@pytest.mark.parametrize("platforms", ["", "tpu,cpu", "cuda"])
def test_platforms_that_were_named_stay(machine, platforms):
    jax.config.update("jax_platforms", platforms)
    assert not tpu.leave_out_absent_tpu(machine)
    assert jax.config.jax_platforms == platforms


@pytest.mark.parametrize("way", ["a package", "an entry point"])
def test_a_gpu_is_never_left_out(machine, way, monkeypatch):
    spec = importlib.machinery.ModuleSpec("any", None)
    if way == "a package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    else:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [spec])
    assert not tpu.leave_out_absent_tpu(machine)


STARTS = {
    "main": "from vqrae_jax import main; main.run()",
    "inference": "from vqrae_jax.inference import command; command.run(jax.devices)",
    "benchmark": (
        "import types; from vqrae_jax.benchmark import __main__ as benchmark;"
        "sys.modules['vqrae_jax.benchmark.speed'] = types.SimpleNamespace(main=lambda _: jax.devices());"
        "benchmark.main(['encoder'])"
    ),
}


@pytest.mark.skipif(LIBTPU is None, reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("start", STARTS)
def test_commands_print_nothing_of_libtpu(start):
    """What main prints is its own: it fails after it has asked for devices."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS", *tpu.NAMES)}
    program = f"import sys, jax; {STARTS[start]}"
    command = [sys.executable, "-c", program, "--config=configs/quickstart.py", "--workdir=x", "--config.mesh.model=99"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, cwd=ROOT)
    own = ["error: mesh.model=99 does not divide the 1 devices"] if start == "main" else []
    assert done.stderr.splitlines() == own
