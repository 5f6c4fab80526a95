"""Machines that have libtpu, to compile for TPUs that are elsewhere (preflight), and no TPU."""

import importlib.metadata
import importlib.util
import os
import pathlib

# What TPU machines and GKE set.
NAMES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")


def leave_out_absent_tpu(devices: str | os.PathLike = "/dev") -> bool:
    """JAX takes the CPU at once where it would else ask libtpu for chips, whose complaints fill a page.

    Only where nothing speaks against it: a device of a TPU, a variable that TPU machines set, platforms that the user
    names (JAX_PLATFORMS) or that JAX chose because it saw chips, a plugin for GPUs. Before JAX starts.

    Args:
      devices: where the system lists its devices; for tests.

    Returns:
      Whether it was done.
    """
    import jax

    nodes = (found for pattern in ("accel[0-9]*", "vfio/[0-9]*") for found in pathlib.Path(devices).glob(pattern))
    if (
        importlib.util.find_spec("libtpu") is None
        or jax.config.jax_platforms is not None
        or any(name in os.environ for name in NAMES)
        or any(nodes)
        or importlib.util.find_spec("jax_plugins") is not None
        or importlib.metadata.entry_points(group="jax_plugins")
    ):
        return False
    jax.config.update("jax_platforms", "cpu")
    return True
