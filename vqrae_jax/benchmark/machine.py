"""Names of the machine and of the libraries: speeds and ratios belong to them."""

import importlib.metadata
import os

import jax

from vqrae_jax import runtime

# The most capable instruction set of each kind of processor comes first.
INSTRUCTION_SETS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}
# Variables that change which instructions a library uses.
VARIABLES = (
    "XLA_FLAGS", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip


def describe_machine(**versions: str) -> dict[str, str]:
    """Returns devices, processor, versions of libraries (those of JAX and `versions`), and variables that are set."""
    cpu = runtime.read_cpuinfo()
    features = cpu.get("flags", cpu.get("Features", "")).split()
    sets = [name for feature, name in INSTRUCTION_SETS.items() if feature in features]
    family = f", family {cpu['cpu family']} model {cpu['model']}" if "cpu family" in cpu else ""
    return {
        "device": f"{len(jax.local_devices())} x {jax.devices()[0].device_kind}",
        "processor": f"{cpu.get('model name', 'unknown')}{family}, {', '.join(sets[:1])}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        **versions,
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def format_machine(**versions: str) -> str:
    """Returns `describe_machine` as one line."""
    return "; ".join(f"{name} {value}" for name, value in describe_machine(**versions).items())
