"""Everything that changes the process: memory, compile cache, compiler options, absent TPUs, environment variables.

Only `main`, the commands, the benchmarks and the examples call it; nothing here happens at import.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import pathlib
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

# XLA options of the training step, by platform. gpu, tpu: collectives start early and are awaited late, so that they
# overlap with matrix products; the gain is not measured yet. cpu: no option that was tried gains (docs/performance.md).
OPTIONS: dict[str, dict[str, bool]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True},
}
MIN_SECONDS = 0.1  # shorter compilations are not cached

# glibc's environment variables, and the number and value of mallopt(3) for each: one heap for all threads; no separate
# mappings, which are returned to the system as soon as they are freed; up to 2 GiB of freed memory kept; large growth.
MALLOC = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 2**28),
}

# Variables in which launchers write the index of a process.
PROCESS_VARIABLES = (
    "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "JOB_COMPLETION_INDEX",
)  # fmt: skip

# libtpu otherwise looks for a metadata server, other processes and a place for its log; compiling needs none of them.
LIBTPU_VARIABLES = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Variables that TPU machines and GKE set.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")


SILENCE = (10.0, 60.0)  # seconds without a line until `log_lines` reports the last one: at first, and at most


class LogHandler(logging.Handler):
    """Prints log lines on standard error; in a silence, how long ago the last line was and what it said."""

    def __init__(self):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._last, self._time, self._event, self._closed = "the start", time.monotonic(), threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="log lines")
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self._print(record)
        self._last, self._time = record.getMessage().partition("\n")[0], time.monotonic()
        self._event.set()

    def close(self) -> None:
        self._closed = True
        self._event.set()
        self._thread.join()
        super().close()

    def _print(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()

    def _watch(self) -> None:
        """Waits for twice the pause between the last two lines, and twice as long after each line of its own."""
        patience, before = SILENCE[0], self._time
        while not self._closed:
            if self._event.wait(patience):
                self._event.clear()
                patience, before = self._time - before, self._time
            elif log.isEnabledFor(logging.INFO):
                text = f"still running, {time.monotonic() - self._time:.0f} s after: {self._last}"
                with self.lock:
                    self._print(logging.makeLogRecord({"msg": text, "levelname": "INFO"}))
            patience = min(max(2 * patience, SILENCE[0]), SILENCE[1])


@contextlib.contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[None]:
    """Prints log lines by a `LogHandler` alone; silences are reported if `level` is INFO.

    Both standard streams pass on every line at once, also to files and pipes, and escape what they cannot encode.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    handler, root = LogHandler(), logging.getLogger()
    before, root.handlers = root.handlers, [handler]  # libraries may have set some
    try:
        with log_level(level):
            yield
    finally:
        root.handlers = before
        handler.close()


def set_environment(**variables: str) -> None:
    """Sets environment variables that the user has not set, for libraries that read them when they are imported."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def start() -> None:
    """Prepares the process for JAX: memory of the C library, absent TPUs, compile cache. Call it before JAX starts."""
    keep_freed_memory()
    skip_absent_tpu()
    enable_compilation_cache()


def compiler_options(platform: str) -> dict[str, bool]:
    """Returns OPTIONS of a platform ("cpu", "gpu", "tpu") without those that XLA_FLAGS or LIBTPU_INIT_ARGS set."""
    flags = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if name not in flags}


@contextlib.contextmanager
def log_level(level: int) -> Iterator[None]:
    """Sets the level of this package's loggers, and restores it at the end."""
    logger = logging.getLogger("vqrae_jax")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def launcher_process() -> int | None:
    """Returns the index that a launcher (SLURM, Open MPI, TPU pod, Kubernetes) gave this process; None without one."""
    indices = (os.environ[name] for name in PROCESS_VARIABLES if os.environ.get(name, "").isdigit())
    return next(map(int, indices), None)


