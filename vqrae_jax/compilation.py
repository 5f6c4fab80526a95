"""How XLA compiles: its options by platform, and compiled programs kept on disk between processes."""

import hashlib
import logging
import os
import pathlib
import platform

# Options of XLA for the training step, by platform, where they gain something. Each says what was measured:
# - gpu, tpu: collectives are started early and awaited late, so that they hide behind products. Not measured here.
# - cpu: nothing that was tried gains (docs/performance.md); what does is how memory is handed out: host_memory.py, and
#   large pages, which a process has to be started with (GLIBC_TUNABLES, see launch/local.sh).
OPTIONS: dict[str, dict[str, bool]] = {
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True},
}

log = logging.getLogger(__name__)

MIN_SECONDS = 0.1  # compilations shorter than this are not worth a file


def options(platform: str) -> dict[str, bool]:
    """OPTIONS of a platform ("cpu", "gpu", "tpu"), but for those that XLA_FLAGS or LIBTPU_INIT_ARGS set."""
    given = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if name not in given}


def enable_compilation_cache(folder: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Keeps compiled programs in `folder`, so that the next process with the same program starts at once.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches
    the cache off. A folder that cannot be written is a warning: everything works without.

    Args:
      folder: `~/.cache/vqrae_jax/compiled` (XDG_CACHE_HOME counts) where None; in it one subfolder per kind of CPU,
        because programs for the CPU use the instructions of the machine that compiled them.

    Returns:
      The folder in use, or None.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    if folder is None:
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vqrae_jax" / "compiled"
    folder = pathlib.Path(folder) / _cpu()
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


def _cpu() -> str:
    """Architecture and a hash of the instruction sets."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
