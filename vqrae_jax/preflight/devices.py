"""Devices that are not there: jax.Device objects of a topology, to compile for and never to run on."""

import contextlib
import importlib.util
import os
import pathlib

import jax
from jax.experimental import topologies

from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.chips import Topology

# libtpu asks a metadata server, a lock file and the log where it is; none of them matters for compiling.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ACCELERATOR_TYPES = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}


def abstract_devices(topology: Topology) -> list[jax.Device]:
    """One device per chip. Of a GPU topology they are CPU devices: XLA compiles for GPUs only where there is one.

    Call it before anything else uses jax in this process: it keeps jax off whatever accelerators there are.

    Raises:
      ConfigError: libtpu is not installed, or jax runs already with fewer CPU devices.
    """
    jax.config.update("jax_platforms", "cpu")
    return _tpu(topology) if topology.platform == "tpu" else _cpu(topology.size)


def _tpu(topology: Topology) -> list[jax.Device]:
    if not has_libtpu():
        raise ConfigError(
            f"--topology={topology.text} is compiled by libtpu, which is not installed: pip install libtpu, or set "
            f"TPU_LIBRARY_PATH to libtpu.so; it needs no TPU"
        )
    for name, value in {**LIBTPU, "TPU_ACCELERATOR_TYPE": ACCELERATOR_TYPES[topology.kind]}.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}  # the two cores of a chip as one device
    return list(topologies.get_topology_desc(topology.text, "tpu", **options).devices)


def has_libtpu() -> bool:
    given = os.environ.get("TPU_LIBRARY_PATH")
    return pathlib.Path(given).is_file() if given else importlib.util.find_spec("libtpu") is not None


def _cpu(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # jax has started: what it has must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"{count} CPU devices are wanted and jax started with {len(devices)} in this process")
    return devices[:count]