def cache_folder() -> pathlib.Path:
    """Returns the folder of everything that this package caches: `~/.cache/vqrae_jax` (XDG_CACHE_HOME counts)."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vqrae_jax"


def enable_compilation_cache() -> pathlib.Path | None:
    """Caches compiled programs, so that the next process with the same program starts at once; returns the folder.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches
    the cache off. A folder that cannot be written is a warning. Each kind of CPU has a folder of its own, because
    programs for the CPU use the instructions of the machine that compiled them.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(jax.config.jax_compilation_cache_dir))
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    folder = cache_folder() / "compiled" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no compilation cache: %s cannot be written (%s)", folder, error.strerror)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in (("min_compile_time_secs", MIN_SECONDS), ("min_entry_size_bytes", -1)):
        name = f"jax_persistent_cache_{name}"
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for reuse; returns whether it can (glibc).

    XLA on a CPU frees and allocates the buffers of a program at every call. If they are returned to the system in
    between, their pages are cleared and mapped again each time, a fifth of a quantizer's training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(number, value) for number, value in MALLOC.values())


def malloc_environment() -> dict[str, str]:
    """Returns the variables that do the same as `keep_freed_memory` for a process that is yet to start."""
    return {name: str(value) for name, (_, value) in MALLOC.items()}


def skip_absent_tpu(devices: str | os.PathLike = "/dev") -> bool:
    """Makes JAX use the CPU where libtpu is installed (to compile for TPUs) without an accelerator; returns whether.

    JAX otherwise asks libtpu for chips, which prints a page of errors. Changes nothing if there is a TPU device, a
    variable that TPU machines set, a choice of platforms (JAX_PLATFORMS) or a plugin for GPUs. Call it before JAX
    starts.

    Args:
      devices: folder in which the system lists its devices; for tests.
    """
    import jax

    nodes = (node for pattern in ("accel[0-9]*", "vfio/[0-9]*") for node in pathlib.Path(devices).glob(pattern))
    if (
        importlib.util.find_spec("libtpu") is None
        or jax.config.jax_platforms is not None
        or any(name in os.environ for name in TPU_VARIABLES)
        or any(nodes)
        or importlib.util.find_spec("jax_plugins") is not None
        or importlib.metadata.entry_points(group="jax_plugins")
    ):
        return False
    jax.config.update("jax_platforms", "cpu")
    return True


@functools.cache
def silence_closed_event_loops() -> None:
    """Suppresses reports of threads whose event loop is closed: after a failed read or save, Orbax prints pages."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            previous(unraisable)

    sys.unraisablehook = hook


def exit_at_second_interrupt(message: Callable[[], str]) -> None:
    """Ends the process with code 130 and a message at the second Ctrl-C, during a compilation too.

    Python's own handlers wait until the main thread has left the compiler. Call it in the main thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait(handle: Any) -> None:  # `handle` keeps the socket open
        interrupts = 0
        while interrupts < 2:
            interrupts += reader.recv(1)[0] == signal.SIGINT
        with contextlib.suppress(Exception):
            sys.stderr.write(f"{message()}\n")
        os._exit(130)

    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=wait, args=(writer,), daemon=True, name="interrupts").start()


def has_libtpu() -> bool:
    """Returns whether libtpu is installed, or TPU_LIBRARY_PATH names its file."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    return pathlib.Path(path).is_file() if path else importlib.util.find_spec("libtpu") is not None


def describe_absent_tpu(accelerator_type: str) -> None:
    """Sets the variables with which libtpu compiles for a TPU that this machine does not have."""
    set_environment(**LIBTPU_VARIABLES, TPU_ACCELERATOR_TYPE=accelerator_type)


def use_cpus(count: int | None = None) -> None:
    """Restricts JAX to the CPU, and to `count` devices if it has not started yet."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if count is not None:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)


def read_cpuinfo() -> dict[str, str]:
    """Returns the fields of the first core in /proc/cpuinfo; on other systems only its name."""
    try:
        first, *_ = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:
        return {"model name": platform.processor()}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _cpu() -> str:
    """Returns the architecture and a hash of the instruction sets."""
    cpu = read_cpuinfo()
    features = cpu.get("flags") or cpu.get("Features") or cpu.get("model name", "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
