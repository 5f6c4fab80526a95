"""Settings of the whole process are tested in processes of their own."""

import importlib.machinery
import importlib.util
import os
import pathlib
import resource
import subprocess
import sys

import jax
import pytest

from vqrae_jax import runtime
from vqrae_jax.runtime import keep_freed_memory

SCRIPT = """
import logging, sys, time
logging.basicConfig()
from vqrae_jax.runtime import enable_compilation_cache
folder = enable_compilation_cache()
print(folder)
import jax, jax.numpy as jnp
jax.jit(lambda x: sum(jnp.sin(x @ x + i) @ x for i in range(40)))(jnp.ones((8, 8)))
print(len(list(folder.iterdir())) if folder else None)
"""


@pytest.fixture
def run(tmp_path):
    def in_new_process(**settings):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache"), **settings}
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return (*done.stdout.split(), done.stderr)

    return in_new_process


def test_programs_are_kept_in_the_users_cache(run, tmp_path):
    folder, files, _ = run()
    assert folder.startswith(str(tmp_path / "cache" / "vqrae_jax"))
    assert int(files) > 0
    assert run()[1] == files  # read, not written again


def test_jax_settings_win(run, tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path))[0] == str(tmp_path)
    assert run(JAX_ENABLE_COMPILATION_CACHE="false")[0] == "None"


def test_a_folder_that_cannot_be_written_is_a_warning(run, tmp_path):
    (tmp_path / "file").write_text("")
    folder, files, told = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (folder, files) == ("None", "None")
    assert "no compilation cache" in told


def test_the_tests_own_cache_goes_away_with_them_and_another_stays(tmp_path):
    conftest = pathlib.Path(__file__).with_name("conftest.py")
    script = f"import os, runpy; runpy.run_path({str(conftest)!r}); print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    (tmp_path / "given").mkdir()

    def used(**settings):
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"TMPDIR": str(tmp_path), **settings}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return pathlib.Path(done.stdout.strip())

    assert used().parent == tmp_path
    assert used(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "given")) == tmp_path / "given"
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_options_of_a_gpu_are_known_to_the_compiler(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    chosen = runtime.compiler_options("gpu")
    assert chosen
    assert jax.jit(lambda x: x + 1, compiler_options=chosen)(1.0) == 2.0  # an unknown one is an error
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_no_such_option": True})(1.0)


def test_flags_of_the_user_win(monkeypatch):
    (name,) = runtime.compiler_options("gpu")
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
    assert runtime.compiler_options("gpu") == {} == runtime.compiler_options("cpu")


ROUNDS, SIZE = 20, 40 * 2**20  # beyond what glibc keeps by itself
FAULTS = f"""
import resource
from vqrae_jax.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        b"1" * {SIZE}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not keep_freed_memory(), reason="no glibc")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    pages = ROUNDS * SIZE // resource.getpagesize()
    assert given_back > pages // 2
    assert kept < pages // 100


ROOT = pathlib.Path(__file__).parents[1]
LIBTPU = importlib.util.find_spec("libtpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes one with libtpu and without anything that speaks of a TPU or GPU; returns its folder of devices."""
    installed = {"libtpu": importlib.machinery.ModuleSpec("libtpu", None), "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for name in runtime.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # of any machine that could hand devices on
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_an_absent_tpu_is_left_out(machine):
    assert runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize("node", ["accel0", "vfio/3"])
def test_a_device_of_a_tpu_keeps_it(machine, node):
    (machine / node).touch()
    assert not runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms is None


@pytest.mark.parametrize("name", runtime.TPU_VARIABLES)
def test_what_tpu_machines_set_keeps_it(machine, name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert not runtime.skip_absent_tpu(machine)


@pytest.mark.parametrize("platforms", ["", "tpu,cpu", "cuda"])
def test_platforms_that_were_named_stay(machine, platforms):
    jax.config.update("jax_platforms", platforms)
    assert not runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms == platforms


@pytest.mark.parametrize("way", ["a package", "an entry point"])
def test_a_gpu_is_never_left_out(machine, way, monkeypatch):
    spec = importlib.machinery.ModuleSpec("any", None)
    if way == "a package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    else:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [spec])
    assert not runtime.skip_absent_tpu(machine)


STARTS = {
    "main": "from vqrae_jax import main; main.run()",
    "inference": "from vqrae_jax.commands import command_line; command_line.run(jax.devices)",
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
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_PLATFORMS", "XLA_FLAGS", *runtime.TPU_VARIABLES)
    }
    program = f"import sys, jax; {STARTS[start]}"
    command = [sys.executable, "-c", program, "--config=configs/quickstart.py", "--workdir=x", "--config.mesh.model=99"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, cwd=ROOT)
    own = ["error: mesh.model=99 does not divide the 1 devices"] if start == "main" else []
    assert done.stderr.splitlines() == own
