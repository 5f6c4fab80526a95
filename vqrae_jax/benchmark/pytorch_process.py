"""A process that runs one stage of `torch_stages` and times one call per request."""

import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from vqrae_jax import runtime
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import writers

MAX_VALUES = 4096  # leading values of each result that are compared


def count_threads() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment() -> dict[str, str]:
    """Returns the environment of a PyTorch that is compared: its threads sleep while ours work.

    It keeps freed memory, as this process does.
    """
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", **runtime.malloc_environment()}


class PyTorchProcess:
    """One stage in PyTorch, with our weights and inputs.

    Attributes:
      results: the first MAX_VALUES values of each result of the first call, by name.
      memory: bytes that the first call needs beyond weights and inputs.
      versions: of PyTorch, with the instruction set that it uses, and of transformers.
    """

    def __init__(self, python: str, tensors: dict[str, np.ndarray], specification: dict[str, Any], compiled: bool):
        """Starts `python` and waits for the first call.

        Args:
          python: an interpreter with torch and transformers.
          tensors: weights and inputs under PyTorch's names.
          specification: the stage and its sizes, see `stages.specification`.
          compiled: use torch.compile.
        """
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        writers.write_safetensors(tensors, folder / "tensors.safetensors")
        specification = specification | {
            "tensors": str(folder / "tensors.safetensors"), "compile": compiled, "threads": count_threads(),
            "max_values": MAX_VALUES,
        }  # fmt: skip
        (folder / "specification.json").write_text(json.dumps(specification))
        program = pathlib.Path(__file__).with_name("torch_stages.py")
        self._process = subprocess.Popen(
            [python, "-P", program, folder / "specification.json"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=child_environment(),
        )  # fmt: skip
        first = self._read()
        self.results = {name: np.asarray(values) for name, values in first["results"].items()}
        self.memory, self.versions = first["memory"], first["versions"]

    def time_call(self) -> float:
        """Runs the stage once more and returns the seconds."""
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()
        self._folder.cleanup()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        lines = self._process.stderr.read().strip().splitlines() or [f"exit code {self._process.returncode}"]
        raise UserError(
            f"PyTorch failed ({lines[-1]}): install torch and transformers, or set --torch-python to a Python with them"
        )
