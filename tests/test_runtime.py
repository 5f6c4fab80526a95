"""Settings of the whole process are tested in processes of their own."""

import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import pytest

from vqrae_jax import runtime
from vqrae_jax.runtime import keep_freed_memory

CACHES = """
import logging, os, sys
import jax, jax.numpy as jnp
from vqrae_jax.runtime import enable_compilation_cache
logging.basicConfig()
for home in sys.argv[1:]:
    if not os.fork():
        os.environ["XDG_CACHE_HOME"] = home
        folder = enable_compilation_cache()
        jax.jit(lambda x: sum(jnp.sin(x @ x + i) @ x for i in range(40)))(jnp.ones((8, 8)))
        print(folder, len(list(folder.glob("jit__lambda*-cache"))) if folder else None, flush=True)
        os._exit(0)
    os.wait()
"""


def test_programs_are_cached_in_the_users_folder_and_one_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", CACHES, *(str(tmp_path / name) for name in ("cache", "cache", "file"))]
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, unwritable = (line.split() for line in done.stdout.splitlines())
    assert first[0].startswith(str(tmp_path / "cache" / "vqrae_jax"))
    assert int(first[1]) > 0
    assert second == first  # read, not written again
    assert unwritable == ["None", "None"]
    assert str(tmp_path / "file") in done.stderr


def test_jax_settings_win(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", "~/named")
        assert runtime.enable_compilation_cache() == tmp_path / "named"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
        jax.config.update("jax_enable_compilation_cache", False)
        assert runtime.enable_compilation_cache() is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.slow
def test_the_cache_of_the_tests_is_deleted_and_another_is_kept(tmp_path):
    conftest = pathlib.Path(__file__).with_name("conftest.py")
    script = f"import os, runpy; runpy.run_path({str(conftest)!r}); print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    (tmp_path / "named").mkdir()

    def cache_folder(**settings):
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"TMPDIR": str(tmp_path), **settings}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return pathlib.Path(done.stdout.strip())

    assert cache_folder().parent == tmp_path
    assert cache_folder(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named")) == tmp_path / "named"
    assert [path.name for path in tmp_path.iterdir()] == ["named"]


def test_gpu_options_are_accepted_by_the_compiler(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = runtime.compiler_options("gpu")
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2.0  # an unknown option is an error
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_no_such_option": True})(1.0)


def test_flags_of_the_user_win(monkeypatch):
    (name,) = runtime.compiler_options("gpu")
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
    assert runtime.compiler_options("gpu") == {} == runtime.compiler_options("cpu")


ROUNDS, SIZE = 20, 40 * 2**20  # more than glibc keeps by default
FAULTS = f"""
import resource
import signal
from vqrae_jax.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        b"1" * {SIZE}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory()
faults()
print(returned, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not keep_freed_memory(), reason="no glibc")
def test_freed_memory_is_reused():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, reused = map(int, done.stdout.split())
    pages = ROUNDS * SIZE // resource.getpagesize()
    assert returned > pages // 2
    assert reused < pages // 100


ROOT = pathlib.Path(__file__).parents[1]
LIBTPU = importlib.util.find_spec("libtpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Simulates a machine with libtpu but without accelerators; returns its folder of devices."""
    installed = {"libtpu": importlib.machinery.ModuleSpec("libtpu", None), "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for name in runtime.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # exists on any machine with VFIO
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_an_absent_tpu_is_skipped(machine):
    assert runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize("node", ["accel0", "vfio/3"])
def test_a_tpu_device_is_used(machine, node):
    (machine / node).touch()
    assert not runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms is None


@pytest.mark.parametrize("name", runtime.TPU_VARIABLES)
def test_a_variable_of_tpu_machines_keeps_the_tpu(machine, name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert not runtime.skip_absent_tpu(machine)


@pytest.mark.parametrize("platforms", ["", "tpu,cpu", "cuda"])
def test_named_platforms_are_kept(machine, platforms):
    jax.config.update("jax_platforms", platforms)
    assert not runtime.skip_absent_tpu(machine)
    assert jax.config.jax_platforms == platforms


@pytest.mark.parametrize("way", ["a package", "an entry point"])
def test_a_gpu_plugin_is_kept(machine, way, monkeypatch):
    spec = importlib.machinery.ModuleSpec("any", None)
    if way == "a package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    else:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [spec])
    assert not runtime.skip_absent_tpu(machine)


def test_variables_of_an_absent_tpu_keep_those_that_are_set(monkeypatch):
    environment = {"TPU_WORKER_HOSTNAMES": "host"}
    monkeypatch.setattr(os, "environ", environment)
    runtime.describe_absent_tpu("v5litepod-4")
    assert environment["TPU_ACCELERATOR_TYPE"] == "v5litepod-4"
    assert environment["TPU_WORKER_HOSTNAMES"] == "host"


STARTS = {
    "main": "from vqrae_jax import main; main.run()",
    "inference": "from vqrae_jax.commands import command_line; command_line.run(jax.devices)",
    "benchmark": (
        "import types; from vqrae_jax.benchmark import __main__ as benchmark;"
        "benchmark.speed = types.SimpleNamespace(main=lambda _: jax.devices());"
        "benchmark.main(['encoder'])"
    ),
}


@pytest.mark.skipif(LIBTPU is None, reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("start", ["main", *(pytest.param(n, marks=pytest.mark.slow) for n in STARTS if n != "main")])
def test_commands_print_no_libtpu_errors(start):
    """`main` fails with its own message, after it has listed the devices."""
    unset = ("JAX_PLATFORMS", "XLA_FLAGS", *runtime.TPU_VARIABLES)
    env = {name: value for name, value in os.environ.items() if name not in unset}
    program = f"import sys, jax; {STARTS[start]}"
    command = [sys.executable, "-c", program, "--config=configs/quickstart.py", "--workdir=x", "--config.mesh.model=99"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert all(line.startswith("error: mesh.model") for line in lines)
    assert len(lines) == (start == "main")


BLOCKED = """
import ctypes, signal
from vqrae_jax import runtime

signal.signal(signal.SIGINT, lambda *_: None)
runtime.exit_at_second_interrupt(lambda: "interrupted")
print("ready", flush=True)
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
for _ in range(2):
    libc.pthread_mutex_lock(mutex)  # never returns to Python, like a long compilation
"""


def test_the_second_interrupt_ends_a_process_outside_of_python():
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "interrupted\n"


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_log_lines_have_one_format_and_silences_are_reported(level, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "SILENCE", (0.02, 0.04))
    before, lines, log = logging.getLogger().handlers, [], logging.getLogger("vqrae_jax.subject")
    with runtime.log_lines(level):
        log.info("compiling\nfor long")
        deadline = time.monotonic() + (10 if level == logging.INFO else 0.2)
        while time.monotonic() < deadline and len(lines) < 4:
            time.sleep(0.02)
            lines += capsys.readouterr().err.splitlines()
        log.warning("slow")
        logging.getLogger("library").warning("old")
    lines += capsys.readouterr().err.splitlines()
    assert logging.getLogger().handlers is before
    assert [line.partition(" WARNING ")[2] for line in lines[-2:]] == ["slow", "old"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in (lines[0], *lines[2:]))
    silences = [line for line in lines if line.endswith("still running, 0 s after: compiling")]
    assert (len(silences) >= 2) == (level == logging.INFO)


def test_lines_pass_a_pipe_at_once():
    program = "from vqrae_jax import runtime\nwith runtime.log_lines(): print('\\udce9'), input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "\\udce9\n"
        process.stdin.close()
