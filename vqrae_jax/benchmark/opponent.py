"""The PyTorch program of `torch_stages`, kept running beside this one and asked for one call at a time."""

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

SHOWN = 4096  # leading numbers of each result that are compared


class Opponent:
    """One stage in PyTorch, with the weights and inputs of ours."""

    def __init__(self, python: str, tensors: dict[str, np.ndarray], specification: dict[str, Any], compiled: bool):
        """Starts `python` and waits for its first call.

        Args:
          tensors: weights and inputs under PyTorch's names.
          specification: what `torch_stages` describes, but for what is added here.

        Raises:
          UserError: that Python has no torch or transformers, or the stage fails there.
        """
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        writers.write_safetensors(tensors, folder / "tensors.safetensors")
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        specification = specification | {
            "tensors": str(folder / "tensors.safetensors"), "compile": compiled, "threads": threads, "shown": SHOWN
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(specification))
        self._program = subprocess.Popen(
            [python, "-P", pathlib.Path(__file__).with_name("torch_stages.py"), folder / "spec.json"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # Its threads must sleep while ours work; it keeps freed memory as we do.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", **runtime.malloc_environment()},
        )  # fmt: skip
        first = self._read()
        self.version, self.device = first["torch"], first["device"]
        self.out = {name: np.asarray(values) for name, values in first["out"].items()}
        self.memory = first["memory"]

    def seconds(self) -> float:
        """One more call."""
        self._program.stdin.write("run\n")
        self._program.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        self._program.stdin.close()
        self._program.wait()
        self._program.stdout.close()
        self._program.stderr.close()
        self._folder.cleanup()

    def _read(self) -> dict[str, Any]:
        line = self._program.stdout.readline()
        if not line:
            self._program.wait()
            last = self._program.stderr.read().strip().splitlines()[-1:]
            raise UserError(
                f"PyTorch did not run: {' '.join(last)}; --torch-python names a Python with torch and transformers"
            )
        return json.loads(line)
