"""jax.Device objects of hardware that this machine does not have, to compile for."""

import jax
from jax.experimental import topologies

from vqrae_jax import runtime
from vqrae_jax.errors import ConfigError
from vqrae_jax.preflight.chips import Topology

ACCELERATOR_TYPES = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}


def abstract_devices(topology: Topology) -> list[jax.Device]:
    """Returns one device per chip. Call it before anything else uses JAX in this process.

    Those of a GPU topology are CPU devices, because XLA compiles for GPUs only on a machine that has one.

    Raises:
      ConfigError: libtpu is not installed, or JAX has started with fewer CPU devices.
    """
    if topology.platform == "tpu":
        if not runtime.has_libtpu():
            message = (
                "compiling for a TPU needs libtpu, but no TPU: pip install libtpu, or set TPU_LIBRARY_PATH to the path "
                "of libtpu.so"
            )
            raise ConfigError(message, field="--topology", value=topology.name)
        runtime.use_cpus()
        runtime.describe_absent_tpu(ACCELERATOR_TYPES[topology.kind])
        # On v4 the two cores of a chip are one device.
        options = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    runtime.use_cpus(topology.size)
    devices = jax.devices("cpu")
    if len(devices) < topology.size:
        message = f"JAX has already started in this process with only {len(devices)} CPU devices"
        raise ConfigError(message, field="--topology", value=topology.name)
    return devices[: topology.size]
